"""The books of a run: what was read, what was written, what was left out, and that the sums agree."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.data.shard_format import PAD_ID, member_key
from open_lm.datapreprocess.inputs import InputFile, Unit
from open_lm.datapreprocess.job import PreprocessJob, input_records
from open_lm.datapreprocess.readers import BadDocument
from open_lm.datapreprocess.units import MAX_SHOWN, UnitReport
from open_lm.datapreprocess.writer import ShardPlan, Tail, WrittenShard
from open_lm.errors import join_problems


@dataclass(frozen=True)
class Output:
    """What was written for one output: of the one `source`, or, where that is "", of all together."""

    source: str
    units: Sequence[Unit]
    reports: Sequence[UnitReport]
    shards: Sequence[ShardPlan]
    written: Sequence[WrittenShard]
    tail: Tail

    def check(self, drop_tail: bool) -> None:
        """Every token that was made is in the shards, once. Anything else is a defect of ours: RuntimeError."""
        made = sum(report.tokens for report in self.reports)
        written = sum(result.info.num_tokens for result in self.written)
        dropped = len(self.tail.ids) if drop_tail else 0
        by_source = sum(sum(result.sources.values()) for result in self.written)
        if made != written + dropped or written != by_source:
            raise RuntimeError(
                f"{made} tokens were made, {written} written ({by_source} by source) and {dropped} dropped: "
                "the sums differ"
            )


def dataset_record(
    job: PreprocessJob, settings: dict[str, Any], encoder: str, outputs: Sequence[Output]
) -> dict[str, Any]:
    """What stands in dataset.json: settings, inputs, counts, sources, bad documents and the fate of the tails."""
    reports = [report for output in outputs for report in output.reports]
    units = {unit.index: unit for output in outputs for unit in output.units}
    infos = [result.info for output in outputs for result in output.written]
    used = {piece.url for unit in units.values() for piece in unit.pieces}
    inputs = [item for item in job.inputs if item.url in used]
    tails = [tail_record(job, output) for output in outputs]
    return {
        "tool": {"name": "open_lm", "version": _version(), "encoder": encoder},
        "settings": settings,
        "inputs": with_digests(inputs, units, reports),
        "counts": {
            "documents": sum(report.documents for report in reports),
            "characters": sum(report.characters for report in reports),
            "tokens": sum(report.tokens for report in reports),
            "sequences": sum(info.num_sequences for info in infos),
            "pads": sum(report.pads for report in reports) + sum(tail.get("pads", 0) for tail in tails),
            "shards": len(infos),
            "bytes": sum(info.num_bytes for info in infos),
            "bad_documents": sum(bad_counts(reports).values()),
        },
        "sources": _source_records(inputs, units, reports),
        "mixture": job.mixture,
        "bad_documents": bad_counts(reports),
        "bad_documents_first": [place for place, _ in with_locations(list(units.values()), reports)][:MAX_SHOWN],
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
    inputs: Sequence[InputFile], units: Mapping[int, Unit], reports: Sequence[UnitReport]
) -> list[dict[str, Any]]:
    """Records of the inputs with the sha256 of what was read: of the file, or of the pieces that it was cut into."""
    pieces: dict[str, dict[tuple[int, int], str]] = {}
    for report in reports:
        unit = units[report.index]
        covered = unit.pieces if len(report.digests) == len(unit.pieces) else ()
        for piece, digest in zip(covered, report.digests, strict=False):
            if digest:
                pieces.setdefault(piece.url, {})[piece.start, piece.end] = digest
    records = input_records(inputs)
    for record in records:
        found = sorted(pieces.get(record["url"], {}).items())
        if len(found) == 1:
            record["sha256"] = found[0][1]
        elif found:
            record["sha256_of_pieces"] = hashlib.sha256("".join(digest for _, digest in found).encode()).hexdigest()
            record["pieces"] = [list(span) for span, _ in found]
    return records


def tail_record(job: PreprocessJob, output: Output) -> dict[str, Any]:
    """What became of the ids after the last full sequence: nothing left, dropped, or padded in the last member."""
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
    """A count with its noun: 1 shard, 2,000 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summary(record: Mapping[str, Any]) -> str:
    """A data set in a sentence."""
    counts, tail, length = record["counts"], record["tail"], record["settings"]["seq_len"] + 1
    text = (
        f"{plural(counts['documents'], 'document')}, {plural(counts['tokens'], 'token')} (end-of-text ids included), "
        f"{plural(counts['sequences'], 'sequence')} of {length} ids in {plural(counts['shards'], 'shard')}"
    )
    if counts["pads"]:
        text += f", {plural(counts['pads'], 'pad')} in them"
    if tail["fate"] == "dropped":
        text += f", {plural(tail['tokens'], 'token')} of the tail dropped"
    if counts["bad_documents"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in record["bad_documents"].items())
        text += f"; left out: {kinds}"
    if record["broken_files"]:
        text += f"; broken: {plural(len(record['broken_files']), 'file')}"
    return text


