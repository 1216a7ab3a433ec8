"""Whether a saved position still means something on the data of now, and how a run goes on where some of it changed.

A state is what `Plan.state` gives: for each source a fingerprint, its share, and its position. Pure functions of such
states; `provenance.py` tells the same in terms of shards and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_lm.errors import DataError, join_problems

State = dict[str, Any]
_POSITION = ("pass", "visit", "offset", "samples")
_PARTS = (
    "the names, order or upsampling factors of its shards",
    "the numbers of sequences of its shards",
    "the sha256 of its shards",
    "the dataset.json beside its shards",
)


def continued(saved: State, fresh: State, names: Sequence[str], allow_changed: bool = False) -> tuple[State, str]:
    """The state to go on from, and what the user must know about it ("" where nothing has changed).

    `fresh` is the state at the beginning of the data of now, whose sources are called `names`. Where the data or its
    order changed: DataError with all changes, or with `allow_changed` a state in which every source that is still the
    same stands where it was, all others at their beginning, and shares are counted from here.
    """
    matches = match_sources(saved, fresh)
    changes = _changes(saved, fresh, names, matches)
    if changes and not allow_changed:
        advice = "restore it, begin a new run from its weights, or give --allow-changed-data"
        raise DataError(join_problems(changes, f"The training data is not that of the checkpoint ({advice})"))
    streams = [int(source.get("stream", number)) for number, source in enumerate(saved["sources"])]
    unused = max(streams, default=-1) + 1
    sources = []
    for source, match in zip(fresh["sources"], matches, strict=True):
        if match is None:
            sources.append({**source, "stream": unused})
            unused += 1
        else:
            position = {name: int(saved["sources"][match][name]) for name in _POSITION}
            sources.append({**source, **position, "stream": streams[match]})
        if changes:
            sources[-1]["samples"] = 0
    notice = _notice(changes, names, sources, matches) if changes else ""
    return {**fresh, "seed": int(saved["seed"]), "sources": sources}, notice


def match_sources(saved: State, fresh: State) -> list[int | None]:
    """For each source of now its number in the saved state, None for one that was not there or is not the same."""
    if _order_of(saved) != _order_of(fresh):
        return [None] * len(fresh["sources"])  # a position in one order says nothing about another
    left = dict(enumerate(saved["sources"]))
    matches: list[int | None] = []
    for number, source in enumerate(fresh["sources"]):
        candidates = sorted(left, key=lambda other: other != number)  # the same place first: twins keep theirs
        found = next((other for other in candidates if not _different_parts(left[other], source)), None)
        matches.append(found)
        if found is not None:
            del left[found]
    return matches


def _order_of(state: State) -> tuple[bool, bool]:
    return bool(state["resampled"]), bool(state["shuffled"])


def _different_parts(saved: State, fresh: State) -> list[str]:
    """Which parts of two sources' fingerprints differ; what one of them does not know is not compared."""
    before, now = (source["fingerprint"].split(":") for source in (saved, fresh))
    parts = [
        name
        for name, old, new in zip(_PARTS, before, now, strict=False)  # earlier states hold the first part only
        if old and new and old != new
    ]
    if not parts and _counts(saved, fresh):
        parts.append("the number of its sequences")
    return parts


def _counts(saved: State, fresh: State) -> str:
    """How many sequences there were and are, where both are known and differ."""
    before, now = saved["num_sequences"], fresh["num_sequences"]
    return f" (it held {before}, now it holds {now})" if None not in (before, now) and before != now else ""


def _changes(saved: State, fresh: State, names: Sequence[str], matches: Sequence[int | None]) -> list[str]:
    before, after = saved["sources"], fresh["sources"]
    flags = ("--dataset-resampled was", "shuffling inside shards (off with --disable-buffer) was")
    changes = [
        f"{flag} {'on' if was else 'off'}, now it is {'on' if now else 'off'}"
        for flag, was, now in zip(flags, _order_of(saved), _order_of(fresh), strict=True)
        if was != now
    ]
    if len(before) != len(after):
        changes.append(f"there were {len(before)} sources, now there are {len(after)}")
    for number, (name, source, match) in enumerate(zip(names, after, matches, strict=True)):
        stood_here = before[number] if number < len(before) and number not in matches else None
        changes += _source_changes(name, stood_here if match is None else before[match], source)
    kept = [match for match in matches if match is not None]
    if kept != sorted(kept):
        changes.append("the sources stand in another order")
    return changes + _share_changes(before, after)


def _source_changes(name: str, before: State | None, now: State) -> list[str]:
    """What differs between a source and the one that it was, or that stood in its place."""
    if before is None:
        return [f"{name} is new"]
    if parts := _different_parts(before, now):
        return [f"{name} differs in {' and '.join(parts)}{_counts(before, now)}"]
    old_key, new_key = before.get("data_key", now["data_key"]), now["data_key"]
    return [] if old_key == new_key else [f"{name}: --data-key was {old_key}, now it is {new_key}"]


def _share_changes(before: Sequence[State], after: Sequence[State]) -> list[str]:
    was, now = ([source.get("weight") for source in sources] for sources in (before, after))
    if None in was or len(was) != len(now) or was == now:
        return []
    told = (" : ".join(map(str, weights)) for weights in (was, now))
    return ["the weights of the sources were {}, now they are {}".format(*told)]


def _notice(
    changes: Sequence[str], names: Sequence[str], sources: Sequence[State], matches: Sequence[int | None]
) -> str:
    lines = [join_problems(changes, "The training data is not that of the checkpoint; going on all the same")]
    for name, source, match in zip(names, sources, matches, strict=True):
        if match is None:
            lines.append(f"  {name} starts at its beginning")
        else:
            lines.append(f"  {name} goes on in pass {source['pass'] + 1}, after {source['visit']} shards of it")
    return "\n".join([*lines, "  the shares of the sources are counted from here"])
