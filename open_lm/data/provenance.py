"""The origin of a run's data: read dataset.json next to the shards, write {run}/data.json, and compare two of them.

Everything but `read_dataset`, `write` and `read` is a pure function of sources and descriptions. Folders are not
compared: the same data in another folder is the same data.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import orjson

from open_lm import storage
from open_lm.data.manifest import DATASET_NAME, shard_stem
from open_lm.data.mixture import integer_weights
from open_lm.data.order import Source
from open_lm.errors import DataError, join_problems
from open_lm.storage.redaction import redact
from open_lm.system.names import escape

FILE_NAME = "data.json"
_FORMAT = 1
_MAX_LISTED = 5
_LOCATION_KEYS = ("url", "etag")  # of an input: its location, not its content
Description = dict[str, Any]


# --- dataset.json ----------------------------------------------------------------------------------------------------
def read_dataset(folder: str) -> dict[str, Any] | None:
    """Return the `settings` of a folder's dataset.json, the digest of its `inputs`, and the `digest` of both.

    The name of a tokenizer with a fingerprint is returned as `tokenizer`, not in the settings, since it is only a path.
    `sources` has the counts of each source that was preprocessed to the folder, if there are several.
    None if the folder has no such file, or one from another tool. DataError if it is damaged.
    """
    url = storage.join(folder, DATASET_NAME)
    if storage.info(url) is None:
        return None
    try:
        record = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{url}: not JSON ({error}); copy it again from the original data set") from error
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        return None
    facts: dict[str, Any] = {}  # not in the digest
    sources = record.get("sources")
    if isinstance(sources, dict) and len(sources) > 1:
        facts["sources"] = sources
    if settings.get("tokenizer_fingerprint"):  # identifies the tokenizer better than the path of its file
        facts["tokenizer"] = redact(str(settings.get("tokenizer") or ""))
        settings = {name: value for name, value in settings.items() if name != "tokenizer"}
    inputs = [{k: v for k, v in item.items() if k not in _LOCATION_KEYS} for item in record.get("inputs") or []]
    content = {"settings": settings, "inputs": _digest(inputs)}
    return {"digest": _digest(content), **content, **facts}


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def end_of_text_id(sources: Sequence[Source]) -> int | None:
    """Return the end-of-text id that the dataset.json files agree on; None if none of them has one.

    DataError with the id of every source if they disagree.
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
        heading = "The sources have different end-of-text ids, so they were made with different tokenizers"
        raise DataError(join_problems(problems, heading))
    return next(iter(ids), None)


def with_conversations(sources: Sequence[Source]) -> list[str]:
    """Return the names of the sources whose dataset.json says that they have packed conversations with loss masks."""
    return [
        source.name for source in sources if any(dataset["settings"].get("loss_mask") for dataset in source.datasets)
    ]


def check_vocabulary(sources: Sequence[Source], vocab_size: int) -> None:
    """Raise DataError if a dataset.json states a vocabulary with more ids than the model's `vocab_size`."""
    found = {
        (source.name, dataset["settings"]["vocab_size"])
        for source in sources
        for dataset in source.datasets
        if isinstance(dataset["settings"].get("vocab_size"), int)
    }
    problems = [
        f"{name}: its {DATASET_NAME} has vocab_size {size}" for name, size in sorted(found) if size > vocab_size
    ]
    if problems:
        largest = max(size for _, size in found)
        heading = (
            f"The model's vocabulary has {vocab_size} ids, fewer than that of the data; set vocab_size in the model's "
            f"JSON file to at least {largest}, or tokenize the data with a smaller vocabulary"
        )
        raise DataError(join_problems(problems, heading))


# --- data.json -------------------------------------------------------------------------------------------------------
def describe(sources: Sequence[Source]) -> Description:
    """Describe the data of a run for JSON: everything known about the shards of each source."""
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
        "name": escape(redact(source.name)),
        "fingerprint": source.fingerprint,
        "weight": str(source.weight),
        "data_key": source.data_key,
        "num_sequences": source.num_sequences,
        "datasets": list(source.datasets),
        "shards": shards,
    }


def _stem(url: str) -> str:
    """Return the shard's name without its folder, and without secrets in a web address or a command."""
    if url.startswith("pipe:"):
        return f"pipe:{hashlib.sha256(os.fsencode(url)).hexdigest()[:16]}"
    return escape(shard_stem(url.partition("?")[0] if storage.is_remote(url) else url))


