"""Mixtures: sources of documents, and the rates at which training uses them.

A mixture is built in (MIXTURES) or defined in a YAML file:

    sources:
      - {source: wiki, markers: [wikipedia], rate: 90.91}       # files with a marker in their path
      - {source: web, inputs: ["s3://bucket/web/*.jsonl.zst"], rate: 9.09}     # or files that match patterns
    sampling_frequencies: {wiki: 2.5}     # factor: each document twice, and half of the documents a third time

A rate is a share of the training tokens, on any scale. There are two ways to apply rates: `training_flags` mixes one
data set per source during training; `factors_for_rates` repeats or drops documents during preprocessing. The second is
not available together with `sampling_frequencies`.
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
class MixtureSource:
    """A source of a mixture.

    Attributes:
        rate: share of the training tokens.
        markers: substrings of the paths of its files.
        inputs: paths or globs of its files.
    """

    name: str
    rate: float | None = None
    markers: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """Sources in order, and factors (source -> copies of each document; 1 for other sources).

    Either every source has a rate or none has.
    """

    name: str
    sources: tuple[MixtureSource, ...]
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        return {source.name: source.rate for source in self.sources if source.rate is not None}

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The input patterns of the sources that have them."""
        return {source.name: source.inputs for source in self.sources if source.inputs}

    def with_inputs(self, inputs: Mapping[str, Sequence[str]]) -> Mixture:
        """Return the mixture with additional input patterns; ConfigError for unknown sources."""
        names = [source.name for source in self.sources]
        unknown = [f"{name} is not a source of {self.name}{_hint(name, names)}" for name in inputs if name not in names]
        if unknown:
            raise ConfigError(join_problems(unknown))
        sources = (replace(item, inputs=(*item.inputs, *inputs.get(item.name, ()))) for item in self.sources)
        return replace(self, sources=tuple(sources))

    def sampling(self, listing: Mapping[str, Sequence[str]] | None = None) -> Sampling:
        """Return the sampling rules; `listing` maps sources to the files that match their `inputs`."""
        markers = {source.name: source.markers for source in self.sources}
        return Sampling.from_listing(listing or {}, markers, self.factors)

    def record(self) -> dict[str, Any]:
        """Return the JSON-serializable record of the mixture for dataset.json."""
        return {
            "name": self.name,
            "sources": [asdict(source) for source in self.sources],
            "factors": dict(self.factors),
        }


# --- built-in mixtures ------------------------------------------------------------------------------------------------
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
    return Mixture(name, tuple(MixtureSource(source, rate, markers[source]) for source, rate in rates.items()))


MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        # After Branch-Train-MiX (arXiv:2403.07816), with the rates of data/mixtures.py of github.com/jiasenlu/LL3M.
        _named("wikipedia_mixture", _DOLMA_MARKERS, cc_en=9.09, wiki=90.91),
        # Rates of data/mixtures.py of github.com/jiasenlu/LL3M. It lists "reddit" twice, with 6.94 and 2.10. Dolma's
        # table (arXiv:2402.00159) has Project Gutenberg at the position of the second, so 2.10 is used for books.
        _named(
            "dolma_mixture", _DOLMA_MARKERS,
            cc_en=46.23, stack=21.37, c4=16.19, reddit=6.94, peS2o=5.49, books=2.10, wiki=1.66,
        ),
        # RedPajama-1T was collected for the proportions of LLaMA (arXiv:2302.13971, table 1).
        _named(
            "redpajama", _RED_PAJAMA_MARKERS,
            common_crawl=67.0, c4=15.0, github=4.5, wikipedia=4.5, books=4.5, arxiv=2.5, stackexchange=2.0,
        ),
        # Proportions of SlimPajama-627B, from the table of https://huggingface.co/datasets/DKYoon/SlimPajama-6B. The
        # original files mix all sources; the markers match copies that are split by source.
        _named(
            "slimpajama", _RED_PAJAMA_MARKERS,
            common_crawl=52.2, c4=26.7, github=5.2, wikipedia=3.8, books=4.2, arxiv=4.6, stackexchange=3.3,
        ),
    )
}  # fmt: skip


def find_mixture(name: str) -> Mixture:
    """Return a built-in mixture by name, or load a YAML file; ConfigError for an unknown name."""
    if name in MIXTURES:
        return MIXTURES[name]
    if name.endswith((".yaml", ".yml")):
        return load_mixture(name)
    raise ConfigError(f"--mixture {name!r} is unknown{_hint(name, MIXTURES)}; or use a file that ends in .yaml")


def choose_mixture(name: str | None, source_flags: Sequence[str]) -> Mixture | None:
    """Return the mixture that --mixture and --source define together, or None without them."""
    inputs = parse_sources(source_flags)
    if name is not None:
        return find_mixture(name).with_inputs(inputs)
    sources = tuple(MixtureSource(key, inputs=value) for key, value in inputs.items())
    return Mixture("--source", sources) if sources else None


