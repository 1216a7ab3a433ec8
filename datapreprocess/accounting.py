"""Account for all documents and tokens of a run: totals read, written and rejected, and a check that they agree."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.data.shard_format import PAD_ID, member_key
from open_lm.datapreprocess.inputs import InputFile, Unit
from open_lm.datapreprocess.job import SPECIAL_TOKENS, PreprocessJob, input_records
from open_lm.datapreprocess.readers import BadDocument
from open_lm.datapreprocess.readers.base import CUT_SHORT
from open_lm.datapreprocess.units import MAX_SHOWN, BrokenInput, UnitReport
from open_lm.datapreprocess.writer import ShardPlan, Tail, WrittenShard
from open_lm.errors import join_problems

# The counts of every data set; encoders may add others.
_COUNTS = (
    "documents", "characters", "tokens", "sequences", "pads", "shards", "bytes", "bad_documents", "lenient_json",
    "special_token_documents",
)  # fmt: skip
MASKED = "masked_tokens"  # the count of tokens that are no targets, of encoders whose ids have flags


@dataclass(frozen=True)
class Output:
    """A written output: that of one `source`, or of all sources together if `source` is ""."""

    source: str
    units: Sequence[Unit]
    reports: Sequence[UnitReport]
    shards: Sequence[ShardPlan]
    written: Sequence[WrittenShard]
    tail: Tail

    def verify_totals(self, drop_tail: bool) -> None:
        """Raise RuntimeError unless every encoded token is in the shards; a difference is a bug in this package."""
        encoded = sum(report.tokens for report in self.reports)
        written = sum(result.info.num_tokens for result in self.written)
        dropped = len(self.tail.ids) if drop_tail else 0
        by_source = sum(sum(result.sources.values()) for result in self.written)
        masked = (total_counts(self.reports).get(MASKED, 0), sum(result.info.num_masked for result in self.written))
        if encoded != written + dropped or written != by_source:
            raise RuntimeError(
                f"token totals do not agree: {encoded} encoded, {written} written ({by_source} when summed by source), "
                f"{dropped} dropped"
            )
        if masked[0] != masked[1]:
            raise RuntimeError(f"numbers of masked tokens do not agree: {masked[0]} encoded, {masked[1]} written")


def dataset_record(
    job: PreprocessJob, settings: dict[str, Any], encoder: str, outputs: Sequence[Output]
) -> dict[str, Any]:
    """Return the content of dataset.json: settings, inputs, counts, sources, bad documents and tails."""
    reports = [report for output in outputs for report in output.reports]
    units = {unit.index: unit for output in outputs for unit in output.units}
    infos = [result.info for output in outputs for result in output.written]
    used = {piece.url for unit in units.values() for piece in unit.pieces}
    inputs = [item for item in job.inputs if item.url in used]
    tails = [tail_record(job, output) for output in outputs]
    return {
        "tool": {"name": "open_lm", "version": _version(), "encoder": encoder},
        "settings": settings,
        "inputs": with_digests(inputs, units, reports, has_sources=bool(job.sampling.markers or job.sampling.files)),
        "counts": {
            "documents": sum(report.documents for report in reports),
            "characters": sum(report.characters for report in reports),
            "tokens": sum(report.tokens for report in reports),
            "sequences": sum(info.num_sequences for info in infos),
            "pads": sum(report.pads for report in reports) + sum(tail.get("pads", 0) for tail in tails),
            "shards": len(infos),
            "bytes": sum(info.num_bytes for info in infos),
            "bad_documents": sum(bad_counts(reports).values()),
            "lenient_json": sum(report.lenient for report in reports),
            "special_token_documents": sum(report.special for report in reports),
            **total_counts(reports),
        },
        "sources": _source_records(inputs, units, reports),
        "mixture": job.mixture,
        "bad_documents": bad_counts(reports),
        "bad_documents_first": [location for location, _ in with_locations(list(units.values()), reports)][:MAX_SHOWN],
        "broken_files": [broken.detail for report in reports for broken in report.broken],
        "tail": tails[0] if len(tails) == 1 else {"fate": "in each source's own record"},
    }


def _source_records(
    inputs: Sequence[InputFile], units: Mapping[int, Unit], reports: Sequence[UnitReport]
) -> dict[str, dict[str, int]]:
    records: dict[str, dict[str, int]] = {}
    files: dict[str, set[str]] = {}
    for report in reports:
        unit = units[report.index]
        counts = records.setdefault(unit.source, {"files": 0, "documents": 0, "characters": 0, "tokens": 0})
        files.setdefault(unit.source, set()).update(piece.url for piece in unit.pieces)
        counts["files"] = len(files[unit.source])
        counts["documents"] += report.documents
        counts["characters"] += report.characters
        counts["tokens"] += report.tokens
    return dict(sorted(records.items()))


def with_digests(
    inputs: Sequence[InputFile], units: Mapping[int, Unit], reports: Sequence[UnitReport], *, has_sources: bool
) -> list[dict[str, Any]]:
    """Return the records of the inputs with the SHA-256 of each file and, with `has_sources`, its source.

    A file that was read in pieces has the SHA-256 of its pieces; one with a piece whose digest is unknown has none.
    """
    pieces: dict[str, dict[tuple[int, int], str | None]] = {}
    sources: dict[str, str] = {}
    for report in reports:
        unit = units[report.index]
        digested = unit.pieces if len(report.digests) == len(unit.pieces) else ()
        for piece, digest in zip(digested, report.digests, strict=False):
            pieces.setdefault(piece.url, {})[piece.start, piece.end] = digest
        sources |= {piece.url: unit.source for piece in unit.pieces}
    records = input_records(inputs)
    for record in records:
        if has_sources:
            record["source"] = sources[record["url"]]
        digests = [(span, digest) for span, digest in sorted(pieces.get(record["url"], {}).items()) if digest != ""]
        if any(digest is None for _, digest in digests):
            continue
        if len(digests) == 1:
            record["sha256"] = digests[0][1]
        elif digests:
            record["sha256_of_pieces"] = hashlib.sha256(
                "".join(str(digest) for _, digest in digests).encode()
            ).hexdigest()
            record["pieces"] = [list(span) for span, _ in digests]
    return records


def tail_record(job: PreprocessJob, output: Output) -> dict[str, Any]:
    """Return the dataset.json entry for the ids after the last full sequence: none, dropped, or padded to a member."""
    tokens = len(output.tail.ids)
    if not tokens:
        return {"fate": "none", "tokens": 0}
    if job.drop_tail:
        return {"fate": "dropped", "tokens": tokens}
    last = output.shards[-1]
    return {
        "fate": "padded",
        "tokens": tokens,
        "pads": job.length - tokens,
        "pad_id": PAD_ID,
        "folder": last.folder,
        "shard": last.url.rpartition("/")[2].removesuffix(".tar"),
        "key": member_key(last.first + last.count - 1),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("open_lm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summary(record: Mapping[str, Any]) -> str:
    """Summarize a finished data set in one sentence."""
    counts, tail, length = record["counts"], record["tail"], record["settings"]["seq_len"] + 1
    text = (
        f"{plural(counts['documents'], 'document')}, {plural(counts['tokens'], 'token')} (including end-of-text ids), "
        f"{plural(counts['sequences'], 'sequence')} of {length} ids in {plural(counts['shards'], 'shard')}"
    )
    if counts["pads"]:
        text += f", {plural(counts['pads'], 'padding id')}"
    if tail["fate"] == "dropped":
        text += f", {plural(tail['tokens'], 'token')} of the tail dropped"
    if counts["bad_documents"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in record["bad_documents"].items())
        text += f"; rejected documents: {kinds}"
    if counts.get("lenient_json"):  # older records have no such count
        text += f"; {plural(counts['lenient_json'], 'document')} from JSON that is not strict (NaN or the like)"
    if number := counts.get("special_token_documents"):
        kept = "ids, which end documents" if record["settings"].get(SPECIAL_TOKENS) == "ids" else "plain text"
        text += f"; {plural(number, 'document')} with the text of special tokens, encoded as {kept}"
    for name, count in counts.items():
        if name not in _COUNTS and count:
            text += f"; {count:,} {name.replace('_', ' ')}"
    if record["broken_files"]:
        text += f"; broken files: {len(record['broken_files']):,}"
    return text


# --- bad documents -----------------------------------------------------------------------------------------------


def bad_counts(reports: Iterable[UnitReport]) -> dict[str, int]:
    """Return the number of rejected documents by kind."""
    counts: dict[str, int] = {}
    for report in reports:
        for kind, count in report.bad.items():
            counts[kind] = counts.get(kind, 0) + count
    return dict(sorted(counts.items()))


def total_counts(reports: Iterable[UnitReport]) -> dict[str, int]:
    """Return the sums of the reports' further counts, by name."""
    counts: dict[str, int] = {}
    for report in reports:
        for name, count in report.counts.items():
            counts[name] = counts.get(name, 0) + count
    return dict(sorted(counts.items()))


