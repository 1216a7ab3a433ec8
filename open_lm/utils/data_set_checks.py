"""Find problems of a data set: compare shards with their manifests, and totals with dataset.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from open_lm.data.manifest import MANIFEST_NAME
from open_lm.data.shard_format import ManifestEntry
from open_lm.utils.data_sets import DATASET_NAME, DataSet, Folder, as_dict
from open_lm.utils.shard_survey import ShardSurvey

Surveys = Mapping[str, ShardSurvey]  # by URL of the shard


def vocab_size_of(data_set: DataSet | None, default: int | None = None) -> int | None:
    """Return the vocabulary size in the data set's record, or the default if the record has none."""
    vocab_size = data_set.settings.get("vocab_size") if data_set else None
    return vocab_size if isinstance(vocab_size, int) else default


def folder_problems(
    folder: Folder, data_set: DataSet | None, surveys: Surveys, vocab_size: int | None = None
) -> Iterator[str]:
    """Yield the problems of a folder, found in its list of files and the surveys of some or all of its shards.

    `vocab_size` is used for data sets without one in their record.
    """
    if folder.fault:
        yield folder.fault
    for stem in folder.missing:
        yield f"{folder.url}: the shard {stem}.tar is missing, but {MANIFEST_NAME} lists it"
    for url in folder.unlisted:
        yield f"{url}: {MANIFEST_NAME} does not list this shard; run --make-manifest if it belongs to the data set"
    for url, size in folder.shards.items():
        survey, entry = surveys.get(url), folder.entry(url)
        if (survey is None or survey.fault) and entry and size >= 0 and entry.num_bytes not in (None, size):
            yield _mismatch(url, "num_bytes", size, entry.num_bytes)
        if survey is not None and survey.fault:
            yield survey.fault
        elif survey is not None:
            yield from _member_problems(
                survey, data_set.settings if data_set else {}, vocab_size_of(data_set, vocab_size)
            )
            yield from _entry_problems(survey, entry) if entry else ()


def _member_problems(survey: ShardSurvey, settings: Mapping[str, Any], vocab_size: int | None) -> Iterator[str]:
    yield from survey.bad_examples
    if survey.bad_members > len(survey.bad_examples):
        yield f"{survey.url}: and {survey.bad_members - len(survey.bad_examples):,} more members cannot be read"
    if isinstance(seq_len := settings.get("seq_len"), int):
        for length, count in sorted(survey.lengths.items()):
            if length != seq_len + 1:
                yield (f"{survey.url}: {count:,} members have {length:,} token ids, expected {seq_len + 1:,} "
                       f"(seq_len {seq_len:,} + 1)")  # fmt: skip
    expected_kind = settings.get("format")
    for kind, count in survey.kinds.items():
        if isinstance(expected_kind, str) and kind != expected_kind:
            yield f"{survey.url}: {count:,} members have the format {kind}, expected {expected_kind} by {DATASET_NAME}"
    if vocab_size is None or survey.max_id is None or survey.min_id is None:
        return
    if survey.max_id >= vocab_size:
        yield f"{survey.url}: the token id {survey.max_id:,} is outside the vocabulary of {vocab_size:,} ids"
    if survey.min_id < -vocab_size:
        yield f"{survey.url}: the token id {survey.min_id:,} is outside the vocabulary of {vocab_size:,} ids"


