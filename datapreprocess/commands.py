"""Shared code of the preprocessing commands: common options, and the steps from parsed arguments to a run."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from open_lm.system.names import source_pattern, user_path

if TYPE_CHECKING:
    from open_lm.datapreprocess.inputs import InputFile
    from open_lm.datapreprocess.job import Layout, PreprocessJob
    from open_lm.datapreprocess.mixtures import Mixture
    from open_lm.datapreprocess.tokenization import DocumentEncoder

_logger = logging.getLogger("open_lm.datapreprocess")


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts every flag with dashes and with underscores and raises ConfigError for misuse."""

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Add an argument under both spellings of each flag."""
        return super().add_argument(*_spellings(names), **options)  # type: ignore[arg-type]

    def add_argument_group(self, *args: Any, **options: Any) -> argparse._ArgumentGroup:
        """Add a group whose flags have both spellings, too."""
        group = super().add_argument_group(*args, **options)
        add = group.add_argument
        group.add_argument = lambda *names, **given: add(*_spellings(names), **given)  # type: ignore[method-assign]
        return group

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return one match per flag: an abbreviation of both spellings of a flag is not ambiguous."""
        matches = super()._get_option_tuples(option_string)
        return list({id(match[0]): match for match in reversed(matches)}.values())[::-1]

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise ConfigError instead of exiting."""
        from open_lm.errors import ConfigError

        raise ConfigError(f"{message} ({self.prog} --help shows all options)")


def _spellings(names: Sequence[str]) -> list[str]:
    spellings = list(names)
    for name in names:
        if name.startswith("--"):
            body = name[2:]
            spellings += [f"--{other}" for other in (body.replace("_", "-"), body.replace("-", "_"))]
    return list(dict.fromkeys(spellings))


def add_common_options(parser: Parser) -> None:
    """Add the options that both commands share."""
    from open_lm.datapreprocess.readers import separator_suffixes

    documents = parser.add_argument_group("documents").add_argument
    documents("--eot-token", help="token that ends every document (default: the tokenizer's end-of-text token)")
    documents("--add-bos", action="store_true", help="start every document with the tokenizer's begin-of-text token")
    documents(
        "--allow-special-tokens-in-text", action="store_true",
        help="give special tokens in the text of documents, such as <|endoftext|>, their ids, which split documents "
        "(default: encode them as plain text)",
    )  # fmt: skip
    documents(
        "--separator",
        help=rf"text between the documents of {', '.join(separator_suffixes())} files, for example '\n\n' "
        "(default: one document per file)",
    )
    documents(
        "--split-documents", action="store_true",
        help="keep each document in one sequence: pack complete documents and pad the rest of the sequence; cut only "
        "documents longer than a sequence",
    )  # fmt: skip
    documents("--drop-tail", action="store_true", help="drop the leftover tokens that do not fill a sequence")
    bad = parser.add_argument_group("bad input").add_argument
    bad(
        "--max-bad-fraction", type=float,
        help="fraction of the documents, files and bytes that may be unusable and skipped (default: 0.001)",
    )  # fmt: skip
    bad("--skip-bad-lines", action="store_true", help="same as --max-bad-fraction 1")
    mixing = parser.add_argument_group("mixtures").add_argument
    mixing(
        "--source", type=source_pattern, action="append", default=[], metavar="NAME=PATTERN",
        help="name the files of a source by path, glob or folder; may be repeated, also for the same source",
    )  # fmt: skip
    mixing(
        "--mixture",
        type=user_path,
        help="a built-in mixture of sources and rates, or a YAML file (see docs/preprocessing.md)",
    )
    mixing("--output-per-source", action="store_true", help="write one data set per source, to mix them in training")
    mixing(
        "--mixture-tokens", type=int, help="total number of tokens of the mixture; documents are repeated if necessary"
    )
    running = add_work_options(parser)
    running(
        "--dry-run", action="store_true",
        help="tokenize a sample and predict tokens, shards, disk space and time; write nothing",
    )  # fmt: skip
    running(
        "--verify-tokenizer", type=int, metavar="N",
        help="compare the fast tokenizer with the reference on N documents and N random texts; write nothing",
    )  # fmt: skip


def add_work_options(parser: Parser) -> Callable[..., argparse.Action]:
    """Add the options of running and resuming a command; return the function that adds others to their group."""
    running = parser.add_argument_group("running").add_argument
    running("--memory-limit", help="memory for all processes on a machine, such as 8GB (default: half of its memory)")
    running(
        "--work-dir",
        type=user_path,
        help="folder for intermediate files, removed when the run finishes; on several nodes a shared folder (default: "
        "in the output folder, or in the temporary folder of this machine if the output is remote)",
    )
    running("--restart", action="store_true", help="discard unfinished work that was started with other settings")
    return running


@dataclass
class Request:
    """The parsed arguments of a command.

    Attributes:
        common: arguments that both commands have.
        input_flag: the command's flag for inputs, for messages.
        patterns: inputs as given.
        running: fields of the job whose flags differ between the commands: workers, work_dir, ray_options.
        suffixes: read only files with these suffixes from folders; None: all supported files.
        choose: selects the input files to use.
    """

    common: argparse.Namespace
    input_flag: str
    patterns: Sequence[str]
    layout: Layout
    tokenizer: str | None
    vocab_size: int | None
    running: dict[str, Any]
    mixture: Mixture | None = None
    suffixes: Sequence[str] | None = None
    choose: Callable[[list[InputFile]], list[InputFile]] = field(default=lambda inputs: inputs)


def execute(request: Request) -> None:
    """Run a command: make the data set, predict it (--dry-run) or verify the tokenizer."""
    from open_lm.datapreprocess.engine import run
    from open_lm.datapreprocess.tokenization import make_encoder

    common = request.common
    mixture = request.mixture = _choose_mixture(request)
    _check_flags(common, mixture)
    job = _make_job(request)
    flags = _training_flags(job, mixture) if mixture and mixture.rates and job.layout.per_source else []
    allows_special = common.allow_special_tokens_in_text
    encoder = make_encoder(request.tokenizer, common.eot_token, request.vocab_size, common.add_bos, allows_special)
    _check_special_tokens(encoder, allows_special)
    if common.verify_tokenizer is not None:
        from open_lm.datapreprocess.tokenizer_check import verify_job

        verify_job(encoder, job, common.verify_tokenizer)
        return
    job = _sample_by_rate(job, request, encoder)
    if common.dry_run:
        from open_lm.datapreprocess.dry_run import describe, estimate

        print(describe(estimate(job, encoder)))
        return
    run(job, encoder)
    if flags:
        _logger.info("training flags for the rates of the mixture: %s", shlex.join(flags))


def _check_special_tokens(encoder: DocumentEncoder, allows_special: bool) -> None:
    """Warn if the flag has no effect, or if the tokenizer cannot encode its end-of-text token as text."""
    if allows_special and encoder.special_tokens_in_text is None:
        warn_without_effect(["--allow-special-tokens-in-text"], "the tokenizer finds no special tokens in texts")
    if tokens := encoder.unsplittable_tokens():
        _logger.warning(
            "documents that contain %s: the tokenizer's own vocabulary gives this text the id that begins or ends a "
            "document, so it splits them",
            " or ".join(tokens),
        )


def _make_job(request: Request) -> PreprocessJob:
    from open_lm.datapreprocess.inputs import find_inputs
    from open_lm.datapreprocess.job import DEFAULT_BAD_FRACTION, PreprocessJob
    from open_lm.datapreprocess.readers import ReadOptions
    from open_lm.datapreprocess.sampling import UNKNOWN, Sampling, log_sampling
    from open_lm.errors import ConfigError

    common, mixture = request.common, request.mixture
    source_inputs = {
        name: find_inputs(patterns, request.suffixes) for name, patterns in (mixture.inputs if mixture else {}).items()
    }
    inputs = {item.url: item for items in source_inputs.values() for item in items}
    if not request.patterns and not inputs:
        raise ConfigError(
            f"no input files: use {request.input_flag}, or name the files of a source with --source NAME=PATTERN"
        )
    if request.patterns:
        inputs |= {item.url: item for item in find_inputs(request.patterns, request.suffixes)}
    layout = replace(request.layout, per_source=common.output_per_source)
    names = [UNKNOWN, *(source.name for source in (mixture.sources if mixture else ()))]
    raw_inputs = exclude_outputs(layout, inputs.values(), names)
    chosen = request.choose(sorted(raw_inputs, key=lambda item: item.url))
    sampling = Sampling()
    if mixture:
        sampling = mixture.sampling({name: [item.url for item in items] for name, items in source_inputs.items()})
        log_sampling(sampling, [item.url for item in chosen])
    bad_fraction = DEFAULT_BAD_FRACTION if common.max_bad_fraction is None else common.max_bad_fraction
    separator = _separator(common.separator, chosen)
    return PreprocessJob(
        inputs=tuple(chosen),
        layout=layout,
        tokenizer=request.tokenizer,
        seq_len=common.seqlen,
        kind=common.format,
        options=ReadOptions(common.content_key, separator),
        seed=common.seed,
        shuffle=not common.no_shuffle,
        sampling=sampling,
        mixture=mixture.record() if mixture else None,
        split_documents=common.split_documents,
        drop_tail=common.drop_tail,
        max_bad_fraction=1.0 if common.skip_bad_lines else bad_fraction,
        memory_limit=memory_limit(common.memory_limit),
        ray_address=common.ray_address,
        restart=common.restart,
        **request.running,
    )


def _check_flags(common: argparse.Namespace, mixture: Mixture | None) -> None:
    """Raise ConfigError for flags that exclude each other; warn about flags without effect."""
    from open_lm.errors import ConfigError, join_problems

    problems = []
    if common.dry_run and common.verify_tokenizer is not None:
        problems.append("--dry-run and --verify-tokenizer exclude each other")
    if common.skip_bad_lines and common.max_bad_fraction is not None:
        problems.append("--skip-bad-lines means --max-bad-fraction 1; use only one of them")
    if common.separator == "":
        problems.append("--separator must not be empty; leave it out to read each text file as one document")
    if common.output_per_source and mixture is None:
        problems.append("--output-per-source needs sources: use --source NAME=PATTERN or --mixture")
    if common.mixture_tokens is not None and not (mixture and mixture.rates):
        problems.append("--mixture-tokens needs a --mixture with rates")
    elif common.mixture_tokens is not None and common.output_per_source:
        problems.append(
            "--mixture-tokens and --output-per-source exclude each other: with one data set per source, the sources "
            "are mixed in training"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    if common.drop_tail and common.split_documents:
        warn_without_effect(["--drop-tail"], "--split-documents leaves no tail")


def exclude_outputs(layout: Layout, inputs: Iterable[InputFile], sources: Sequence[str]) -> list[InputFile]:
    """Return the inputs without shards in the output folders, which may be inside an input folder."""
    from open_lm import storage

    is_remote = storage.is_remote(layout.root)
    root = layout.root.rstrip("/") if is_remote else os.path.abspath(storage.local_path(layout.root))
    absolute = replace(layout, root=root)
    folders = {absolute.folder(name) for source in sources for name in absolute.folders_of(source)}
    return [item for item in inputs if not (item.url.endswith(".tar") and item.url.rpartition("/")[0] in folders)]


def memory_limit(text: str | None) -> int | None:
    """Return the value of --memory-limit in bytes; ConfigError if not even one worker fits."""
    from open_lm.datapreprocess.memory import plan_budget
    from open_lm.errors import ConfigError
    from open_lm.storage import parse_bytes

    if text is None:
        return None
    try:
        limit = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--memory-limit: {error}") from error
    plan_budget(limit, workers=1)  # raises ConfigError if not even one worker fits
    return limit


def _separator(text: str | None, inputs: Sequence[InputFile]) -> str | None:
    r"""Return the separator with its escapes, such as \n and \u2028, replaced."""
    from open_lm.datapreprocess.readers import separator_suffixes, uses_separator
    from open_lm.datapreprocess.readers.texts import decode_separator

    if text is None:
        return None
    if not any(uses_separator(item.url) for item in inputs):
        warn_without_effect(["--separator"], f"no input file ends in {' or '.join(separator_suffixes())}")
    return decode_separator(text, "--separator")


# --- mixtures ----------------------------------------------------------------------------------------------------


def _choose_mixture(request: Request) -> Mixture | None:
    """Return the command's default mixture with the files of --source, or the one from --mixture and --source."""
    from open_lm.datapreprocess.mixtures import choose_mixture, parse_sources
    from open_lm.errors import ConfigError

    common = request.common
    if request.mixture is None:
        return choose_mixture(common.mixture, common.source)
    if common.mixture is not None:
        raise ConfigError(
            f"--mixture {common.mixture} and --do_sample exclude each other: each of them selects a mixture"
        )
    return request.mixture.with_inputs(parse_sources(common.source))


