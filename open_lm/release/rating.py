"""Rate the openness of a release by the rules of the Model Openness Tool.

A class counts the components that it requires and that have an open license: the component's own, else the global one
of its kind, else that of the distribution. A research paper is accepted as technical report as well. `raw` is the share
of the class's components, and `progress` the number that the tool shows: 0 until the class below is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from open_lm.release.components import (
    CLASS_NAMES,
    CLASSES,
    CODE,
    COMPONENTS,
    DATA,
    DOCUMENT,
    RESEARCH_PAPER,
    ROMAN,
    TECHNICAL_REPORT,
    Component,
    required_components,
)
from open_lm.release.licenses import UNLICENSED, fitting_kinds, is_open, suggestion
from open_lm.release.mof_file import DISTRIBUTION, Entry, GlobalLicense, Release

_PLURALS = {CODE: "code", DATA: "data", DOCUMENT: "documents"}
_ORIGINS = {DISTRIBUTION: "of the distribution", **{kind: f"of all {name}" for kind, name in _PLURALS.items()}}
OPEN, CLOSED, NO_LICENSE, MISSING = "open", "not open", "unlicensed", "missing"


@dataclass(frozen=True)
class RatedComponent:
    """A component with its license.

    Attributes:
        status: OPEN, CLOSED, NO_LICENSE or MISSING.
        license: SPDX id; None if there is none.
        source: where the license is given: "component", its kind or "distribution".
        fits: whether the license is open and was written for this kind of component.
    """

    component: Component
    status: str
    license: str | None = None
    source: str | None = None
    fits: bool = False

    @property
    def warning(self) -> str | None:
        """The reason why the component has no open license of its kind; None if it has one or is missing."""
        name, kind = self.component.name, self.component.kind
        if self.status == NO_LICENSE:
            return f"{name} has no license"
        if self.status == CLOSED:
            return f"{name}: {self.license!r} is not an open license{suggestion(self.license or '')}"
        if self.status == OPEN and not self.fits:
            return f"{name}: {self.license} is open, but not written for {_PLURALS[kind]}; use one that is"
        return None


@dataclass(frozen=True)
class Rating:
    """The openness of a release.

    Attributes:
        level: 1, 2 or 3 for classes I, II, III; 0 for none.
        raw, progress: percentages by class, rounded to integers.
        missing: names of the required components without an open license, by class.
        components: all 17 components.
        counts: numbers of components and licenses.
    """

    level: int
    raw: Mapping[int, int]
    progress: Mapping[int, int]
    missing: Mapping[int, tuple[str, ...]]
    components: tuple[RatedComponent, ...]
    counts: Mapping[str, int]

    @property
    def warnings(self) -> list[str]:
        return [rated.warning for rated in self.components if rated.warning is not None]


def rate(release: Release, absent: Collection[str] = ()) -> Rating:
    """Return the rating of a release. Components of the names `absent` count as missing."""
    entries = {entry.name: entry for entry in release.entries if entry.name not in absent}
    rated = {
        name: _rate_component(component, entries.get(name), release.licenses) for name, component in COMPONENTS.items()
    }
    opened = {name for name, item in rated.items() if item.status == OPEN}
    raw, progress, missing = {}, {}, {}
    level, is_complete = 0, True
    for number in CLASSES:
        names, remaining = _requirements(number, opened)
        missing[number] = tuple(remaining)
        raw[number] = _percent(len(names) - len(remaining), len(names))
        progress[number] = raw[number] if is_complete else 0
        is_complete = is_complete and not remaining
        level = number if is_complete else level
    return Rating(level, raw, progress, missing, tuple(rated.values()), _counts(entries.values(), rated, release))


def _rate_component(
    component: Component, entry: Entry | None, global_licenses: Mapping[str, GlobalLicense]
) -> RatedComponent:
    if entry is None:
        return RatedComponent(component, MISSING)
    license_id, source = resolve_license(component, entry, global_licenses)
    if license_id is None:
        return RatedComponent(component, NO_LICENSE)
    if not is_open(license_id):
        return RatedComponent(component, CLOSED, license_id, source)
    return RatedComponent(component, OPEN, license_id, source, component.kind in fitting_kinds(license_id))


def resolve_license(
    component: Component, entry: Entry, global_licenses: Mapping[str, GlobalLicense]
) -> tuple[str | None, str | None]:
    """Return the license of a component and where it is given: "component", its kind or "distribution".

    Both are None without a license, also where the component's own is "unlicensed".
    """
    if entry.license is not None:
        return (None, None) if entry.license in ("", UNLICENSED) else (entry.license, "component")
    for scope in (component.kind, DISTRIBUTION):
        name = global_licenses.get(scope, GlobalLicense()).name
        if name:
            return (None, None) if name == UNLICENSED else (name, scope)
    return None, None


def _requirements(level: int, opened: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names of the components that a class requires, and those of them that are not open.

    The paper takes the place of a report that is not open. In class I, which requires the paper itself, the report is
    then not required.
    """
    names = [component.name for component in required_components(level)]
    if TECHNICAL_REPORT not in opened and RESEARCH_PAPER in opened:
        names.remove(TECHNICAL_REPORT)
        if RESEARCH_PAPER not in names:
            names.append(RESEARCH_PAPER)
    return names, [name for name in names if name not in opened]


