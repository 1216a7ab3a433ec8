"""Mixtures: sources of documents, and at which rates a training sees them.

A mixture is named (MIXTURES), or a YAML file of the user's own:

    sources:
      - {source: wiki, markers: [wikipedia], rate: 90.91}       # its files: those with a marker in their path
      - {source: web, inputs: ["s3://bucket/web/*.jsonl.zst"], rate: 9.09}     # or those that inputs stand for
    sampling_frequencies: {wiki: 2.5}     # factor: each document twice, and half of the documents a third time

A rate is a share of the training's tokens, on any scale. Two ways lead to it: `training_flags` mixes the data sets of
the sources while training, `factors_for_rates` repeats or leaves out documents in the preprocessor. With factors of
one's own only the first is open.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from open_lm import storage
from open_lm.datapreprocess.sampling import UNKNOWN, Sampling
from open_lm.errors import ConfigError, join_problems

_MAX_FACTOR = 1000
_FILE_KEYS = ("sources", "sampling_frequencies")
_SOURCE_KEYS = ("source", "rate", "markers", "inputs")


@dataclass(frozen=True)
class Source:
    """`rate`: share of the training's tokens; `markers`: substrings of its files' paths; `inputs`: files or globs."""

    name: str
    rate: float | None = None
    markers: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """Sources in their order; `factors`: source -> copies of each document, 1 where not named.

    Either every source has a rate or none has.
    """

    name: str
    sources: tuple[Source, ...]
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        return {source.name: source.rate for source in self.sources if source.rate is not None}

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The patterns of the sources that name their files."""
        return {source.name: source.inputs for source in self.sources if source.inputs}

    def with_inputs(self, inputs: Mapping[str, Sequence[str]]) -> Mixture:
        """With more patterns for its sources; a ConfigError lists those for sources that it lacks."""
        names = [source.name for source in self.sources]
        unknown = [f"{name} is no source of {self.name}{_hint(name, names)}" for name in inputs if name not in names]
        if unknown:
            raise ConfigError(join_problems(unknown))
        sources = (replace(item, inputs=(*item.inputs, *inputs.get(item.name, ()))) for item in self.sources)
        return replace(self, sources=tuple(sources))

    def sampling(self, listing: Mapping[str, Sequence[str]] | None = None) -> Sampling:
        """How its files are told apart and sampled; `listing`: source -> the files that its `inputs` stand for."""
        markers = {source.name: source.markers for source in self.sources}
        return Sampling.from_listing(listing or {}, markers, self.factors)

    def record(self) -> dict[str, Any]:
        """What a data set tells of its mixture, JSON-able."""
        return {
            "name": self.name,
            "sources": [asdict(source) for source in self.sources],
            "factors": dict(self.factors),
        }


# --- named mixtures ---------------------------------------------------------------------------------------------------
_DOLMA_MARKERS = {  # folders and file names of Dolma up to v1.6, https://huggingface.co/datasets/allenai/dolma
    "cc_en": ("cc_en",),
    "stack": ("/stack/", "stack-"),
    "c4": ("c4",),
    "reddit": ("reddit",),
    "peS2o": ("pes2o", "peS2o"),
    "books": ("books", "gutenberg"),
    "wiki": ("wiki",),
}
_RED_PAJAMA_MARKERS = {  # folders of https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T
    "common_crawl": ("common_crawl",),
    "c4": ("c4",),
    "github": ("github",),
    "wikipedia": ("wikipedia",),
    "books": ("book",),
    "arxiv": ("arxiv",),
    "stackexchange": ("stackexchange",),
}


def _named(name: str, markers: Mapping[str, tuple[str, ...]], **rates: float) -> Mixture:
    return Mixture(name, tuple(Source(source, rate, markers[source]) for source, rate in rates.items()))


MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        # After Branch-Train-MiX (arXiv:2403.07816), with the rates of data/mixtures.py of github.com/jiasenlu/LL3M.
        _named("wikipedia_mixture", _DOLMA_MARKERS, cc_en=9.09, wiki=90.91),
        # Rates of data/mixtures.py of github.com/jiasenlu/LL3M. "reddit" is there twice, with 6.94 and 2.10; the second
        # stands where Dolma's own table (arXiv:2402.00159) has the books of Project Gutenberg, and is taken for them.
        _named(
            "dolma_mixture", _DOLMA_MARKERS,
            cc_en=46.23, stack=21.37, c4=16.19, reddit=6.94, peS2o=5.49, books=2.10, wiki=1.66,
        ),
        # RedPajama-1T was collected for the proportions of LLaMA (arXiv:2302.13971, table 1).
        _named(
            "redpajama", _RED_PAJAMA_MARKERS,
            common_crawl=67.0, c4=15.0, github=4.5, wikipedia=4.5, books=4.5, arxiv=2.5, stackexchange=2.0,
        ),
        # Proportions of SlimPajama-627B as https://huggingface.co/datasets/DKYoon/SlimPajama-6B tabulates them. Its own
        # files hold all sources together; the markers fit copies that are parted by source.
        _named(
            "slimpajama", _RED_PAJAMA_MARKERS,
            common_crawl=52.2, c4=26.7, github=5.2, wikipedia=3.8, books=4.2, arxiv=4.6, stackexchange=3.3,
        ),
    )
}  # fmt: skip


def find_mixture(name: str) -> Mixture:
    """A mixture by its name, or from a YAML file; a ConfigError lists the valid names."""
    if name in MIXTURES:
        return MIXTURES[name]
    if name.endswith((".yaml", ".yml")):
        return load_mixture(name)
    raise ConfigError(f"no mixture is called {name!r}{_hint(name, MIXTURES)}; or give a file ending in .yaml")


def choose_mixture(name: str | None, source_flags: Sequence[str]) -> Mixture | None:
    """What --mixture and the values of --source together say; None where nothing is named."""
    inputs = parse_sources(source_flags)
    if name is not None:
        return find_mixture(name).with_inputs(inputs)
    return Mixture("--source", tuple(Source(key, inputs=value) for key, value in inputs.items())) if inputs else None