def _sample_by_rate(job: PreprocessJob, request: Request, encoder: DocumentEncoder) -> PreprocessJob:
    """Set sampling factors that bring the sources of a single output to the rates of the mixture."""
    mixture = request.mixture
    if mixture is None or not mixture.rates or job.layout.per_source:
        return job
    from open_lm.datapreprocess.dry_run import estimate
    from open_lm.datapreprocess.mixtures import factors_for_rates
    from open_lm.errors import ConfigError

    if mixture.factors:
        raise ConfigError(
            f"{mixture.name}: has both rates and sampling_frequencies, and each decides how often documents are used; "
            "remove one of them, or write one data set per source (--output-per-source)"
        )
    tokens = {part.name: round(part.tokens) for part in estimate(job, encoder).sources}
    factors = factors_for_rates(tokens, mixture.rates, request.common.mixture_tokens)
    for name, factor in factors.items():
        _logger.info("mixture: about %s tokens of %s, used %.4g times", f"{tokens.get(name, 0):,}", name, factor)
    mixed = replace(mixture, factors=factors)
    sampling = replace(job.sampling, factors=factors)
    return replace(job, sampling=sampling, mixture=mixed.record())


def _training_flags(job: PreprocessJob, mixture: Mixture) -> list[str]:
    """Return the trainer flags that mix the data sets of the sources at the rates of the mixture."""
    from open_lm import storage
    from open_lm.data.shard_format import MANIFEST_NAME
    from open_lm.datapreprocess.mixtures import training_flags

    if len(job.layout.folders) > 1:
        _logger.warning(
            "no training flags for the rates of the mixture: they need one folder per source; use --num-consumers 1"
        )
        return []
    return training_flags(
        {name: storage.join(job.layout.root, name, MANIFEST_NAME) for name in job.sources}, mixture.rates
    )


# --- logging -----------------------------------------------------------------------------------------------------


def start_logging() -> None:
    """Log messages of this package to standard error, unless logging is already configured."""
    if not logging.getLogger().handlers and not logging.getLogger("open_lm").handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("open_lm").addHandler(handler)
        logging.getLogger("open_lm").setLevel(logging.INFO)


def warn_without_effect(flags: Sequence[str], reason: str) -> None:
    """Log a warning about flags that have no effect."""
    if flags:
        _logger.warning("%s: without effect: %s", ", ".join(flags), reason)
