"""Compare the versions of installed packages: with the tested ones, with each other and with known-bad pairs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from open_lm.cli.doctor_findings import ERROR, NOTE, OK, WARNING, Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

TESTED_VERSIONS = Path(__file__).with_name("tested_versions.txt")
CORE = "core"
# Packages with compiled code for one release of torch: with another one, importing or calling them crashes.
_BUILT_FOR_TORCH = frozenset({"torchvision", "torchaudio", "xformers", "triton", "flash-attn"})


@dataclass(frozen=True)
class BadPair:
    """A combination of versions that is known not to work.

    Attributes:
        versions: specifier of each distribution; the pair applies if all are installed in such versions. `python` is
            Python itself.
        reason: what happens. advice: how to avoid it. source: where that is documented.
    """

    versions: Mapping[str, str]
    status: str
    reason: str
    advice: str
    source: str


_AO_SOURCE = "torchao's table of compatible releases, github.com/pytorch/ao/issues/2919"
_AO_REASON = "torchao was built for another torch: its compiled operators are left out, and its import may abort"
BAD_PAIRS = (
    BadPair(
        {"torch": "<2.3", "numpy": ">=2"}, ERROR,
        "this torch was compiled for NumPy 1 and cannot exchange arrays with NumPy 2",
        "install torch>=2.7, which the package needs anyway, or numpy<2", "release notes of torch 2.3",
    ),
    BadPair(
        {"torch": "<2.8"}, NOTE,
        "the destructor of a gloo process group may deadlock; the trainer keeps destroyed groups until it exits",
        "in programs of your own, keep a reference to destroyed groups", "open_lm/distributed/processes.py",
    ),
    BadPair({"torch": "<2.8", "torchao": ">=0.13"}, WARNING, _AO_REASON, "install torchao 0.12", _AO_SOURCE),
    BadPair({"torch": "==2.8.*", "torchao": "!=0.13.*"}, WARNING, _AO_REASON, "install torchao 0.13", _AO_SOURCE),
    BadPair({"torch": "==2.9.*", "torchao": "<0.14.1"}, WARNING, _AO_REASON, "install torchao 0.15.0", _AO_SOURCE),
    BadPair({"torch": ">=2.10", "torchao": "<0.15.1"}, WARNING, _AO_REASON, "install a newer torchao", _AO_SOURCE),
    BadPair(
        {"setuptools": ">=81", "llm-foundry": ">=0"}, ERROR,
        "llm-foundry imports pkg_resources, which setuptools 81 removed", "install setuptools<81",
        "requirements/eval.in",
    ),
    BadPair(
        {"python": "<3.12.3", "torch": ">=2"}, NOTE,
        "torch's own torchrun refuses the trainer's --logs as ambiguous",
        "use `open-lm launch`, or `python -m open_lm.utils.torchrun` in place of torchrun",
        "github.com/pytorch/pytorch/issues/120601",
    ),
)  # fmt: skip


def check_packages(installed: Callable[[str], str | None] | None = None) -> Iterator[Finding]:
    """Yield the findings about versions; `installed` returns the version of a distribution, None if it is absent."""
    version_of = installed or installed_version
    try:
        from packaging.specifiers import SpecifierSet  # noqa: F401 (a requirement of many packages, not of this one)
    except ImportError:
        yield Finding("packages", "versions", NOTE, "not compared: the package `packaging` is not installed")
        return
    yield from _own_requirements(version_of)
    yield from _conflicts(version_of)
    yield from bad_pairs(version_of)


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or of Python, or None."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def bad_pairs(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield a finding for each known-bad combination that is installed."""
    from packaging.specifiers import SpecifierSet

    for pair in BAD_PAIRS:
        found = {name: version_of(name) for name in pair.versions}
        if all(
            version is not None and SpecifierSet(pair.versions[name]).contains(version, prereleases=True)
            for name, version in found.items()
        ):
            versions = " with ".join(f"{name} {version}" for name, version in found.items())
            advice = f"{pair.advice} ({pair.source})"
            yield Finding("packages", "known problem", pair.status, f"{versions}: {pair.reason}", advice)


def tested_versions() -> dict[str, str]:
    """Return the versions that are tested together on this Python, by the name of the distribution."""
    from packaging.requirements import Requirement

    versions = {}
    for line in TESTED_VERSIONS.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith(("#", " ", "-")):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                versions[_normalized(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return versions


def _own_requirements(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield the packages that this distribution needs, and those of its extras that are installed."""
    tested = tested_versions()
    for name, (requirement, extras) in _requirements_by_name().items():
        version = version_of(name)
        if version is None:
            if CORE in extras:
                yield Finding("packages", name, ERROR, "not installed", f'pip install "{requirement}"')
            continue
        known = tested.get(_normalized(name))
        note = "" if known in (None, version.partition("+")[0]) else f" (tested with {known})"
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding("packages", name, NOTE if note else OK, f"{version}{note}")
        else:
            status = ERROR if CORE in extras else WARNING
            text = f"{version}, expected {requirement.specifier}{note}"
            yield Finding("packages", name, status, text, f'pip install "{name}{requirement.specifier}"')


def _requirements_by_name() -> dict[str, tuple[Requirement, list[str]]]:
    """Return each requirement of this distribution, with the extras that have it; `CORE` for none."""
    from packaging.requirements import Requirement

    result: dict[str, tuple[Requirement, list[str]]] = {}
    extras = [
        name for name in metadata.metadata("open_lm").get_all("Provides-Extra") or () if name not in ("dev", "eval")
    ]
    for line in metadata.requires("open_lm") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        having = [CORE] if marker is None or marker.evaluate({"extra": ""}) else []
        having += [name for name in extras if marker is not None and marker.evaluate({"extra": name})]
        if having:
            result.setdefault(requirement.name, (requirement, having))
    return result


def _conflicts(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield each installed package, among those this one needs directly or not, whose own requirements are not met."""
    from packaging.requirements import Requirement

    pending, seen = list(_requirements_by_name()) + sorted(_BUILT_FOR_TORCH), set()
    while pending:
        name = _normalized(pending.pop())
        if name in seen or version_of(name) is None:
            continue
        seen.add(name)
        for line in metadata.requires(name) or () if installed_version(name) is not None else ():
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = version_of(requirement.name)
            pending.append(requirement.name)
            if version is not None and requirement.specifier.contains(version, prereleases=True):
                continue
            built_for = name in _BUILT_FOR_TORCH and _normalized(requirement.name) == "torch"
            text = (
                f"{name} {version_of(name)} needs {requirement.name}{requirement.specifier}, found {version or 'none'}"
            )
            advice = f"install a {name} that was built for this torch" if built_for else f'pip install "{line}"'
            yield Finding("packages", "conflict", ERROR if built_for else WARNING, text, advice)


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