def parse_sources(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Source -> patterns, from values NAME=PATTERN; a ConfigError lists all that are none."""
    found: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for value in values:
        name, _, pattern = value.partition("=")
        if not pattern:
            problems.append(f"--source {value}: expected NAME=PATTERN, such as wiki='data/wiki/*.jsonl.zst'")
        elif problem := _name_problem(name):
            problems.append(f"--source {value}: {problem}")
        else:
            found[name] = (*found.get(name, ()), pattern)
    if problems:
        raise ConfigError(join_problems(problems))
    return found


# --- YAML -------------------------------------------------------------------------------------------------------------
def load_mixture(path: str) -> Mixture:
    """Read a mixture's YAML; a ConfigError lists everything that is wrong with it."""
    import yaml

    try:
        content = yaml.safe_load(storage.read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f'{path}: expected "sources", a list of {{source, markers or inputs, rate}}, found {content!r}'
        )
    problems = _unknown_keys(content, _FILE_KEYS)
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        problems.append(f'"sources" must be a list of {{source, markers or inputs, rate}}, found {entries!r}')
        entries = []
    sources = [source for entry in entries if (source := _read_source(entry, problems))]
    names = Counter(source.name for source in sources)
    problems += [f"source {name} is there twice" for name, count in names.items() if count > 1]
    problems += _rate_problems(sources)
    factors = _read_factors(content.get("sampling_frequencies"), names, problems)
    if problems:
        raise ConfigError(join_problems([f"{path}: {problem}" for problem in problems], "The mixture cannot be used"))
    return Mixture(path, tuple(sources), factors)


def _read_source(entry: Any, problems: list[str]) -> Source | None:
    """A source; what is wrong with it is added to the problems, None where it has no name."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        problems.append(f"expected {{source: NAME, markers: [text, …]}}, found {entry!r}")
        return None
    name, rate = entry["source"], entry.get("rate")
    found = [*_unknown_keys(entry, _SOURCE_KEYS), *filter(None, [_name_problem(name)])]
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("markers", "inputs"):
        value = entry.get(key) or []
        lists[key] = tuple(value) if isinstance(value, list) else ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            found.append(f"{key} must be a list of texts, found {value!r}")
    if rate is not None and not _is_number(rate, math.inf):
        found.append(f"rate must be a number from 0 up, found {rate!r}")
        rate = 0
    problems += [f"source {name}: {problem}" for problem in found]
    return Source(name, rate, **lists)


def _rate_problems(sources: Sequence[Source]) -> list[str]:
    without = [source.name for source in sources if source.rate is None]
    if len(without) == len(sources):
        return []
    if without:
        return [f"{', '.join(without)}: without a rate; give every source one, or none"]
    return [] if any(source.rate for source in sources) else ["every rate is 0"]


def _read_factors(value: Any, names: Iterable[str], problems: list[str]) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f'"sampling_frequencies" must map sources to factors, found {value!r}')
        return {}
    for name, factor in value.items():
        if name not in names and name != UNKNOWN:
            problems.append(f'sampling_frequencies names {name}, which is not among the "sources"{_hint(name, names)}')
        if not _is_number(factor, _MAX_FACTOR):
            problems.append(f"the factor of {name} must be a number from 0 up, below {_MAX_FACTOR}, found {factor!r}")
    return value


def _unknown_keys(content: Mapping[Any, Any], known: Sequence[str]) -> list[str]:
    return [f"{key!r} is no key here{_hint(key, known)}" for key in content if key not in known]


def _name_problem(name: str) -> str:
    """What is wrong with the name of a source, which may name a folder of the output; empty where nothing is."""
    if re.fullmatch(r"[^\s./\\=:*?\[]([^/\\=:*?\[\n\r\t]*\S)?", name):
        return ""
    return f"{name!r} cannot name a source: expected a text without / \\ = : * ? [ that begins with no dot"


def _is_number(value: Any, end: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < end


def _hint(name: object, known: Iterable[str]) -> str:
    known = list(known)
    lower = {item.lower(): item for item in known}
    near = [lower[item] for item in difflib.get_close_matches(str(name).lower(), lower)]
    return f" (did you mean {' or '.join(near)}?)" * bool(near) + f"; there are {', '.join(known)}" * bool(known)


# --- rates ------------------------------------------------------------------------------------------------------------
def factors_for_rates(
    tokens: Mapping[str, int], rates: Mapping[str, float], total_tokens: int | None = None
) -> dict[str, float]:
    """The factor of each source that brings the shares of the tokens to the rates.

    Args:
        tokens: source -> tokens of all its documents, taken once.
        total_tokens: tokens of the mixture; by default as many as it can have with no document taken twice, so that
            the source that is scarcest for its rate is taken exactly once.
    """
    problems = [
        f"{name}: its files hold {tokens[name]} tokens, and it has no rate" for name in tokens if name not in rates
    ]
    problems += [
        f"{name}: has rate {rate}, and no tokens" for name, rate in rates.items() if rate and not tokens.get(name)
    ]
    if total_tokens is not None and total_tokens < 1:
        problems.append(f"the tokens of a mixture must be at least 1, found {total_tokens}")
    _stop_for(problems)
    weights = {name: Fraction(str(rate)) for name, rate in rates.items()}
    copies = {name: weight / tokens[name] for name, weight in weights.items() if weight}
    scale = 1 / max(copies.values()) if total_tokens is None else Fraction(total_tokens) / sum(weights.values())
    most = max(copies, key=copies.__getitem__)
    if copies[most] * scale >= _MAX_FACTOR:
        raise ConfigError(
            f"{total_tokens} tokens of the mixture would repeat the {tokens[most]} tokens of {most} "
            f"{float(copies[most] * scale):.0f} times, the most is {_MAX_FACTOR}: ask for fewer tokens"
        )
    return {name: float(copies.get(name, 0) * scale) for name in rates}


def training_flags(manifests: Mapping[str, str], rates: Mapping[str, float]) -> list[str]:
    """The flags of open_lm.main that mix data sets at the rates; `manifests`: source -> its manifest.jsonl."""
    problems = [f"{name}: has a data set, and no rate" for name in manifests if name not in rates]
    problems += [
        f"{name}: has rate {rate}, and no data set" for name, rate in rates.items() if rate and name not in manifests
    ]
    _stop_for(problems)
    used = {name: rate for name, rate in rates.items() if rate}
    weights = [str(rate) for rate in used.values()]
    return ["--dataset-manifest", *(manifests[name] for name in used), "--train-data-mix-weights", *weights]


def _stop_for(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(join_problems(problems, "The rates of the mixture do not fit its sources"))
