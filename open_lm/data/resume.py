"""Compare a saved position in the data with the current data, and choose where each source resumes.

A state is the value of `DataOrder.state`: a fingerprint, a share and a position for each source. All functions here are
pure functions of such states. `provenance.py` reports the same changes in terms of shards and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_lm.errors import DataError, join_problems

State = dict[str, Any]
_IDENTITY_KEYS = ("fingerprint", "num_sequences", "data_key", "weight", "stream")  # all others are the position
_FINGERPRINT_PARTS = (
    "the names, order or upsampling factors of its shards",
    "the numbers of sequences of its shards",
    "the sha256 of its shards",
    "the dataset.json of its shards",
)


def resume_state(saved: State, fresh: State, names: Sequence[str], allow_changed: bool = False) -> tuple[State, str]:
    """Return the state to resume from and a warning for the user ("" if nothing has changed).

    `fresh` is the state at the beginning of the current data, whose sources are called `names`. If the data or its
    order changed: DataError with all changes, or with `allow_changed` a state in which every unchanged source keeps its
    position, all others start from the beginning, and shares are counted from here.
    """
    matches = match_sources(saved, fresh)
    changes = _changes(saved, fresh, names, matches)
    if changes and not allow_changed:
        advice = "restore the data, start a new run from the checkpoint's weights, or pass --allow-changed-data"
        raise DataError(join_problems(changes, f"The training data differs from that of the checkpoint ({advice})"))
    streams = [int(source.get("stream", number)) for number, source in enumerate(saved["sources"])]
    unused = max(streams, default=-1) + 1
    sources = []
    for source, match in zip(fresh["sources"], matches, strict=True):
        if match is None:
            sources.append({**source, "stream": unused})
            unused += 1
        else:
            identity = {name: source[name] for name in _IDENTITY_KEYS}
            position = {name: value for name, value in saved["sources"][match].items() if name not in _IDENTITY_KEYS}
            sources.append({**identity, **position, "stream": streams[match]})
        if changes:
            sources[-1]["samples"] = 0
    warning = _warning(changes, names, sources, matches) if changes else ""
    return {**fresh, "seed": int(saved["seed"]), "sources": sources}, warning


def position_text(source: State) -> str:
    """Describe the position in a source for the user."""
    if "visit" in source:
        progress = f"after {source['visit']} of its shards"
    elif "queue" in source:
        progress = f"after {source['next_visit'] - len(source['queue'])} of its shards"
    else:
        progress = f"after {source['fixed'] + source['shared']} of its sequences"
    return f"pass {source['pass'] + 1}, {progress}"


def is_started(source: State) -> bool:
    """Return whether the position in a source is not its beginning."""
    return any(source.get(name) for name in ("pass", "visit", "offset", "fixed", "shared", "next_visit"))


def match_sources(saved: State, fresh: State) -> list[int | None]:
    """Return the index in the saved state of each current source, None if it is new or has changed."""
    if _order_flags(saved) != _order_flags(fresh):
        return [None] * len(fresh["sources"])  # a position in one order has no meaning in another
    unmatched = dict(enumerate(saved["sources"]))
    matches: list[int | None] = []
    for number, source in enumerate(fresh["sources"]):
        # The same index comes first, so that two sources with the same data keep their positions.
        candidates = sorted(unmatched, key=lambda other: other != number)
        match = next((other for other in candidates if not _different_parts(unmatched[other], source)), None)
        matches.append(match)
        if match is not None:
            del unmatched[match]
    return matches


def _order_flags(state: State) -> tuple[bool, bool]:
    return bool(state["resampled"]), bool(state["shuffled"])


def _different_parts(saved: State, fresh: State) -> list[str]:
    """List the parts in which the fingerprints of two sources differ; skip parts that one of them does not have."""
    before, now = (source["fingerprint"].split(":") for source in (saved, fresh))
    parts = [
        name
        for name, old, new in zip(_FINGERPRINT_PARTS, before, now, strict=False)  # old states have the first part only
        if old and new and old != new
    ]
    if not parts and _count_change(saved, fresh):
        parts.append("the number of its sequences")
    return parts


def _count_change(saved: State, fresh: State) -> str:
    """Describe how the number of sequences changed; "" if it did not, or is not known on both sides."""
    before, now = saved["num_sequences"], fresh["num_sequences"]
    return f" (it had {before}, now it has {now})" if None not in (before, now) and before != now else ""


def _changes(saved: State, fresh: State, names: Sequence[str], matches: Sequence[int | None]) -> list[str]:
    before, after = saved["sources"], fresh["sources"]
    flags = ("--dataset-resampled was", "shuffling inside shards (off with --disable-buffer) was")
    changes = [
        f"{flag} {'on' if was else 'off'}, now it is {'on' if now else 'off'}"
        for flag, was, now in zip(flags, _order_flags(saved), _order_flags(fresh), strict=True)
        if was != now
    ]
    if len(before) != len(after):
        changes.append(f"the number of sources was {len(before)}, now it is {len(after)}")
    for number, (name, source, match) in enumerate(zip(names, after, matches, strict=True)):
        same_index = before[number] if number < len(before) and number not in matches else None
        changes += _source_changes(name, same_index if match is None else before[match], source)
    kept = [match for match in matches if match is not None]
    if kept != sorted(kept):
        changes.append("the order of the sources changed")
    return changes + _weight_changes(before, after)


def _source_changes(name: str, before: State | None, now: State) -> list[str]:
    """List the differences between a source and its saved counterpart (None if it has none)."""
    if before is None:
        return [f"{name} is new"]
    if parts := _different_parts(before, now):
        return [f"{name} differs in {' and '.join(parts)}{_count_change(before, now)}"]
    old_key, new_key = before.get("data_key", now["data_key"]), now["data_key"]
    return [] if old_key == new_key else [f"{name}: --data-key was {old_key}, now it is {new_key}"]


def _weight_changes(before: Sequence[State], after: Sequence[State]) -> list[str]:
    was, now = ([source.get("weight") for source in sources] for sources in (before, after))
    if None in was or len(was) != len(now) or was == now:
        return []
    texts = (" : ".join(map(str, weights)) for weights in (was, now))
    return ["the weights of the sources were {}, now they are {}".format(*texts)]


def _warning(
    changes: Sequence[str], names: Sequence[str], sources: Sequence[State], matches: Sequence[int | None]
) -> str:
    heading = "The training data differs from that of the checkpoint; continuing on the current data"
    lines = [join_problems(changes, heading)]
    for name, source, match in zip(names, sources, matches, strict=True):
        if match is None:
            lines.append(f"  {name} starts from the beginning")
        else:
            lines.append(f"  {name} resumes in {position_text(source)}")
    return "\n".join([*lines, "  the shares of the sources are counted from here"])
