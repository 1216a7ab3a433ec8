"""Registries: the names that a flag accepts, and the objects behind them. Imports no torch.

An entry is declared once, next to the object that it names:

    @NORMS.register("rms_norm", help="root mean square, with a gain", parameters=("weight",))
    class RmsNorm(nn.Module): ...

or, for an object that is defined elsewhere, `NORMS.register("name", help="...")(obj)`.

Names, help texts and facts are read from the source code of the registry's package. Nothing is imported for that, so
--help, the checks and the planner need no torch, and a new file in the package needs no other edit. `Registry.get`
imports the module that declares an entry. A module outside the package adds its entries when it is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from open_lm.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A name of a registry, its declaring module, its help text and its facts (see the registries below)."""

    name: str
    module: str
    help: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """The entries that one flag accepts.

    Args:
        symbol: the name of the variable that holds this registry, under which the source code refers to it.
        flag: the flag whose values are the entries' names, for error messages.
        package: the package whose modules declare the entries.
        default: the entry that is listed first. The others follow in the order of files and lines.

    `objects` holds the objects of all modules imported so far, by name.
    """

    def __init__(self, symbol: str, flag: str, package: str, default: str | None = None) -> None:
        self.flag = flag
        self.objects: dict[str, Any] = {}
        self._symbol, self._package, self._default = symbol, package, default
        self._registered: dict[str, Entry] = {}

    def register(self, name: str, *, help: str = "", **facts: Any) -> Callable[[T], T]:
        """Return a decorator that adds an object. Inside the package all arguments must be literals."""

        def add(obj: T) -> T:
            module = sys._getframe(1).f_globals["__name__"]
            earlier = self._registered.get(name)
            if earlier is not None and earlier.module != module:
                raise ValueError(f"{self._symbol}: both {earlier.module} and {module} register {name!r}")
            self._registered[name] = Entry(name, module, help, facts)
            self.objects[name] = obj
            return obj

        return add

    def entries(self) -> dict[str, Entry]:
        """Return all entries by name: the declared ones, then those that other modules registered."""
        entries = {**_declarations(self._package).get(self._symbol, {})}
        for name in self.objects:
            entries.setdefault(name, self._registered.get(name, Entry(name, "")))
        if self._default in entries:
            entries = {self._default: entries.pop(self._default), **entries}
        return entries

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.entries()

    def __len__(self) -> int:
        return len(self.entries())

    def entry(self, name: str | None) -> Entry:
        """Return the entry of that name. Raise ConfigError with the valid names if there is none."""
        declared = _declarations(self._package).get(self._symbol, {})
        if name in declared:  # without a copy of all entries: the planner asks for facts many thousand times
            return declared[name]
        entries = self.entries()
        if name not in entries:
            raise ConfigError(f"{self.flag}: found {name!r}, expected one of {', '.join(entries)}")
        return entries[name]

    def get(self, name: str | None) -> Any:
        """Import the module that declares an entry and return its object. Raise ConfigError for an unknown name."""
        entry = self.entry(name)
        if entry.name not in self.objects:
            importlib.import_module(entry.module)
        if entry.name not in self.objects:
            raise RuntimeError(f"importing {entry.module} does not register {name!r} in {self._symbol}")
        return self.objects[entry.name]

    def fact(self, name: str, fact: str, default: Any = None) -> Any:
        """Return a fact of an entry, or `default` if the entry does not declare it."""
        return self.entry(name).facts.get(fact, default)

    def required_fact(self, name: str, fact: str) -> Any:
        """Return a fact of an entry. Raise ConfigError if the entry does not declare it."""
        entry = self.entry(name)
        if fact not in entry.facts:
            raise ConfigError(
                f"{self.flag} {name}: {entry.module} does not declare the fact {fact!r}, which the planner requires; "
                f"add {fact}=... to {self._symbol}.register({name!r})"
            )
        return entry.facts[fact]

    def summary(self) -> str:
        """Return the names with their help texts on one line, or "" if there are no help texts."""
        by_help: dict[str, list[str]] = {}
        for name, entry in self.entries().items():
            by_help.setdefault(entry.help, []).append(name)
        return "; ".join(f"{', '.join(names)} ({text})" for text, names in by_help.items() if text)


@functools.cache
def _declarations(package: str) -> dict[str, dict[str, Entry]]:
    """Return the entries that a package's modules declare, by the variable of their registry and by name."""
    spec = importlib.util.find_spec(package)
    (folder,) = (spec and spec.submodule_search_locations) or ("",)
    found: dict[str, dict[str, Entry]] = {}
    for path in sorted(Path(folder).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not all(part.isidentifier() for part in parts):
            continue  # not a module, such as an editor's backup copy
        module = ".".join([package, *parts]).removesuffix(".__init__")
        for symbol, entry in _entries_in(path, module):
            others = found.setdefault(symbol, {})
            if entry.name in others:
                raise ValueError(f"{symbol}: both {others[entry.name].module} and {module} register {entry.name!r}")
            others[entry.name] = entry
    return found


def _entries_in(path: Path, module: str) -> Iterator[tuple[str, Entry]]:
    source = path.read_text(encoding="utf-8")
    if ".register(" not in source:
        return
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}; fix or remove this file") from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        symbol = _registry_symbol(call)
        if symbol is None:
            continue
        try:
            (name,) = (ast.literal_eval(value) for value in call.args)
            literals = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        except ValueError as error:
            raise ValueError(f"{path}, line {call.lineno}: arguments of {symbol}.register must be literals") from error
        yield symbol, Entry(name, module, literals.pop("help", ""), literals)