def _percent(part: int, total: int) -> int:
    """Return a percentage, rounded half up."""
    return (200 * part + total) // (2 * total)


def _counts(entries: Iterable[Entry], rated: Mapping[str, RatedComponent], release: Release) -> dict[str, int]:
    included = list(entries)
    statuses = [rated[entry.name].status for entry in included]
    return {
        "components": len(included),
        "global_licenses": sum(1 for item in release.licenses.values() if item.name),
        "component_licenses": sum(1 for entry in included if entry.license),
        "valid": statuses.count(OPEN),
        "invalid": statuses.count(CLOSED),
        "unlicensed": statuses.count(NO_LICENSE),
        "of_fitting_kind": sum(rated[entry.name].fits for entry in included),
    }


def rating_json(rating: Rating) -> dict[str, Any]:
    """Return a rating as JSON: class, progress and raw (percentages by class), counts, components, warnings."""
    return {
        "class": rating.level,
        "progress": {str(number): rating.progress[number] for number in sorted(CLASSES)},
        "raw": {str(number): rating.raw[number] for number in sorted(CLASSES)},
        "missing": {str(number): list(rating.missing[number]) for number in sorted(CLASSES)},
        "counts": dict(rating.counts),
        "components": [
            {"name": item.component.name, "status": item.status, "license": item.license, "license_from": item.source}
            for item in rating.components
        ],
        "warnings": rating.warnings,
    }


def rating_lines(rating: Rating) -> list[str]:
    """Return a rating as lines of text: class, progress, components with licenses, warnings."""
    lines = [f"{CLASS_NAMES[rating.level]}"]
    listed: set[str] = set()  # each missing component is listed with the first class that requires it
    for number in CLASSES:
        below = "" if rating.progress[number] == rating.raw[number] else f" ({rating.raw[number]} % of its components)"
        missing = [name for name in rating.missing[number] if name not in listed]
        listed.update(missing)
        reason = f"; without an open license: {', '.join(missing)}" if missing else ""
        lines.append(f"  Class {ROMAN[number]:<4}{rating.progress[number]:>3} %{below}{reason}")
    width = max(map(len, COMPONENTS))
    lines.append("components:")
    for item in rating.components:
        origin = f" ({_ORIGINS[item.source]})" if item.source in _ORIGINS else ""
        lines.append(f"  {item.component.name:<{width}}  {item.status:<10}  {item.license or ''}{origin}".rstrip())
    return lines + [f"warning: {text}" for text in rating.warnings]