def _entry_problems(survey: ShardSurvey, entry: ManifestEntry) -> Iterator[str]:
    """Compare a shard with its manifest line. Keys that the line lacks are not compared."""
    if entry.num_sequences != survey.num_sequences:
        yield _mismatch(survey.url, "num_sequences", survey.num_sequences, entry.num_sequences)
    names = ["num_bytes", "sha256"] if survey.bad_members else ["num_tokens", "num_bytes", "sha256"]
    for name in names:
        if name in entry.extra and entry.extra[name] != getattr(survey, name):
            yield _mismatch(survey.url, name, getattr(survey, name), entry.extra[name])
    sources = entry.extra.get("sources")
    if sources is None or "num_tokens" not in entry.extra:
        return
    counts = list(as_dict(sources).values())
    if not counts or not all(isinstance(count, int) for count in counts):
        yield f'{survey.url}: "sources" in {MANIFEST_NAME} must be {{name: tokens}}, found {sources!r:.80}'
    elif sum(counts) != entry.extra["num_tokens"]:
        yield (f"{survey.url}: the sources in {MANIFEST_NAME} sum to {sum(counts):,} tokens, "
               f"but num_tokens is {_number(entry.extra['num_tokens'])}")  # fmt: skip


def _mismatch(url: str, name: str, found: Any, expected: Any) -> str:
    return f"{url}: {name} is {_number(found)}, expected {_number(expected)} by {MANIFEST_NAME}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def total_problems(data_set: DataSet, surveys: Surveys) -> Iterator[str]:
    """Yield differences between the counts of a dataset.json and its shards. All of its shards must have surveys."""
    shards = [url for folder in data_set.folders for url in folder.shards]
    if not data_set.complete or any(url not in surveys for url in shards):
        return
    totals = _totals([surveys[url] for url in shards])
    counts = as_dict(data_set.record.get("counts"))
    sources, tail = as_dict(data_set.record.get("sources")), as_dict(data_set.record.get("tail"))
    dropped = tail.get("tokens", 0) if tail.get("fate") == "dropped" else 0
    if dropped:
        totals["tokens"] += dropped  # the counts include dropped tokens
    for name, value in totals.items():
        if name in counts and counts[name] != value:
            note = f" (including {dropped:,} dropped ones)" if dropped and name == "tokens" else ""
            expected = _number(counts[name])
            yield f"{data_set.root}: the shards contain {value:,} {name}{note}, expected {expected} by {DATASET_NAME}"
    shares = [as_dict(source).get("tokens") for source in sources.values()]
    if shares and all(isinstance(tokens, int) for tokens in shares) and "tokens" in counts:
        total = sum(tokens for tokens in shares if isinstance(tokens, int))
        if total != counts["tokens"]:
            yield (f"{data_set.root}: the sources in {DATASET_NAME} sum to {total:,} tokens, "
                   f"but its counts have {_number(counts['tokens'])}")  # fmt: skip


def _totals(surveys: Sequence[ShardSurvey]) -> dict[str, int]:
    return {
        "shards": len(surveys),
        "sequences": sum(survey.num_sequences for survey in surveys),
        "tokens": sum(survey.num_tokens for survey in surveys),
        "bytes": sum(survey.num_bytes for survey in surveys),
        "pads": sum(survey.num_pads for survey in surveys),
    }


def unchecked(folders: Sequence[Folder], data_sets: Sequence[DataSet], vocab_size: int | None) -> list[str]:
    """Return what a verification of all shards could not check, because no expected value is recorded."""
    lines = [entry for folder in folders for entry in (folder.entries or {}).values()]
    described = {folder.url: data_set for data_set in data_sets for folder in data_set.folders}
    notes: list[str] = []
    for folder in folders:
        if folder.entries is None and not folder.fault:
            notes.append(f"{folder.url}: no {MANIFEST_NAME} to compare with")
        if folder.url not in described:
            notes.append(f"{folder.url}: no {DATASET_NAME} to compare with")
        if vocab_size_of(described.get(folder.url), vocab_size) is None:
            notes.append(f"{folder.url}: the vocabulary size is unknown; pass the tokenizer with --tokenizer")
    for name in ("num_tokens", "num_bytes", "sha256"):
        if missing := sum(name not in entry.extra for entry in lines):
            notes.append(f"{name} of {missing:,} shards: their lines in {MANIFEST_NAME} have no {name}")
    notes += [f"the totals of {data_set.root}: only some of its shards were selected" for data_set in data_sets
              if not data_set.complete]  # fmt: skip
    return notes