def _registry_symbol(call: ast.Call) -> str | None:
    """Return the name of the registry if `call` is `REGISTRY.register(...)` or `module.REGISTRY.register(...)`."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "register":
        return None
    owner = function.value
    symbol = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return symbol if isinstance(globals().get(symbol), Registry) else None


# Facts that the entries of every registry may declare, as tuples of settings (fields of sections.py):
#   requires: settings that must be given with this entry.
#   uses: further settings that this entry uses. With an entry that neither requires nor uses a setting that another
#   entry of its registry does, the setting is reported as having no effect.

# Factories `norm(width, eps=...) -> Module`, whose gain is its weight, or its sum with the attribute `gain_offset`, and
# starts at 1. Facts, for the planner: parameters (names of the vectors of size `width`),
# computes_in ("float32": always, and the output is multiplied by the gain separately; "autocast": in the type of
# autocast; default: in the type that torch's layer norm has).
NORMS = Registry("NORMS", "--model-norm", "open_lm.model", default="default_layer_norm")
# Factories `feed_forward(dim, hidden_dim, bias) -> Module`. Facts: hidden (the default of hidden_dim: "gated" for
# `gated_width(dim)`, "4x" for 4 dim), inputs (matrices D -> F, by name, with the number of hidden widths that each
# returns), outputs (names of the matrices F -> D), bias (the default of bias; without the fact: no bias).
FEED_FORWARDS = Registry("FEED_FORWARDS", "--ffn-type", "open_lm.model", default="swiglu")
# Factories `embedding(head_width, rope: RopeSettings) -> Module`. Facts: rotates (whether features are rotated in
# pairs, so that their number must be even; default for the planner: yes), by_head (whether angles depend on the head,
# so that queries and keys must have the same heads; default: no).
POSITIONAL_EMBEDDINGS = Registry(
    "POSITIONAL_EMBEDDINGS", "--positional-embedding-type", "open_lm.model", default="rotary"
)
# Functions `scale(frequencies, base, parameters, lengths) -> (frequencies, factor of cos and sin)`, the types of
# `rope_frequency_scaling`. Facts: required and optional (names of the parameters), by_length (whether the frequencies
# depend on the length of a sequence; default: no).
ROPE_SCALINGS = Registry("ROPE_SCALINGS", "rope_frequency_scaling", "open_lm.model")
# Attention functions with the interface of model/attention.py. Facts: deterministic (default: yes), whole_sequences
# (whether sequences cannot be split over ranks; default: no), options (whether torch's kernels may replace the function
# in layers with a window, soft cap, other scale or dropout; default: yes).
ATTENTION = Registry("ATTENTION", "--attn-name", "open_lm.model", default="auto")
# Functions `activation(scores) -> weights` for --attn-name custom_attn.
ATTENTION_ACTIVATIONS = Registry("ATTENTION_ACTIVATIONS", "--attn-activation", "open_lm.model")
# Functions `length(number of keys) -> length` for --attn-name custom_attn.
ATTENTION_LENGTHS = Registry("ATTENTION_LENGTHS", "--attn-seq-scalar", "open_lm.model")
# Functions `build(model, cfg: OptimConfig) -> Optimizer`. Facts: moments (names of the state tensors that have the
# shape of their parameter; required by the planner), scalars (names of the other state of a parameter), matrix_moments
# (the state of matrices inside blocks, if it differs), orthogonal (whether the updates of these matrices are made
# orthogonal, with the work divided among the ranks).
OPTIMIZERS = Registry("OPTIMIZERS", "--optimizer", "open_lm.optim", default="adamw")
# Functions `build(optimizer, cfg: OptimConfig, total_steps, cooldown_start) -> Schedule`. Facts: decay_length (the
# setting that defines how long the decay at the end takes).
SCHEDULES = Registry("SCHEDULES", "--lr-scheduler", "open_lm.optim", default="cosine")
# Functions `shape(progress) -> remaining fraction` for --lr-scheduler wsd.
DECAY_SHAPES = Registry("DECAY_SHAPES", "--lr-decay-shape", "open_lm.optim", default="1-sqrt")
# Functions `divergence(chunk: Chunk) -> (values, gradient)`, see kernels/divergences.py. Facts: cached (whether the
# loss can be computed from stored samples of the teacher's distribution; default: no).
DISTILL_LOSSES = Registry("DISTILL_LOSSES", "--distill-loss", "open_lm.kernels", default="forward-kl")
# Functions `open(cfg: LoggingConfig, paths: RunPaths, params, start_step) -> MetricLogger`. Facts: in_all (whether
# `--report-to all` includes the logger; default: yes).
LOGGERS = Registry("LOGGERS", "--report-to", "open_lm.monitor")
# Functions `reward(prompts, completions, **columns) -> rewards`, see finetune/rewards.py.
REWARDS = Registry("REWARDS", "--reward", "open_lm.finetune")
# Functions `parse(record) -> messages`. Facts: keys (keys of a record in this form; "a|b" for either).
CONVERSATION_FORMS = Registry("CONVERSATION_FORMS", "--form", "open_lm.finetune")
# Laws of the loss, see scaling/laws.py.
SCALING_LAWS = Registry("SCALING_LAWS", "--law", "open_lm.scaling")
# Functions `launch(missing runs, args)`, see scaling/run_command.py.
LAUNCHERS = Registry("LAUNCHERS", "--launcher", "open_lm.scaling", default="local")
