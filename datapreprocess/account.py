"""The books of a run: what was read, what was written, what was left out, and that the sums agree."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from open_lm.data.shard_format import PAD_ID, ShardInfo
from open_lm.datapreprocess.job import Job, Unit
from open_lm.datapreprocess.readers import BadDocument
from open_lm.datapreprocess.units import MAX_SHOWN, UnitReport
from open_lm.datapreprocess.writer import ShardPlan, member_key
from open_lm.errors import join_problems


def check_counts(reports: Iterable[UnitReport], infos: Iterable[ShardInfo], dropped_tokens: int) -> None:
    """Every token that was made is in the shards, once. Anything else is a defect of ours: RuntimeError."""
    made = sum(report.tokens for report in reports)
    written = sum(info.num_tokens for info in infos)
    if made != written + dropped_tokens:
        raise RuntimeError(f"{made} tokens were made, {written} written and {dropped_tokens} dropped: the sums differ")


def data_set_record(
    job: Job,
    units: Sequence[Unit],
    reports: Sequence[UnitReport],
    *,
    shards: Sequence[ShardPlan],
    infos: Sequence[ShardInfo],
    tail: np.ndarray,
) -> dict[str, Any]:
    """Counts, sources, bad documents and the fate of the tail, as they stand in dataset.json."""
    sources: dict[str, dict[str, int]] = {}
    for unit, report in zip(units, reports, strict=True):
        counts = sources.setdefault(unit.source, {"documents": 0, "tokens": 0})
        counts["documents"] += report.documents
        counts["tokens"] += report.tokens
    by_index = {report.index: report for report in reports}
    return {
        "tool": {"name": "open_lm", "version": _version()},
        "counts": {
            "documents": sum(report.documents for report in reports),
            "characters": sum(report.characters for report in reports),
            "tokens": sum(report.tokens for report in reports),
            "sequences": sum(info.num_sequences for info in infos),
            "shards": len(infos),
            "bytes": sum(info.num_bytes for info in infos),
            "bad_documents": sum(bad_counts(reports).values()),
        },
        "sources": sources if job.sampling else {},
        "bad_documents": bad_counts(reports),
        "bad_documents_first": [place for place, _ in _located(units, by_index)][:MAX_SHOWN],
        "tail": _tail_record(job, shards, tail),
    }


def _tail_record(job: Job, shards: Sequence[ShardPlan], tail: np.ndarray) -> dict[str, Any]:
    """What became of the ids after the last full sequence: nothing left, dropped, or padded in the last member."""
    if not len(tail):
        return {"fate": "none", "tokens": 0}
    if job.drop_tail:
        return {"fate": "dropped", "tokens": len(tail)}
    last = shards[-1]
    return {
        "fate": "padded",
        "tokens": len(tail),
        "pads": job.length - len(tail),
        "pad_id": PAD_ID,
        "folder": job.layout.folders[last.folder],
        "shard": last.url.rpartition("/")[2].removesuffix(".tar"),
        "key": member_key(last.first + last.count - 1),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("open_lm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def summary(record: Mapping[str, Any]) -> str:
    """A data set in a sentence."""
    counts, tail, length = record["counts"], record["tail"], record["settings"]["seq_len"] + 1
    text = (
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens (end-of-text ids included), "
        f"{counts['sequences']:,} sequences of {length} ids in {counts['shards']:,} shards"
    )
    if tail["fate"] == "padded":
        text += f", the last one with {tail['pads']:,} pads"
    if tail["fate"] == "dropped":
        text += f", {tail['tokens']:,} tokens of the tail dropped"
    if counts["bad_documents"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in record["bad_documents"].items())
        text += f"; left out: {kinds}"
    return text


# --- bad documents -----------------------------------------------------------------------------------------------


def bad_counts(reports: Iterable[UnitReport]) -> dict[str, int]:
    """How many documents could not be used, by kind."""
    counts: dict[str, int] = {}
    for report in reports:
        for kind, count in report.bad.items():
            counts[kind] = counts.get(kind, 0) + count
    return dict(sorted(counts.items()))


def explain_bad_documents(units: Sequence[Unit], reports: Mapping[int, UnitReport]) -> str:
    """The first bad documents with file and line, as one message."""
    lines = [f"{place}: {bad.kind}: {bad.detail}" for place, bad in _located(units, reports)][:MAX_SHOWN]
    more = sum(bad_counts(reports.values()).values()) - len(lines)
    lines += [f"and {more} more in what was read so far"] if more > 0 else []
    return join_problems(
        lines, "Some documents cannot be used; mend them, or leave them out and count them with --skip-bad-lines"
    )


def _located(units: Sequence[Unit], reports: Mapping[int, UnitReport]) -> Iterator[tuple[str, BadDocument]]:
    """Each noted bad document with its place. Lines of a file that was cut are counted from the file's beginning."""
    lines_before: dict[tuple[str, int], int] = {}
    for unit in units:
        report = reports.get(unit.index)
        if unit.copy or report is None:
            continue
        for piece, lines in zip(unit.pieces, report.lines, strict=False):
            base = 0 if piece.start == 0 else lines_before.get((piece.url, piece.start))
            if base is not None:
                lines_before[piece.url, piece.end] = base + lines
        for bad in report.bad_shown:
            base = 0 if bad.start == 0 else lines_before.get((bad.url, bad.start))
            if not bad.line:
                yield bad.url, bad
            elif base is None:
                yield f"{bad.url} line {bad.line} after byte {bad.start}", bad
            else:
                yield f"{bad.url} line {base + bad.line}", bad