def exceeds_bad_fraction(units: Sequence[Unit], reports: Sequence[UnitReport], limit: float) -> bool:
    """Return whether the lost fraction of documents, of files or of input bytes exceeds `limit`.

    While a run is still reading, the total number of documents is extrapolated from the bytes read so far. A wrong
    content key is then detected at once and not after days.
    """
    total_bytes = sum(unit.num_bytes for unit in units)
    files = len({piece.url for unit in units for piece in unit.pieces})
    bad = sum(bad_counts(reports).values())
    broken = [broken for report in reports for broken in report.broken]
    lost_bytes = sum(item.lost_bytes for item in broken)
    read_bytes = sum(report.num_bytes for report in reports)
    documents = (sum(report.seen for report in reports) + bad) * max(1.0, total_bytes / max(1, read_bytes))
    return bad > limit * documents or len(broken) > limit * files or lost_bytes > limit * total_bytes


def bad_input_message(units: Sequence[Unit], reports: Sequence[UnitReport], *, limit: float, rejects: str) -> str:
    """Return an error message that lists the first broken files and bad documents with file and line."""
    bad, seen = sum(bad_counts(reports).values()), sum(report.seen for report in reports)
    all_broken = [broken for report in reports for broken in report.broken]
    lines = [broken.detail for broken in all_broken][:MAX_SHOWN]
    lines += [f"{location}: {item.kind}: {item.detail}" for location, item in with_locations(units, reports)][
        :MAX_SHOWN
    ]
    hidden = bad + len(all_broken) - len(lines)
    lines += [f"and {hidden} more in the input read so far"] if hidden > 0 else []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad_counts(reports).items())
    files = plural(len({piece.url for unit in units for piece in unit.pieces}), "file")
    facts = [f"{bad:,} of {plural(bad + seen, 'document')} ({kinds})"] if bad else []
    facts += [f"{len(all_broken)} of {files} broken, {_losses(units, all_broken)}"] if all_broken else []
    return join_problems(
        lines,
        f"Some of the input cannot be used: {'; '.join(facts)}; --max-bad-fraction allows {limit:g}. Fix the input, or "
        "increase --max-bad-fraction (1 skips and counts all bad input); finished work is kept. All rejected documents "
        f"are listed in {rejects}. First problems",
    )