def write(url: str, description: Description) -> None:
    """Write a description atomically."""
    storage.write_bytes(url, orjson.dumps(description, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read(url: str) -> Description | None:
    """Read the description of a previous run; None if there is none, or one of another format."""
    if storage.info(url) is None:
        return None
    try:
        description = orjson.loads(storage.read_bytes(url))
    except orjson.JSONDecodeError:
        return None
    is_known = isinstance(description, dict) and description.get("format") == _FORMAT
    return description if is_known else None


def differences(before: Description, now: Description) -> list[str]:
    """Return one sentence for each change between two descriptions.

    Only fields that both have are compared.
    """
    old, new = before["sources"], now["sources"]
    pairs = _pairs(old, new)
    sentences = []
    for number, source in enumerate(new):
        if number in pairs:
            sentences += [f"{source['name']}: {change}" for change in _source_differences(old[pairs[number]], source)]
        else:
            sentences.append(f"{source['name']} is new")
    sentences += [f"{source['name']} is missing" for n, source in enumerate(old) if n not in pairs.values()]
    order = [pairs[number] for number in sorted(pairs)]
    if order != sorted(order):
        sentences.append("the order of the sources changed")
    return sentences + _weight_differences(old, new, pairs)


def _weight_differences(old: Sequence[Any], new: Sequence[Any], pairs: Mapping[int, int]) -> list[str]:
    """Compare the proportions of the weights."""
    was, now = (integer_weights([Fraction(source["weight"]) for source in sources]) for sources in (old, new))
    if len(was) != len(now) or all(was[pairs[number]] == weight for number, weight in enumerate(now)):
        return []
    return [f"the weights were {' : '.join(map(str, was))}, now they are {' : '.join(map(str, now))}"]


def _pairs(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Match current sources to old ones: by equal data first, then by name, then by position."""
    criteria: list[Callable[[int, int], bool]] = [
        lambda now, was: new[now]["fingerprint"] == old[was]["fingerprint"],
        lambda now, was: new[now]["name"] == old[was]["name"],
        lambda now, was: now == was,
    ]
    pairs: dict[int, int] = {}
    for is_match in criteria:
        for now in range(len(new)):
            unmatched = [was for was in range(len(old)) if was not in pairs.values()]
            match = next((was for was in unmatched if now not in pairs and is_match(now, was)), None)
            if match is not None:
                pairs[now] = match
    return pairs


def _source_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changes = []
    before, now = (_by_name(source["shards"]) for source in (old, new))
    for word, names in (
        ("new", [name for name in now if name not in before]),
        ("missing", [name for name in before if name not in now]),
        ("changed in content (sha256)", _changed(before, now, "sha256")),
        ("changed in size (bytes)", _changed(before, now, "num_bytes")),
        ("changed in number of sequences", _changed(before, now, "num_sequences")),
    ):
        if names:
            changes.append(f"{_count(names)} {word}: {_list_names(names)}")
    common = [[name for name in table if name in before and name in now] for table in (before, now)]
    if common[0] != common[1]:
        changes.append("the order of its shards changed")
    if any(before[name].get("factor") != now[name].get("factor") for name in common[0]):
        changes.append("its upsampling factors changed")
    if old["data_key"] != new["data_key"]:
        changes.append(f"--data-key was {old['data_key']}, now it is {new['data_key']}")
    return [*changes, *_dataset_differences(old["datasets"], new["datasets"])]


def _by_name(shards: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Index the rows by shard name; if shards of several folders share a name, the second gets "(number 2)"."""
    rows: dict[str, Mapping[str, Any]] = {}
    seen = Counter[str]()
    for row in shards:
        seen[row["shard"]] += 1
        rows[row["shard"] if seen[row["shard"]] == 1 else f"{row['shard']} (number {seen[row['shard']]})"] = row
    return rows


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], field: str) -> list[str]:
    """List the shards whose field differs, if both sides have it."""
    both = ((name, before[name].get(field), row.get(field)) for name, row in now.items() if name in before)
    return [name for name, old, new in both if None not in (old, new) and old != new]


def _count(names: Sequence[str]) -> str:
    return "1 shard is" if len(names) == 1 else f"{len(names)} shards are"


def _list_names(names: Sequence[str]) -> str:
    hidden = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {hidden} more" if hidden > 0 else "")


def _dataset_differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield the differences of the dataset.json files, folder by folder; folders without one are skipped."""
    for before, now in zip(old, new, strict=False):
        was, settings = before["settings"], now["settings"]
        for name in sorted({*was, *settings}):
            if was.get(name) != settings.get(name):
                yield f"{DATASET_NAME}: {name} was {was.get(name)!r}, now it is {settings.get(name)!r}"
        if before["inputs"] != now["inputs"]:
            yield f"{DATASET_NAME}: the inputs or their contents changed"
