"""Where a run's data come from: what `dataset.json` beside the shards says, and {run}/data.json, which keeps it.

Everything but `read_dataset`, `write` and `read` is a pure function of sources and of such descriptions. Folders are no
part of what is compared: the same data elsewhere are the same data.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.manifest import shard_stem
from open_lm.data.mixture import integer_weights
from open_lm.data.order import Source
from open_lm.errors import DataError, join_problems
from open_lm.storage.redaction import redact

DATASET_NAME, FILE_NAME = "dataset.json", "data.json"
_FORMAT = 1
_MAX_NAMED = 5
_LOCATIONS = ("url", "etag")  # of an input: where it lay, not what it held
Description = dict[str, Any]


# --- dataset.json ----------------------------------------------------------------------------------------------------
def read_dataset(folder: str) -> dict[str, Any] | None:
    """The `settings` of a folder's dataset.json, the digest of its `inputs`, and the `digest` of both.

    None where the folder has none, or one of another tool. DataError for a damaged one.
    """
    url = storage.join(folder, DATASET_NAME)
    if storage.info(url) is None:
        return None
    try:
        record = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{url}: not JSON ({error}); copy it again from where the data set was made") from error
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        return None
    if settings.get("tokenizer_fingerprint"):  # which says more than the place where the tokenizer's file lay
        settings = {name: value for name, value in settings.items() if name != "tokenizer"}
    inputs = [{k: v for k, v in item.items() if k not in _LOCATIONS} for item in record.get("inputs") or []]
    main = {"settings": settings, "inputs": _digest(inputs)}
    return {"digest": _digest(main), **main}


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def end_of_text_id(sources: Sequence[Source]) -> int | None:
    """The id that ends a document, as all dataset.json that name one say alike; None where none does.

    DataError with every source's where they disagree.
    """
    found = {
        (source.name, dataset["settings"]["eot_id"])
        for source in sources
        for dataset in source.datasets
        if isinstance(dataset["settings"].get("eot_id"), int)
    }
    ids = {number for _, number in found}
    if len(ids) > 1:
        problems = [f"{name}: {number}" for name, number in sorted(found)]
        raise DataError(
            join_problems(problems, "The sources end documents with different ids, so they are of different tokenizers")
        )
    return next(iter(ids), None)


# --- data.json -------------------------------------------------------------------------------------------------------
def describe(sources: Sequence[Source]) -> Description:
    """What the data of a run are, fit for JSON: of each source its shards with all that is known of them."""
    return {"format": _FORMAT, "sources": [_describe(source) for source in sources]}


def _describe(source: Source) -> dict[str, Any]:
    repeats = source.repeats or (1,) * len(source.shards)
    shards = []
    columns = (source.shards, source.sizes, source.num_bytes, source.sha256, repeats)
    for url, size, num_bytes, sha256, factor in zip(*columns, strict=True):
        known = {"num_sequences": size, "num_bytes": num_bytes, "sha256": sha256 or None}
        row = {"shard": _stem(url), **{name: value for name, value in known.items() if value is not None}}
        shards.append(row if factor == 1 else {**row, "factor": str(factor)})
    return {
        "name": redact(source.name),
        "fingerprint": source.fingerprint,
        "weight": str(source.weight),
        "data_key": source.data_key,
        "num_sequences": source.num_sequences,
        "datasets": list(source.datasets),
        "shards": shards,
    }


def _stem(url: str) -> str:
    """The shard's name without its folder, and without what a web address or a command may hold of secrets."""
    if url.startswith("pipe:"):
        return f"pipe:{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return shard_stem(url.partition("?")[0])