def _losses(units: Sequence[Unit], all_broken: Sequence[BrokenInput]) -> str:
    """Describe what broken files lose: bytes that were not read, and the unknown rest of truncated files."""
    lost = sum(broken.lost_bytes for broken in all_broken)
    truncated = sum(broken.kind == CUT_SHORT for broken in all_broken)
    facts = [f"{lost:,} of {sum(unit.num_bytes for unit in units):,} bytes lost"] if lost or not truncated else []
    facts += [f"an unknown number of bytes missing from {plural(truncated, 'truncated file')}"] if truncated else []
    return ", ".join(facts)


def line_bases(units: Sequence[Unit], reports: Sequence[UnitReport]) -> dict[tuple[str, int], int]:
    """Return the number of lines of a file before each piece (url, start), where it is known."""
    by_index = {report.index: report for report in reports}
    bases: dict[tuple[str, int], int] = {}
    for unit in units:
        report = by_index.get(unit.index)
        for piece, lines in zip(unit.pieces, report.lines if report else (), strict=False):
            base = 0 if piece.start == 0 else bases.get((piece.url, piece.start))
            if base is not None:
                bases[piece.url, piece.end] = base + lines
    return bases


def with_locations(units: Sequence[Unit], reports: Sequence[UnitReport]) -> Iterator[tuple[str, BadDocument]]:
    """Yield (location, bad document) pairs; lines are counted from the start of the file where possible."""
    bases = line_bases(units, reports)
    for report in reports:
        for bad in report.bad_shown:
            base = 0 if bad.start == 0 else bases.get((bad.url, bad.start))
            if not bad.line:
                yield bad.url, bad
            elif base is None:
                yield f"{bad.url} line {bad.line} of the piece that starts at {bad.start}", bad
            else:
                yield f"{bad.url} line {base + bad.line}", bad