def parse_sources(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse NAME=PATTERN values to source -> patterns; ConfigError lists all invalid values."""
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
    """Load a mixture from a YAML file; ConfigError lists all problems of the file."""
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
    problems += [f"source {name} is defined twice" for name, count in names.items() if count > 1]
    problems += _rate_problems(sources)
    factors = _read_factors(content.get("sampling_frequencies"), names, problems)
    if problems:
        raise ConfigError(join_problems([f"{path}: {problem}" for problem in problems], "The mixture cannot be used"))
    return Mixture(path, tuple(sources), factors)


def _read_source(entry: Any, problems: list[str]) -> MixtureSource | None:
    """Return a source and append its problems to `problems`; None for an entry without a name."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        problems.append(f"expected {{source: NAME, markers: [text, …]}}, found {entry!r}")
        return None
    name, rate = entry["source"], entry.get("rate")
    source_problems = [*_unknown_keys(entry, _SOURCE_KEYS), *filter(None, [_name_problem(name)])]
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("markers", "inputs"):
        value = entry.get(key) or []
        lists[key] = tuple(value) if isinstance(value, list) else ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            source_problems.append(f"{key} must be a list of strings, found {value!r}")
    if rate is not None and not _is_number(rate, math.inf):
        source_problems.append(f"rate must be a number of at least 0, found {rate!r}")
        rate = 0
    problems += [f"source {name}: {problem}" for problem in source_problems]
    return MixtureSource(name, rate, **lists)


def _rate_problems(sources: Sequence[MixtureSource]) -> list[str]:
    without = [source.name for source in sources if source.rate is None]
    if len(without) == len(sources):
        return []
    if without:
        return [f"no rate for {', '.join(without)}; set rates for all sources or for none"]
    return [] if any(source.rate for source in sources) else ["every rate is 0"]


def _read_factors(value: Any, names: Iterable[str], problems: list[str]) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f'"sampling_frequencies" must map sources to factors, found {value!r}')
        return {}
    for name, factor in value.items():
        if name not in names and name != UNKNOWN:
            problems.append(
                f'sampling_frequencies contains {name}, which is not one of the "sources"{_hint(name, names)}'
            )
        if not _is_number(factor, _MAX_FACTOR):
            problems.append(f"the factor of {name} must be at least 0 and below {_MAX_FACTOR}, found {factor!r}")
    return value


def _unknown_keys(content: Mapping[Any, Any], known: Sequence[str]) -> list[str]:
    return [f"unknown key {key!r}{_hint(key, known)}" for key in content if key not in known]


def _name_problem(name: str) -> str:
    """Return the problem with a source name, which may become the name of an output folder; "" if it is valid."""
    if re.fullmatch(r"[^\s./\\=:*?\[]([^/\\=:*?\[\n\r\t]*\S)?", name):
        return ""
    return f"{name!r} is not a valid source name: it must not contain / \\ = : * ? [ or begin with a dot"


def _is_number(value: Any, end: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < end


def _hint(name: object, known: Iterable[str]) -> str:
    known = list(known)
    lower = {item.lower(): item for item in known}
    similar = [lower[item] for item in difflib.get_close_matches(str(name).lower(), lower)]
    return f" (did you mean {' or '.join(similar)}?)" * bool(similar) + f"; expected {', '.join(known)}" * bool(known)


# --- rates ------------------------------------------------------------------------------------------------------------
def factors_for_rates(
    tokens: Mapping[str, int], rates: Mapping[str, float], total_tokens: int | None = None
) -> dict[str, float]:
    """Return the factor of each source that makes the token shares equal to the rates.

    Args:
        tokens: source -> tokens of all its documents.
        total_tokens: tokens of the mixture. By default the maximum without repeating documents: the source with the
            fewest tokens relative to its rate is used exactly once.
    """
    problems = [
        f"{name}: its files contain {tokens[name]} tokens, but it has no rate" for name in tokens if name not in rates
    ]
    problems += [
        f"{name}: has rate {rate}, but no tokens" for name, rate in rates.items() if rate and not tokens.get(name)
    ]
    if total_tokens is not None and total_tokens < 1:
        problems.append(f"--mixture-tokens must be at least 1, found {total_tokens}")
    _raise_problems(problems)
    weights = {name: Fraction(str(rate)) for name, rate in rates.items()}
    copies = {name: weight / tokens[name] for name, weight in weights.items() if weight}
    scale = 1 / max(copies.values()) if total_tokens is None else Fraction(total_tokens) / sum(weights.values())
    most = max(copies, key=copies.__getitem__)
    if copies[most] * scale >= _MAX_FACTOR:
        raise ConfigError(
            f"--mixture-tokens {total_tokens} would repeat the {tokens[most]} tokens of {most} "
            f"{float(copies[most] * scale):.0f} times, the maximum is {_MAX_FACTOR}; use fewer tokens"
        )
    return {name: float(copies.get(name, 0) * scale) for name in rates}


def training_flags(manifests: Mapping[str, str], rates: Mapping[str, float]) -> list[str]:
    """Return the open_lm.main flags that mix data sets at the rates; `manifests` maps sources to manifest.jsonl."""
    problems = [f"{name}: has a data set, but no rate" for name in manifests if name not in rates]
    problems += [
        f"{name}: has rate {rate}, but no data set" for name, rate in rates.items() if rate and name not in manifests
    ]
    _raise_problems(problems)
    nonzero = {name: rate for name, rate in rates.items() if rate}
    weights = [str(rate) for rate in nonzero.values()]
    return ["--dataset-manifest", *(manifests[name] for name in nonzero), "--train-data-mix-weights", *weights]


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(join_problems(problems, "The rates of the mixture do not match its sources"))
