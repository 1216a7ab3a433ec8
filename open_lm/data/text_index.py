"""Make the index of a text: divide the input into units, compare with an earlier index, and write the folder.

The units are tokenized by the processes of text_pool.py. All functions run in one process; training/raw_text.py divides
the work among the nodes of a run.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.manifest import MANIFEST_NAME, ManifestEntry, write_manifest
from open_lm.data.shard_format import DATASET_NAME, ShardWriter
from open_lm.data.text_folder import (
    JOURNAL_NAME,
    PIECES_KEY,
    STATE_NAME,
    TAILS_STEM,
    UNITS_NAME,
    TextFolder,
    TextState,
)
from open_lm.data.text_units import TextOptions, TextUnit, UnitReport
from open_lm.data.tokenizer_copies import write_copy
from open_lm.datapreprocess.inputs import find_inputs, plan_units
from open_lm.datapreprocess.job import DEFAULT_BAD_FRACTION, input_records
from open_lm.datapreprocess.pack import cut, pad
from open_lm.datapreprocess.readers.texts import decode_separator
from open_lm.datapreprocess.sampling import Sampling
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.system.names import escaped, split_joined, unescaped
from open_lm.tokenizer import load_tokenizer

MAX_UNIT_BYTES = 16 << 20  # a rank may have a unit of each of its lanes open
_LARGE_UNIT_BYTES = 1 << 30
_MAX_LISTED = 5
_MIN_BAD = 20  # bad documents before a text without good ones ends the index early
logger = logging.getLogger(__name__)


def text_folder(index: str, name: str) -> TextFolder:
    """Return the folder of a value of --train-text in the folder of --text-index."""
    word = re.sub(r"[^A-Za-z0-9]+", "-", name.rpartition("/")[2]).strip("-")[:40]
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return TextFolder(storage.join(index, f"{word}-{digest}".lstrip("-")))


def load_encoder(data: DataConfig, tokenizer: str | None) -> DocumentEncoder:
    """Return the encoder of --tokenizer. Raise ConfigError if the flag is missing or its tokenizer cannot be used."""
    if tokenizer is None:
        raise ConfigError("--train-text: needs --tokenizer, which turns the text into ids")
    loaded = load_tokenizer(tokenizer)
    if data.text_add_bos and loaded.bos_id is None:
        raise ConfigError(f"--text-add-bos: --tokenizer {tokenizer} has no begin-of-text token; leave the flag out")
    return DocumentEncoder(loaded, add_bos=data.text_add_bos)


@dataclass
class TextIndex:
    """An index to make or to check: its folder, what it is made from, and its units.

    units: all units of the text.
    reports: the reports of the units that are already tokenized, by key.
    """

    folder: TextFolder
    state: TextState
    units: list[TextUnit]
    reports: dict[str, UnitReport]

    @property
    def missing(self) -> list[TextUnit]:
        """The units without a report, the largest first."""
        units = [unit for unit in self.units if unit.key not in self.reports]
        return sorted(units, key=lambda unit: -unit.num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


def text_state(data: DataConfig, name: str, tokenizer: str, encoder: DocumentEncoder, seq_len: int) -> TextState:
    """Return the current state of a value of --train-text. Raise DataError if no input matches."""
    inputs = tuple(find_inputs(split_joined(name)))
    separator = None if data.text_separator is None else decode_separator(data.text_separator, "--text-separator")
    options = TextOptions(seq_len, data.text_key, separator, data.text_split_documents, data.text_add_bos)
    return TextState(name, tokenizer, options, encoder.settings(), inputs)


def is_current(folder: TextFolder, state: TextState, allow_changed: bool) -> bool:
    """Return whether a folder has the finished index of a text.

    Raises:
        DataError: its index is of other text, options or another tokenizer (without `allow_changed`).
    """
    before = folder.state() if folder.is_finished else None
    if before is None:
        return False
    changes = _changes(before, state)
    if changes and not allow_changed:
        raise DataError(
            join_problems(
                changes,
                f"{state.name}: the text index {folder.path} was made from other data. Restore them, choose another "
                "--text-index (or --name), or pass --allow-changed-data to make the index again. What differs",
            )
        )
    return before == replace(state, tokenizer=before.tokenizer)


def plan_index(folder: TextFolder, state: TextState) -> TextIndex:
    """Divide a text into units, and read the reports of those that an earlier run tokenized."""
    units = _plan_units(state)
    keys = {unit.key for unit in units}
    reports = {report.key: report for report in _load_reports(folder) if report.key in keys}
    return TextIndex(folder, state, units, reports)


def _changes(before: TextState, now: TextState) -> list[str]:
    """List what differs between two states, except for names of tokenizers and times of files."""
    old, new = before.settings(), now.settings()
    changes = [
        f"{name} was {old.get(name)!r}, now it is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    was, current = ({item.url: item for item in state.inputs} for state in (before, now))
    files = [f"{url} is new" for url in current if url not in was]
    files += [f"{url} is missing" for url in was if url not in current]
    files += [
        f"{url} had {was[url].num_bytes} bytes, now it has {item.num_bytes}"
        for url, item in current.items()
        if url in was and was[url].num_bytes != item.num_bytes
    ]
    hidden = len(files) - _MAX_LISTED
    return changes + files[:_MAX_LISTED] + ([f"and {hidden} more files"] if hidden > 0 else [])


def _plan_units(state: TextState) -> list[TextUnit]:
    by_url = {item.url: item for item in state.inputs}
    settings = repr(sorted(state.settings().items()))
    units = []
    for unit in plan_units(state.inputs, Sampling(), state.options.read, keep_order=True, max_bytes=MAX_UNIT_BYTES):
        facts = [(piece, by_url[piece.url]) for piece in unit.pieces]
        key = hashlib.sha256(repr((settings, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        units.append(TextUnit(key, unit.pieces))
    large = [unit.pieces[0].url for unit in units if unit.num_bytes > _LARGE_UNIT_BYTES]
    if large:
        logger.warning(
            f"{state.name}: {len(large)} files cannot be entered in the middle and have more than 1 GiB, such as "
            f"{large[0]}; each is tokenized as one unit, whose shard must fit in the cache. Smaller files, files that "
            "are not compressed, or shards (open-lm preprocess) are faster"
        )
    return units


def _load_reports(folder: TextFolder) -> Iterable[UnitReport]:
    """Yield the reports that an earlier process wrote. Skip a line that it did not complete."""
    for url in filter(storage.exists, (folder.url(UNITS_NAME), folder.url(JOURNAL_NAME))):
        for line in storage.read_bytes(url).split(b"\n"):
            try:
                yield UnitReport(**unescaped(orjson.loads(line)))
            except (ValueError, TypeError):
                continue


def save_reports(folder: TextFolder, reports: Sequence[UnitReport]) -> None:
    """Append reports to the journal, from which the run continues the index after it was killed."""
    url = folder.url(JOURNAL_NAME)
    if reports:
        with storage.wrap_disk_full_errors(url, folder.path), open(url, "ab") as journal:
            journal.write(b"\n")  # ends a line that a killed process has not completed
            journal.writelines(map(_line, reports))


def _line(report: UnitReport) -> bytes:
    return orjson.dumps(escaped(report.to_json()), option=orjson.OPT_APPEND_NEWLINE)


def start(index: TextIndex, encoder: DocumentEncoder) -> None:
    """Write the files that the tokenizing processes need. An index of other data no longer counts as finished."""
    folder = index.folder
    before = folder.state()
    if before is None or _changes(before, index.state):
        storage.remove(folder.url(DATASET_NAME))
        storage.remove(folder.url(STATE_NAME))  # must not describe an incompletely written tokenizer
        write_copy(folder.path, encoder.tokenizer_files())
        storage.write_bytes(folder.url(STATE_NAME), index.state.to_bytes())


def check_reports(index: TextIndex, max_bad_fraction: float) -> None:
    """Raise DataError if too many documents are unusable, or none is usable.

    While units are missing, only many unusable documents without a usable one are an error.
    """
    name, key, reports = index.state.name, index.state.options.content_key, index.reports.values()
    bad = Counter[str]()
    for report in reports:
        bad.update(report.bad)
    documents, shown = sum(report.documents for report in reports), [s for r in reports for s in r.bad_shown]
    is_complete = not index.missing
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.items())
    if bad.total() > max_bad_fraction * (documents + bad.total()) and (
        is_complete or (not documents and bad.total() >= _MIN_BAD)
    ):
        raise DataError(
            join_problems(
                shown[:_MAX_LISTED],
                f"{name}: {bad.total():,} of {documents + bad.total():,} documents cannot be used ({kinds}), more than "
                f"the fraction {max_bad_fraction:g}. Check --text-key {key}, fix the text, or raise the limit with "
                "--ignore-parse-errors --data-tolerate-error-p. The first",
            )
        )
    if is_complete and not documents:
        raise DataError(
            f"{name}: found no documents in {len(index.state.inputs)} files; check the files and --text-key {key}"
        )


def bad_fraction(data: DataConfig) -> float:
    """Return the largest fraction of unusable documents: that of preprocessing unless --ignore-parse-errors is set."""
    return data.data_tolerate_error_p if data.ignore_parse_errors else DEFAULT_BAD_FRACTION


def finish(index: TextIndex, dtype: np.dtype[Any], allow_changed: bool) -> dict[str, Any]:
    """Write the manifest, the tails and dataset.json of an index whose units all have reports; return the counts.

    Raises:
        DataError: a finished index had other shards, because the content of a file changed (without `allow_changed`).
    """
    folder, reports = index.folder, [index.reports[unit.key] for unit in index.units]
    old_entries = [entry for _, entry in folder.shards()] if folder.is_finished else None
    entries = [
        ManifestEntry(
            f"unit-{number:08d}",
            report.sequences,
            {
                "num_tokens": report.tokens - len(report.tail_ids(dtype)),
                "num_bytes": report.num_bytes,
                "sha256": report.sha256,
                PIECES_KEY: escaped(unit.to_json()),
            },
        )
        for number, (unit, report) in enumerate(zip(index.units, reports, strict=True))
        if report.sequences
    ]
    if old_entries is not None and not allow_changed and _content(old_entries) != _content(entries):
        raise DataError(
            f"{index.state.name}: the content of its files changed since the text index {folder.path} was made; "
            "restore them, choose another --text-index (or --name), or pass --allow-changed-data to make it again"
        )
    tails = [report.tail_ids(dtype) for report in reports]
    entries += _write_tails(folder, tails, index.state.options.length, dtype)
    storage.write_bytes(folder.url(UNITS_NAME), b"".join(map(_line, reports)))
    write_manifest(folder.url(MANIFEST_NAME), entries)
    storage.write_bytes(folder.url(STATE_NAME), index.state.to_bytes())
    record = _dataset_record(index, reports, entries)
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    storage.write_bytes(folder.url(DATASET_NAME), orjson.dumps(escaped(record), option=option))
    storage.remove(folder.url(JOURNAL_NAME))
    return dict(record["counts"])


def _content(entries: Iterable[ManifestEntry | None]) -> list[tuple[str, int, str]]:
    return [(e.shard, e.num_sequences, e.sha256) for e in entries if e is not None and e.shard != TAILS_STEM]


def _write_tails(
    folder: TextFolder, tails: Sequence[np.ndarray], length: int, dtype: np.dtype[Any]
) -> list[ManifestEntry]:
    """Write the shard of the ids that do not fill a sequence of their unit. Pad its last sequence."""
    sequences, rest = cut([np.zeros(0, dtype), *tails], length)
    if not len(sequences) and not len(rest):
        storage.remove(folder.url(f"{TAILS_STEM}.tar"))
        return []
    with ShardWriter(folder.url(f"{TAILS_STEM}.tar"), "npy", dtype=dtype) as writer:
        writer.write_numbered(0, sequences)
        if len(rest):
            writer.write_numbered(len(sequences), pad(rest, length)[None])
    info = writer.info
    facts = {"num_tokens": info.num_tokens, "num_bytes": info.num_bytes, "sha256": info.sha256}
    return [ManifestEntry(TAILS_STEM, info.num_sequences, facts)]


def _dataset_record(
    index: TextIndex, reports: Sequence[UnitReport], entries: Sequence[ManifestEntry]
) -> dict[str, Any]:
    bad = Counter[str]()
    for report in reports:
        bad.update(report.bad)
    tokens = sum(report.tokens for report in reports)
    sequences = sum(entry.num_sequences for entry in entries)
    return {
        "settings": {**index.state.settings(), "tokenizer": index.state.tokenizer},
        "inputs": _with_digests(index, reports),
        "counts": {
            "documents": sum(report.documents for report in reports),
            "characters": sum(report.characters for report in reports),
            "tokens": tokens,
            "sequences": sequences,
            "pads": sequences * index.state.options.length - tokens,
            "shards": len(entries),
            "bytes": sum(entry.num_bytes or 0 for entry in entries),
            "bad_documents": bad.total(),
            "lenient_json": sum(report.lenient for report in reports),
            "special_token_documents": sum(report.special for report in reports),
        },
        "bad_documents": dict(bad),
        "bad_documents_first": [line for report in reports for line in report.bad_shown][:_MAX_LISTED],
    }


def _with_digests(index: TextIndex, reports: Sequence[UnitReport]) -> list[dict[str, Any]]:
    """Return the records of the input files, each with the SHA-256 of its content or of its pieces' digests."""
    digests: dict[str, list[str | None]] = {}
    for unit, report in zip(index.units, reports, strict=True):
        for piece, digest in zip(unit.pieces, report.digests, strict=True):
            digests.setdefault(piece.url, []).append(digest)
    records = input_records([item for item in index.state.inputs if item.url in digests])
    for record in records:
        known = [digest for digest in digests[record["url"]] if digest != ""]
        if known and None not in known:
            joined = hashlib.sha256("".join(map(str, known)).encode()).hexdigest()
            record["sha256" if len(known) == 1 else "sha256_of_pieces"] = known[0] if len(known) == 1 else joined
    return records


def describe(index: TextFolder, counts: dict[str, Any]) -> str:
    """Summarize an index in one sentence."""
    text = (
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens (including end-of-text ids), "
        f"{counts['sequences']:,} sequences"
    )
    if counts["bad_documents"]:
        text += f"; {counts['bad_documents']:,} unusable documents skipped"
    if counts["special_token_documents"]:
        text += f"; {counts['special_token_documents']:,} documents with the text of special tokens, encoded as text"
    return f"{text}; index in {index.path}"
