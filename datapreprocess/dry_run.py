"""A dry run: read and tokenize a little of the inputs, and tell what the whole would give and take. Writes nothing.

What is counted in the probes of a source stands for the rest of it by its bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from open_lm import storage
from open_lm.datapreprocess.cluster import local_workers
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.job import PreprocessJob, shard_size
from open_lm.datapreprocess.memory import SPILLED_BYTES_PER_INPUT_BYTE, plan_budget
from open_lm.datapreprocess.probe import Probe, probe
from open_lm.datapreprocess.progress import clock, memory_in_use, size
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError, join_problems

_SAMPLE_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # so much may be read of any input; of a larger one at most a quarter
# Not measured here: what a disk takes, what Ray and a worker's buffers hold, how storage reads and writes objects.
_DISK_BYTES_PER_S = 200e6
_RAY_BYTES = 512 << 20
_BUFFERS_PER_WORKER = 4  # buffers that a worker holds at once
_GET_BYTES, _PUT_BYTES = 8 << 20, 16 << 20
_KEY_BYTES = 8  # of a sequence in the work folder, beside its ids


@dataclass(frozen=True)
class SourceEstimate:
    """Predictions for the files of a source; documents and tokens count each pass that the sampling makes over them.

    documents_error, tokens_error: twice the standard error as a share; None where nothing tells. So it is with the
    number of documents where only beginnings of files are known: in many a corpus it is another further on.
    """

    name: str
    files: int
    num_bytes: int
    factor: float
    probes: int
    sampled_bytes: int
    documents: float
    tokens: float
    documents_error: float | None
    tokens_error: float | None


@dataclass(frozen=True)
class Estimate:
    """Predictions for a whole run; `problems` tells of files that cannot be read.

    bad_documents: those in the probes.
    """

    sources: tuple[SourceEstimate, ...]
    total: SourceEstimate
    sequences: int
    shards: int
    output_bytes: int
    work_bytes: int
    memory_bytes: int
    workers: int
    encode_bytes_per_s: float
    tokenize_s: float
    write_s: float
    get_requests: int
    put_requests: int
    bad_documents: int
    problems: tuple[str, ...]


@dataclass
class _Source:
    name: str
    factor: float
    files: list[InputFile] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.files)

    @property
    def read(self) -> int:
        return sum(found.read for found in self.probes)

    def density(self, count: Callable[[Probe], float]) -> float:
        """How much of something a byte of input holds."""
        known = sum(found.stands_for for found in self.probes)
        return sum(map(count, self.probes)) / known if known else 0.0


def estimate(job: PreprocessJob, encoder: DocumentEncoder, sample_bytes: int = _SAMPLE_BYTES) -> Estimate:
    """Predict a run from about `sample_bytes` of its inputs, and at most a quarter of them where they are not tiny.

    DataError when no document is found in what is read.
    """
    sources = _sources(job)
    budget = min(sample_bytes, max(_SMALL_BYTES, job.num_bytes // 4))
    if job.tokenizer:
        encoder.encode(["This loads the tokenizer before the clock runs."])
    for number, source in enumerate(sources):
        draw = float(np.random.default_rng([job.seed, number]).random())
        source.probes = probe(source.files, budget * source.num_bytes / max(1, job.num_bytes), draw, job, encoder)
    if not any(found.documents for source in sources for found in source.probes):
        told = [found.problem for source in sources for found in source.probes if found.problem]
        told = told or [f"no document in the sampled parts of {len(job.inputs)} files; is --content_key right?"]
        raise DataError(join_problems(told))
    return _predict(job, encoder, sources)


def _sources(job: PreprocessJob) -> list[_Source]:
    sources: dict[str, _Source] = {}
    for item in job.inputs:
        name = job.sampling.source_of(item.url)
        sources.setdefault(name, _Source(name, job.sampling.factor(name))).files.append(item)
    return [sources[name] for name in sorted(sources)]


# --- predicting --------------------------------------------------------------------------------------------------


def _predict(job: PreprocessJob, encoder: DocumentEncoder, sources: Sequence[_Source]) -> Estimate:
    document_errors = _errors(sources, lambda found: found.documents)
    token_errors = _errors(sources, lambda found: found.tokens)
    parts = [
        SourceEstimate(
            name=source.name,
            files=len(source.files),
            num_bytes=source.num_bytes,
            factor=source.factor,
            probes=len(source.probes),
            sampled_bytes=source.read,
            documents=source.density(lambda found: found.documents) * source.num_bytes * source.factor,
            tokens=source.density(lambda found: found.tokens) * source.num_bytes * source.factor,
            documents_error=None if any(found.beginning for found in source.probes) else documents_error,
            tokens_error=tokens_error,
        )
        for source, documents_error, tokens_error in zip(sources, document_errors, token_errors, strict=True)
    ]
    total = _total(parts)
    sequences = int(total.tokens) // job.length + (not job.drop_tail)
    shards = _shards(job, parts, sequences)
    members = [member for source in sources for found in source.probes for member in found.member_bytes]
    output_bytes = int(sequences * sum(members) / len(members))
    work_bytes = sequences * (job.length * encoder.dtype.itemsize + _KEY_BYTES)
    workers = local_workers(job.workers) if job.ray_address is None else job.workers or 1
    budget = plan_budget(job.memory_limit, workers, job.num_bytes * SPILLED_BYTES_PER_INPUT_BYTE)
    held_bytes = _BUFFERS_PER_WORKER * min(budget.buffer_bytes, work_bytes)
    seconds = sum(source.density(lambda found: found.seconds) * source.num_bytes * source.factor for source in sources)
    taken_bytes = sum(source.num_bytes * source.factor for source in sources)
    return Estimate(
        sources=tuple(parts),
        total=total,
        sequences=sequences,
        shards=shards,
        output_bytes=output_bytes,
        work_bytes=work_bytes,
        memory_bytes=budget.workers * (memory_in_use([os.getpid()]) + held_bytes) + _RAY_BYTES,
        workers=budget.workers,
        encode_bytes_per_s=taken_bytes / seconds if seconds else 0.0,
        tokenize_s=seconds / budget.workers,
        write_s=(2 * work_bytes + output_bytes) / _DISK_BYTES_PER_S,
        get_requests=_gets(sources),
        put_requests=_puts(job, shards, output_bytes),
        bad_documents=sum(found.bad for source in sources for found in source.probes),
        problems=tuple(found.problem for source in sources for found in source.probes if found.problem),
    )


def _errors(sources: Sequence[_Source], count: Callable[[Probe], float]) -> list[float | None]:
    """Twice the standard error of each source's density as a share of it; None where no source has two pieces.

    The spread of pieces around their source is taken to be alike in all sources, so that those with one piece have
    one too. What was read whole has no error.
    """
    squares, freedom = 0.0, 0
    for source in sources:
        mean = source.density(count)
        useful = [found for found in source.probes if found.stands_for]
        if mean and len(useful) > 1:
            average = sum(found.stands_for for found in useful) / len(useful)
            squares += sum(((count(found) / mean - found.stands_for) / average) ** 2 for found in useful)
            freedom += len(useful) - 1
    errors: list[float | None] = []
    for source in sources:
        unread = max(0.0, 1.0 - source.read / max(1, source.num_bytes))
        if unread and not freedom:
            errors.append(None)
        else:
            spread = squares / freedom if freedom else 0.0
            errors.append(2 * math.sqrt(spread / max(1, len(source.probes)) * unread))
    return errors


def _total(parts: Sequence[SourceEstimate]) -> SourceEstimate:
    """All sources together; their errors are independent."""

    def error(amounts: Sequence[float], errors: Sequence[float | None]) -> float | None:
        if None in errors:
            return None
        return math.hypot(*(a * (e or 0.0) for a, e in zip(amounts, errors, strict=True))) / (sum(amounts) or 1.0)

    documents, tokens = [part.documents for part in parts], [part.tokens for part in parts]
    return SourceEstimate(
        name="total",
        files=sum(part.files for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        factor=1.0,
        probes=sum(part.probes for part in parts),
        sampled_bytes=sum(part.sampled_bytes for part in parts),
        documents=sum(documents),
        tokens=sum(tokens),
        documents_error=error(documents, [part.documents_error for part in parts]),
        tokens_error=error(tokens, [part.tokens_error for part in parts]),
    )


def _shards(job: PreprocessJob, parts: Sequence[SourceEstimate], sequences: int) -> int:
    """Shards in all folders; every source has its own where the layout says so."""
    outputs = [(part.name, int(part.tokens) // job.length) for part in parts] if job.layout.per_source else []
    shards = 0
    for name, count in outputs or [("", sequences)]:
        folders = len(job.layout.folders_of(name))
        shards += folders * math.ceil(count / folders / shard_size(count, job.layout.shard_sequences))
    return shards


def _gets(sources: Sequence[_Source]) -> int:
    """Requests that read the remote inputs, once for each pass."""
    return sum(
        math.ceil(source.factor) * max(1, math.ceil(item.num_bytes / _GET_BYTES))
        for source in sources
        for item in source.files
        if storage.is_remote(item.url)
    )


def _puts(job: PreprocessJob, shards: int, output_bytes: int) -> int:
    """Requests that write the shards, in parts where they are large."""
    if not storage.is_remote(job.layout.root):
        return 0
    return shards * max(1, math.ceil(output_bytes / max(1, shards) / _PUT_BYTES))


# --- telling -----------------------------------------------------------------------------------------------------


def describe(prediction: Estimate) -> str:
    """A table of the sources and, below it, what a run would give and take."""
    total = prediction.total
    heads = ("source", "files", "input", "factor", "documents", "tokens", "sampled")
    shown = [*prediction.sources, total] if len(prediction.sources) > 1 else prediction.sources
    rows = [heads, *map(_row, shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    certain = None not in (total.documents_error, total.tokens_error)
    table = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    told = [
        *table,
        f"± is twice the standard error, from the spread over {total.probes} sampled pieces; what is unlike all "
        "of them it does not know",
        *(["±?: only beginnings of files are read, where documents may be shorter or longer"] * (not certain)),
        f"output: {prediction.sequences:,} sequences in {prediction.shards:,} shards, {size(prediction.output_bytes)}; "
        f"work folder: {size(prediction.work_bytes)} until the end",
        f"time: about {clock(prediction.tokenize_s + prediction.write_s)} with {prediction.workers} "
        f"worker{'s' * (prediction.workers != 1)}: {clock(prediction.tokenize_s)} to tokenize, if each keeps the "
        f"{prediction.encode_bytes_per_s / 1e6:,.2f} MB/s of input that one process reached here just now; "
        f"{clock(prediction.write_s)} to write, at an assumed {size(_DISK_BYTES_PER_S)}/s; "
        "where Ray is started, that comes to it",
        f"memory: about {size(prediction.memory_bytes)}",
    ]
    if prediction.get_requests or prediction.put_requests:
        told.append(
            f"requests to remote storage: about {prediction.get_requests:,} to read, "
            f"{prediction.put_requests:,} to write"
        )
    if prediction.bad_documents:
        told.append(f"bad documents in what was sampled: {prediction.bad_documents:,}")
    return "\n".join([*told, *(f"problem: {problem}" for problem in prediction.problems)])


def _row(part: SourceEstimate) -> tuple[str, ...]:
    def figure(amount: float, error: float | None) -> str:
        return f"{amount:,.0f} ±{'?' if error is None else f' {error:.1%}'}"

    share = part.sampled_bytes / part.num_bytes if part.num_bytes else 1.0
    return (
        part.name,
        f"{part.files:,}",
        size(part.num_bytes),
        "" if part.name == "total" else f"{part.factor:g}",
        figure(part.documents, part.documents_error),
        figure(part.tokens, part.tokens_error),
        f"{share:.1%}",
    )