def write(url: str, description: Description) -> None:
    """Write a description, whole or not at all."""
    storage.write_bytes(url, orjson.dumps(description, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read(url: str) -> Description | None:
    """The description that a run has left; None where there is none or only one of another format."""
    if storage.info(url) is None:
        return None
    try:
        description = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError:
        return None
    is_ours = isinstance(description, dict) and description.get("format") == _FORMAT
    return description if is_ours else None


def differences(before: Description, now: Description) -> list[str]:
    """What has changed between two descriptions, a readable sentence for each change; empty where nothing has.

    Only what both know is compared.
    """
    old, new = before["sources"], now["sources"]
    pairs = _pairs(old, new)
    sentences = []
    for number, source in enumerate(new):
        if number in pairs:
            sentences += [f"{source['name']}: {change}" for change in _source_differences(old[pairs[number]], source)]
        else:
            sentences.append(f"{source['name']}: is new")
    sentences += [f"{source['name']}: is gone" for n, source in enumerate(old) if n not in pairs.values()]
    order = [pairs[number] for number in sorted(pairs)]
    if order != sorted(order):
        sentences.append("the sources stand in another order")
    return sentences + _weight_differences(old, new, pairs)


def _weight_differences(old: Sequence[Any], new: Sequence[Any], pairs: Mapping[int, int]) -> list[str]:
    """Only proportions count."""
    was, now = (integer_weights([Fraction(source["weight"]) for source in sources]) for sources in (old, new))
    if len(was) != len(now) or all(was[pairs[number]] == weight for number, weight in enumerate(now)):
        return []
    return [f"the weights were {' : '.join(map(str, was))}, now they are {' : '.join(map(str, now))}"]


def _pairs(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Which source of now was which: the same data first, then the same name, then the same place."""
    likenesses: list[Callable[[int, int], bool]] = [
        lambda now, was: new[now]["fingerprint"] == old[was]["fingerprint"],
        lambda now, was: new[now]["name"] == old[was]["name"],
        lambda now, was: now == was,
    ]
    pairs: dict[int, int] = {}
    for alike in likenesses:
        for now in range(len(new)):
            left = [was for was in range(len(old)) if was not in pairs.values()]
            found = next((was for was in left if now not in pairs and alike(now, was)), None)
            if found is not None:
                pairs[now] = found
    return pairs


def _source_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changes = []
    before, now = (_by_name(source["shards"]) for source in (old, new))
    for word, names in (
        ("new", [name for name in now if name not in before]),
        ("gone", [name for name in before if name not in now]),
        ("changed in content (sha256)", _changed(before, now, "sha256")),
        ("changed in size (bytes)", _changed(before, now, "num_bytes")),
        ("changed in number of sequences", _changed(before, now, "num_sequences")),
    ):
        if names:
            changes.append(f"{_count(names)} {word}: {_named(names)}")
    common = [[name for name in table if name in before and name in now] for table in (before, now)]
    if common[0] != common[1]:
        changes.append("its shards stand in another order")
    if any(before[name].get("factor") != now[name].get("factor") for name in common[0]):
        changes.append("its upsampling factors differ")
    if old["data_key"] != new["data_key"]:
        changes.append(f"--data-key was {old['data_key']}, is {new['data_key']}")
    return [*changes, *_dataset_differences(old["datasets"], new["datasets"])]


def _by_name(shards: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The rows by the shards' names; of several folders' shards of one name the second is number 2."""
    rows: dict[str, Mapping[str, Any]] = {}
    seen = Counter[str]()
    for row in shards:
        seen[row["shard"]] += 1
        rows[row["shard"] if seen[row["shard"]] == 1 else f"{row['shard']} (number {seen[row['shard']]})"] = row
    return rows


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], field: str) -> list[str]:
    """Shards of which both sides know the field, and know it differently."""
    both = ((name, before[name].get(field), row.get(field)) for name, row in now.items() if name in before)
    return [name for name, old, new in both if None not in (old, new) and old != new]


def _count(names: Sequence[str]) -> str:
    return "1 shard is" if len(names) == 1 else f"{len(names)} shards are"


def _named(names: Sequence[str]) -> str:
    hidden = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {hidden} more" if hidden > 0 else "")


def _dataset_differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What differs in dataset.json, folder by folder; a folder that has none says nothing."""
    for before, now in zip(old, new, strict=False):
        was, settings = before["settings"], now["settings"]
        for name in sorted({*was, *settings}):
            if was.get(name) != settings.get(name):
                yield f"{DATASET_NAME} has {name} {settings.get(name)!r}, it had {was.get(name)!r}"
        if before["inputs"] != now["inputs"]:
            yield f"{DATASET_NAME} names other inputs, or inputs of another content"
