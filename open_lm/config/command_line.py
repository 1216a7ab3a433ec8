"""Parse the command line and configuration files into the settings of sections.py. Imports no torch, to be fast."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from open_lm.config.architecture import read_run_settings
from open_lm.config.checks import contradictions, missing_for_a_run
from open_lm.config.fields import FieldSpec
from open_lm.config.layout import parse_mesh_dim
from open_lm.config.recipe_files import find_recipe
from open_lm.config.sections import ArchitectureConfig, Config, sections
from open_lm.config.suggestions import suggest
from open_lm.errors import ConfigError, join_problems
from open_lm.system.names import user_file, weights_path
from open_lm.system.program import program_name

# Flags that were added later must not make existing abbreviations ambiguous.
LATER_FLAGS = frozenset({
    "batch_size", "document_mask", "end_of_text_id", "cache_dir", "cache_limit", "read_timeout", "allow_changed_data",
    "allow_other_tokenizer", "checkpoint_format", "checkpoint_dir", "save_every_n_steps", "save_every_minutes",
    "keep_last", "save_milestone_every", "max_skipped_steps", "skip_loss_spikes", "rollback_loss_spikes",
    "hang_timeout", "deterministic", "distill_weight", "distill_temperature", "distill_loss", "distill_precision",
    "distill_cache", "activation_checkpointing", "torchcompile_mode", "no_decay_norms", "muon_momentum",
    "lr_decay_fraction", "lr_decay_shape", "fsdp_zero2", "accum_reduce", "async_tensor_parallel", "tensor_parallel",
    "context_parallel", "mesh_dim", "expert_parallel", "dist_timeout", "fp8", "val_max_batches", "icl_yaml",
    "icl_every_n_steps", "icl_max_examples", "icl_data_dir", "icl_max_time_share", "sample_prompts",
    "sample_every_n_steps", "sample_temperature", "sample_max_tokens",
    "tokenizer", "val_names", "lora", "qlora", "recipe", "report", "energy",
    "profile_steps", "memory_snapshot", "mup", "mup_base_width", "mup_base_head_dim", "log_gradient_noise",
    "train_text", "text_key", "text_separator", "text_split_documents", "text_add_bos", "text_index",
})  # fmt: skip


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of exiting and keeps existing abbreviations unambiguous."""

    @classmethod
    def of_program(cls, prog: str, doc: str | None, **options: Any) -> FlagParser:
        """Return the parser of a program. Its help begins with the first line of `doc` and ends with the others."""
        description, _, epilog = (doc or "").partition("\n")
        style = argparse.RawDescriptionHelpFormatter
        return cls(prog=program_name(prog), description=description, epilog=epilog, formatter_class=style, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help for all flags")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(_join_mesh_dim(sys.argv[1:] if args is None else args), namespace)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        matches = super()._get_option_tuples(option_string)
        original = [match for match in matches if match[0].dest not in LATER_FLAGS]
        positive = [match for match in matches if not _is_negation(match[0], match[1])]
        return [match for match in original if match in positive] or positive or original or matches


class _Switch(argparse.Action):
    """A boolean flag: --FLAG sets it, --no-FLAG clears it. Help and usage show only --FLAG."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        (flag,) = option_strings
        super().__init__([flag, f"--no-{flag[2:]}"], dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not _is_negation(self, option_string))

    def format_usage(self) -> str:
        return self.option_strings[0]


class _Version(argparse.Action):
    """Print the version of the package and exit. It is read only then, because that takes longer than all flags."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import open_lm

        print(f"open_lm {open_lm.__version__}")
        parser.exit()


def _is_negation(action: argparse.Action, option_string: str | None) -> bool:
    return isinstance(action, _Switch) and option_string != action.option_strings[0]


class _HelpFormatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.format_usage() if isinstance(action, _Switch) else super()._format_action_invocation(action)


def parse_args(args: Sequence[str], for_run: bool = False) -> argparse.Namespace:
    """Parse and check flags and the file of --config. Return all settings as one flat object.

    The command line takes precedence over --config, which takes precedence over --recipe and defaults.

    Args:
        args: the words of the command line.
        for_run: also check that the settings that a training or evaluation run requires are given.

    Raises:
        ConfigError: with all problems.
    """
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(args)
    specs = all_specs()
    problems = [_unknown_flag(word, specs) for word in unknown if word.startswith("-")]
    if not problems:  # otherwise these words are the values of the unknown flags
        problems = [f"{word!r} does not belong to any flag" for word in unknown]

    values = {spec.name: spec.default for spec in specs.values()}
    sources: list[tuple[str, dict[str, Any]]] = [("command line", vars(parsed))]
    if getattr(parsed, "config", None):
        sources.insert(0, (parsed.config, load_config_file(parsed.config)))
    number_given = len(sources)
    sources = [*_recipe_sources(sources, problems), *sources]
    given: set[str] = set()
    for number, (origin, mapping) in enumerate(sources):
        for key, raw in mapping.items():
            spec = specs.get(key)
            if spec is None:
                problems.append(f"{origin}: unknown key {key!r}{_did_you_mean(suggest(key, specs.values()))}")
                continue
            try:
                values[key] = convert(raw, spec)
                given.update([key] if number >= len(sources) - number_given else [])
            except ConfigError as error:
                problems.append(f"{error} (in {origin})" if origin != "command line" else str(error))
    if _mesh_shards(values["mesh_dim"]):
        if vars(parsed).get("fsdp") is False:
            problems.append(f"--no-fsdp contradicts --mesh-dim {values['mesh_dim']}, which shards: remove one of them")
        values["fsdp"] = True
    namespace = argparse.Namespace(**values)
    config = Config.from_namespace(namespace)
    problems += contradictions(config, given)
    if for_run:
        problems += missing_for_a_run(config)
    if problems:
        raise ConfigError(join_problems(problems, "invalid configuration"))
    return namespace


def _recipe_sources(
    given: Sequence[tuple[str, dict[str, Any]]], problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the settings that --recipe adds to the given ones: its file, and the model of --pretrained.

    Problems of the recipe are appended to `problems`.
    """
    settings = {key: value for _, mapping in given for key, value in mapping.items()}
    if settings.get("recipe") is None:
        return []
    sources = []
    try:
        path = find_recipe(str(settings["recipe"]))
        sources.append((path, load_config_file(path)))
    except ConfigError as error:
        problems.append(str(error))
    if isinstance(settings.get("pretrained"), str) and not {"model", "hf_model"} & settings.keys():
        model = read_run_settings(weights_path(settings["pretrained"]))
        sources.append((settings["pretrained"], {key: value for key, value in model.items() if value is not None}))
    return sources


def _join_mesh_dim(args: Sequence[str]) -> list[str]:
    """Join --mesh-dim and a value such as -1,2,4 to one word, because argparse would parse the value as a flag."""
    words: list[str] = []
    for word in args:
        if words and words[-1] == "--mesh-dim" and word.startswith("-1"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _mesh_shards(mesh_dim: str | None) -> bool:
    """Return whether --mesh-dim shards parameters like --fsdp."""
    try:
        return mesh_dim is not None and parse_mesh_dim(mesh_dim)[1] != 1
    except ConfigError:  # `contradictions` reports it
        return False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the trainer, with one flag per field and one group per section."""
    parser = FlagParser(
        prog=program_name("open_lm.main"),
        description="Train or evaluate a language model on shards of tokens. Use torchrun for several processes. "
        "--no-FLAG (such as --no-fsdp) turns off a flag that takes no value, even if --config turns it on.",
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of the package and exit")
    for section in sections().values():
        group = parser.add_argument_group(section.title)
        for spec in section.specs():
            add_flag(group, spec)
    return parser


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that define a model (norm, feed-forward network, attention, ...) to another program's parser."""
    for spec in ArchitectureConfig.specs():
        kwargs: dict[str, Any] = {"help": _escaped(spec.help), "default": spec.default}
        if spec.kind is bool:
            kwargs["action"] = "store_true"
        else:
            kwargs |= {"type": spec.kind, "choices": spec.choices}
        parser.add_argument(spec.flag, **kwargs)


def all_specs() -> dict[str, FieldSpec]:
    """Return all flags by field name, in the order of the sections."""
    return {spec.name: spec for section in sections().values() for spec in section.specs()}


def add_flag(group: Any, spec: FieldSpec) -> None:
    """Add the flag of a field to a group of a parser.

    It accepts any string: `convert` checks the values, so that all problems are reported together.
    """
    if spec.kind is bool:
        group.add_argument(spec.flag, action=_Switch, help=_escaped(spec.help))
        return
    kind = spec.kind.__name__.upper() if spec.path is None else "PATH"
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else kind
    default = "" if spec.default is None or spec.default == "" else f" (default: {spec.default})"
    help_text = _escaped(spec.help + default)
    group.add_argument(spec.flag, nargs="+" if spec.many else None, metavar=metavar, help=help_text)


def _escaped(text: str) -> str:
    """Escape the characters that argparse would format in a help text."""
    return text.replace("%", "%%")


def convert(raw: Any, spec: FieldSpec) -> Any:
    """Convert a value of the command line or of a file to the type of its flag. Raise ConfigError if that fails."""
    if raw is None:
        if spec.optional:
            return None
        raise ConfigError(f"{spec.flag}: found no value, expected {_expected(spec)}")
    if spec.many:
        items = raw if isinstance(raw, list) else [raw]
        if not items:
            raise ConfigError(f"{spec.flag}: found an empty list, expected at least one value")
        return [_convert_one(item, spec) for item in items]
    return _convert_one(raw, spec)


def _convert_one(raw: Any, spec: FieldSpec) -> Any:
    value = _typed(raw, spec.kind)
    if value is None:
        raise ConfigError(f"{spec.flag}: found {raw!r}, expected {_expected(spec)}")
    if spec.choices and value not in spec.choices:
        advice = f"; {spec.advice}" if spec.advice else ""
        raise ConfigError(f"{spec.flag}: found {value!r}, expected one of {', '.join(spec.choices)}{advice}")
    return value if spec.path is None else spec.path(value)


def _typed(raw: Any, kind: type) -> Any:
    """Return `raw` as `kind`, or None if it has another type. A bool is not a number, a number is not text."""
    if kind is bool or kind is str:
        return raw if isinstance(raw, kind) else None
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return None
    try:
        value = float(raw) if kind is float else int(raw)
    except ValueError:
        return None
    return None if kind is int and isinstance(raw, float) and raw != value else value


def _expected(spec: FieldSpec) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names[spec.kind]


def load_config_file(path: str, flag: str = "--config") -> dict[str, Any]:
    """Read a YAML or JSON file. Return its values by key, with underscores in place of dashes. Errors name `flag`."""
    try:
        text = user_file(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path} ({error.strerror}); use a YAML or JSON file") from error
    import yaml

    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{flag}: {path} is neither valid YAML nor JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{flag}: {path} contains a {type(content).__name__}, expected a mapping from flags to values"
        )
    return {key.replace("-", "_"): value for key, value in content.items()}


def _unknown_flag(word: str, specs: dict[str, FieldSpec]) -> str:
    name = word.split("=", 1)[0]
    return f"unknown flag {name}{_did_you_mean([specs[key].flag for key in suggest(name, specs.values())])}"


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""
