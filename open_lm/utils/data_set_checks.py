"""What is wrong with a data set: shards against their manifests, sums against dataset.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from open_lm.data.manifest import MANIFEST_NAME
from open_lm.data.shard_format import ManifestEntry
from open_lm.utils.data_sets import DATASET_NAME, DataSet, Folder, as_dict
from open_lm.utils.shard_survey import ShardSurvey

Surveys = Mapping[str, ShardSurvey]  # by the shard's address


def vocabulary(data_set: DataSet | None, default: int | None = None) -> int | None:
    """The vocabulary's size as the data set's record says it, else the default."""
    found = data_set.settings.get("vocab_size") if data_set else None
    return found if isinstance(found, int) else default


def folder_problems(
    folder: Folder, data_set: DataSet | None, surveys: Surveys, vocab_size: int | None = None
) -> Iterator[str]:
    """Everything wrong with a folder that its list of files and the surveys of its shards (some or all) tell.

    `vocab_size` is for data sets whose record names none.
    """
    if folder.fault:
        yield folder.fault
    for stem in folder.missing:
        yield f"{folder.url}: the shard {stem}.tar is missing; {MANIFEST_NAME} names it"
    for url in folder.unlisted:
        yield f"{url}: {MANIFEST_NAME} does not name this shard; run --make-manifest if it belongs here"
    for url, size in folder.shards.items():
        survey, entry = surveys.get(url), folder.entry(url)
        if (survey is None or survey.fault) and entry and size >= 0 and entry.num_bytes not in (None, size):
            yield _differs(url, "num_bytes", size, entry.num_bytes)
        if survey is not None and survey.fault:
            yield survey.fault
        elif survey is not None:
            yield from _member_problems(survey, data_set.settings if data_set else {}, vocabulary(data_set, vocab_size))
            yield from _entry_problems(survey, entry) if entry else ()


def _member_problems(survey: ShardSurvey, settings: Mapping[str, Any], vocab_size: int | None) -> Iterator[str]:
    yield from survey.bad_shown
    if survey.bad_members > len(survey.bad_shown):
        yield f"{survey.url}: and {survey.bad_members - len(survey.bad_shown):,} more members cannot be read"
    if isinstance(length := settings.get("seq_len"), int):
        for found, count in sorted(survey.lengths.items()):
            if found != length + 1:
                yield (f"{survey.url}: {count:,} members hold {found:,} ids, expected {length + 1:,} "
                       f"(seq_len {length:,} and one more)")  # fmt: skip
    wanted = settings.get("format")
    for kind, count in survey.kinds.items():
        if isinstance(wanted, str) and kind != wanted:
            yield f"{survey.url}: {count:,} members are of the kind {kind}, {DATASET_NAME} says {wanted}"
    if vocab_size is None or survey.max_id is None or survey.min_id is None:
        return
    if survey.max_id >= vocab_size:
        yield f"{survey.url}: the id {survey.max_id:,} is beyond the vocabulary of {vocab_size:,} ids"
    if survey.min_id < -vocab_size:
        yield f"{survey.url}: the id {survey.min_id:,} is below the vocabulary of {vocab_size:,} ids"


def _entry_problems(survey: ShardSurvey, entry: ManifestEntry) -> Iterator[str]:
    """A shard against its line. What the line does not say is not wrong."""
    if entry.num_sequences != survey.num_sequences:
        yield _differs(survey.url, "num_sequences", survey.num_sequences, entry.num_sequences)
    names = ["num_bytes", "sha256"] if survey.bad_members else ["num_tokens", "num_bytes", "sha256"]
    for name in names:
        if name in entry.extra and entry.extra[name] != getattr(survey, name):
            yield _differs(survey.url, name, getattr(survey, name), entry.extra[name])
    sources = entry.extra.get("sources")
    if sources is None or "num_tokens" not in entry.extra:
        return
    counts = list(as_dict(sources).values())
    if not counts or not all(isinstance(count, int) for count in counts):
        yield f'{survey.url}: "sources" in {MANIFEST_NAME} must be {{name: tokens}}, found {sources!r:.80}'
    elif sum(counts) != entry.extra["num_tokens"]:
        yield (f"{survey.url}: the sources in {MANIFEST_NAME} sum to {sum(counts):,} tokens, "
               f"its num_tokens is {_number(entry.extra['num_tokens'])}")  # fmt: skip


def _differs(url: str, name: str, found: Any, told: Any) -> str:
    return f"{url}: {name} is {_number(found)}, {MANIFEST_NAME} says {_number(told)}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def sum_problems(data_set: DataSet, surveys: Surveys) -> Iterator[str]:
    """The counts of a dataset.json against its shards; nothing where not all of them were looked through."""
    shards = [url for folder in data_set.folders for url in folder.shards]
    if not data_set.whole or any(url not in surveys for url in shards):
        return
    found = _sums([surveys[url] for url in shards])
    counts = as_dict(data_set.record.get("counts"))
    sources, tail = as_dict(data_set.record.get("sources")), as_dict(data_set.record.get("tail"))
    dropped = tail.get("tokens", 0) if tail.get("fate") == "dropped" else 0
    if dropped:
        found["tokens"] += dropped  # the counts are of what was made, dropped tokens included
    for name, value in found.items():
        if name in counts and counts[name] != value:
            note = f" ({dropped:,} dropped ones included)" if dropped and name == "tokens" else ""
            told = _number(counts[name])
            yield f"{data_set.root}: the shards hold {value:,} {name}{note}, {DATASET_NAME} says {told}"
    shares = [as_dict(source).get("tokens") for source in sources.values()]
    if shares and all(isinstance(tokens, int) for tokens in shares) and "tokens" in counts:
        total = sum(tokens for tokens in shares if isinstance(tokens, int))
        if total != counts["tokens"]:
            yield (f"{data_set.root}: the sources in {DATASET_NAME} sum to {total:,} tokens, "
                   f"its counts say {_number(counts['tokens'])}")  # fmt: skip


def _sums(surveys: Sequence[ShardSurvey]) -> dict[str, int]:
    return {
        "shards": len(surveys),
        "sequences": sum(survey.num_sequences for survey in surveys),
        "tokens": sum(survey.num_tokens for survey in surveys),
        "bytes": sum(survey.num_bytes for survey in surveys),
        "pads": sum(survey.num_pads for survey in surveys),
    }


def unchecked(folders: Sequence[Folder], data_sets: Sequence[DataSet], vocab_size: int | None) -> list[str]:
    """What a look through all shards could not check because nothing says how it should be."""
    lines = [entry for folder in folders for entry in (folder.entries or {}).values()]
    described = {folder.url: data_set for data_set in data_sets for folder in data_set.folders}
    notes: list[str] = []
    for folder in folders:
        if folder.entries is None and not folder.fault:
            notes.append(f"{folder.url}: no {MANIFEST_NAME} to compare with")
        if folder.url not in described:
            notes.append(f"{folder.url}: no {DATASET_NAME} to compare with")
        if vocabulary(described.get(folder.url), vocab_size) is None:
            notes.append(f"{folder.url}: the size of the vocabulary is not known; name it with --tokenizer")
    for name in ("num_tokens", "num_bytes", "sha256"):
        if silent := sum(name not in entry.extra for entry in lines):
            notes.append(f"{name} of {silent:,} shards: their lines in {MANIFEST_NAME} hold none")
    notes += [f"the sums of {data_set.root}: only a part of it was looked at" for data_set in data_sets
              if not data_set.whole]  # fmt: skip
    return notes