# --- bad documents -----------------------------------------------------------------------------------------------


def bad_counts(reports: Iterable[UnitReport]) -> dict[str, int]:
    """How many documents could not be used, by kind."""
    counts: dict[str, int] = {}
    for report in reports:
        for kind, count in report.bad.items():
            counts[kind] = counts.get(kind, 0) + count
    return dict(sorted(counts.items()))


def exceeds_bad_fraction(units: Sequence[Unit], reports: Sequence[UnitReport], limit: float) -> bool:
    """Whether more is lost than the limit allows: of all documents, of all files as broken, or of all bytes with them.

    While only a part of the bytes is read, its documents are taken to stand for the rest, so that a wrong key is told
    at once and not after days.
    """
    total_bytes = sum(unit.num_bytes for unit in units)
    files = len({piece.url for unit in units for piece in unit.pieces})
    bad = sum(bad_counts(reports).values())
    broken = [broken for report in reports for broken in report.broken]
    lost_bytes = sum(found.lost_bytes for found in broken)
    read_bytes = sum(report.num_bytes for report in reports)
    documents = (sum(report.seen for report in reports) + bad) * max(1.0, total_bytes / max(1, read_bytes))
    return bad > limit * documents or len(broken) > limit * files or lost_bytes > limit * total_bytes


def bad_input_message(units: Sequence[Unit], reports: Sequence[UnitReport], *, limit: float, rejects: str) -> str:
    """What could not be used, the first of each with file and line, as one message."""
    bad, seen = sum(bad_counts(reports).values()), sum(report.seen for report in reports)
    all_broken = [broken for report in reports for broken in report.broken]
    lines = [broken.detail for broken in all_broken][:MAX_SHOWN]
    lines += [f"{place}: {found.kind}: {found.detail}" for place, found in with_locations(units, reports)][:MAX_SHOWN]
    hidden = bad + len(all_broken) - len(lines)
    lines += [f"and {hidden} more in what was read so far"] if hidden > 0 else []
    lost = sum(broken.lost_bytes for broken in all_broken)
    total_bytes = sum(unit.num_bytes for unit in units)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad_counts(reports).items())
    files = plural(len({piece.url for unit in units for piece in unit.pieces}), "file")
    facts = [f"{bad:,} of {plural(bad + seen, 'document')} ({kinds})"] if bad else []
    facts += [f"{len(all_broken)} of {files} broken, {lost:,} of {total_bytes:,} bytes lost"] if all_broken else []
    return join_problems(
        lines,
        f"Some of the input cannot be used: {'; '.join(facts)}; --max-bad-fraction allows {limit:g}. Mend it, or allow "
        f"more with --max-bad-fraction (1 leaves out and counts whatever is bad); finished work is kept. All that was "
        f"rejected is in {rejects}",
    )


def line_bases(units: Sequence[Unit], reports: Sequence[UnitReport]) -> dict[tuple[str, int], int]:
    """The lines of a file before each place (url, start) where it was cut, as far as they are known."""
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
    """Each noted bad document with its place. Lines of a file that was cut are counted from the file's beginning."""
    bases = line_bases(units, reports)
    for report in reports:
        for bad in report.bad_shown:
            base = 0 if bad.start == 0 else bases.get((bad.url, bad.start))
            if not bad.line:
                yield bad.url, bad
            elif base is None:
                yield f"{bad.url} line {bad.line} of the part that begins at {bad.start}", bad
            else:
                yield f"{bad.url} line {base + bad.line}", bad
