"""Dry run: tokenize a sample of the inputs and predict the output and cost of the full run. Writes nothing.

The counts of a source are extrapolated from its probes, in proportion to the input bytes.
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
from open_lm.datapreprocess.memory import BUFFERS_PER_WORKER, SPILLED_BYTES_PER_INPUT_BYTE, plan_budget
from open_lm.datapreprocess.probe import Probe, probe_files
from open_lm.datapreprocess.progress import format_bytes, format_duration, memory_in_use
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError, join_problems

_SAMPLE_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # always allowed to read this much; of larger inputs at most a quarter
# Assumptions that are not measured: disk speed, memory of Ray, sizes of storage requests.
_DISK_BYTES_PER_S = 200e6
_RAY_BYTES = 512 << 20
_GET_BYTES, _PUT_BYTES = 8 << 20, 16 << 20
_KEY_BYTES = 8  # shuffle key of a sequence in the work folder, in addition to its ids


@dataclass(frozen=True)
class SourceEstimate:
    """Predictions for the files of a source; documents and tokens include repeated passes of the sampling.

    Attributes:
        probes: number of sampled positions.
        sampled_bytes: input bytes read.
        documents_error, tokens_error: twice the standard error as a fraction; None if unknown. The error of the number
            of documents is unknown if only beginnings of files were read: document lengths often change further on.
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
    """Predictions for a full run.

    Attributes:
        work_bytes: size of the work folder.
        encode_bytes_per_s: measured speed of one process, in input bytes.
        bad_documents: number of bad documents in the sample.
        problems: errors of files that could not be read.
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
class _SampledSource:
    """A source, its input files and the measurements of its sample."""

    name: str
    factor: float
    files: list[InputFile] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.files)

    @property
    def read(self) -> int:
        return sum(probe.read for probe in self.probes)

    def density(self, count: Callable[[Probe], float]) -> float:
        """Return the average of a count per input byte."""
        num_bytes = sum(probe.represents for probe in self.probes)
        return sum(map(count, self.probes)) / num_bytes if num_bytes else 0.0


def estimate(job: PreprocessJob, encoder: DocumentEncoder, sample_bytes: int = _SAMPLE_BYTES) -> Estimate:
    """Predict a run from about `sample_bytes` of its inputs; at most a quarter of them unless they are tiny.

    Raises DataError if the sample contains no document.
    """
    sources = _sources(job)
    budget = min(sample_bytes, max(_SMALL_BYTES, job.num_bytes // 4))
    if job.tokenizer:
        encoder.encode(["Load the tokenizer before the time is measured."])
    for number, source in enumerate(sources):
        offset = float(np.random.default_rng([job.seed, number]).random())
        share = source.num_bytes / max(1, job.num_bytes)
        source.probes = probe_files(source.files, budget * share, offset, job, encoder)
    probes = [probe for source in sources for probe in source.probes]
    if not any(probe.documents for probe in probes):
        problems = [probe.problem for probe in probes if probe.problem]
        no_document = f"found no document in the sample of {len(job.inputs)} input files; check --content_key"
        raise DataError(join_problems(problems or [no_document]))
    return _predict(job, encoder, sources)


def _sources(job: PreprocessJob) -> list[_SampledSource]:
    sources: dict[str, _SampledSource] = {}
    for item in job.inputs:
        name = job.sampling.source_of(item.url)
        sources.setdefault(name, _SampledSource(name, job.sampling.factor(name))).files.append(item)
    return [sources[name] for name in sorted(sources)]


# --- prediction --------------------------------------------------------------------------------------------------


def _predict(job: PreprocessJob, encoder: DocumentEncoder, sources: Sequence[_SampledSource]) -> Estimate:
    document_errors = _errors(sources, lambda probe: probe.documents)
    token_errors = _errors(sources, lambda probe: probe.tokens)
    parts = [
        SourceEstimate(
            name=source.name,
            files=len(source.files),
            num_bytes=source.num_bytes,
            factor=source.factor,
            probes=len(source.probes),
            sampled_bytes=source.read,
            documents=source.density(lambda probe: probe.documents) * source.num_bytes * source.factor,
            tokens=source.density(lambda probe: probe.tokens) * source.num_bytes * source.factor,
            documents_error=None if any(probe.is_beginning for probe in source.probes) else documents_error,
            tokens_error=tokens_error,
        )
        for source, documents_error, tokens_error in zip(sources, document_errors, token_errors, strict=True)
    ]
    total = _total(parts)
    sequences = int(total.tokens) // job.length + (not job.drop_tail)
    shards = _num_shards(job, parts, sequences)
    probes = [probe for source in sources for probe in source.probes]
    members = [size for probe in probes for size in probe.member_bytes]
    output_bytes = int(sequences * sum(members) / len(members))
    work_bytes = sequences * (job.length * encoder.dtype.itemsize + _KEY_BYTES)
    workers = local_workers(job.workers) if job.ray_address is None else job.workers or 1
    budget = plan_budget(job.memory_limit, workers, job.num_bytes * SPILLED_BYTES_PER_INPUT_BYTE)
    worker_bytes = BUFFERS_PER_WORKER * min(budget.buffer_bytes, work_bytes)
    seconds = sum(source.density(lambda probe: probe.seconds) * source.num_bytes * source.factor for source in sources)
    pass_bytes = sum(source.num_bytes * source.factor for source in sources)
    return Estimate(
        sources=tuple(parts),
        total=total,
        sequences=sequences,
        shards=shards,
        output_bytes=output_bytes,
        work_bytes=work_bytes,
        memory_bytes=budget.workers * (memory_in_use([os.getpid()]) + worker_bytes) + _RAY_BYTES,
        workers=budget.workers,
        encode_bytes_per_s=pass_bytes / seconds if seconds else 0.0,
        tokenize_s=seconds / budget.workers,
        write_s=(2 * work_bytes + output_bytes) / _DISK_BYTES_PER_S,
        get_requests=_num_gets(sources),
        put_requests=_num_puts(job, shards, output_bytes),
        bad_documents=sum(probe.bad for probe in probes),
        problems=tuple(probe.problem for probe in probes if probe.problem),
    )


def _errors(sources: Sequence[_SampledSource], count: Callable[[Probe], float]) -> list[float | None]:
    """Return twice the standard error of each source's density, as a fraction of it; None if no source has two probes.

    Assumes that the variance between probes is the same in all sources, so that sources with one probe get an error,
    too. Sources that were read completely have no error.
    """
    squares, degrees_of_freedom = 0.0, 0
    for source in sources:
        mean = source.density(count)
        probes = [probe for probe in source.probes if probe.represents]
        if mean and len(probes) > 1:
            average = sum(probe.represents for probe in probes) / len(probes)
            squares += sum(((count(probe) / mean - probe.represents) / average) ** 2 for probe in probes)
            degrees_of_freedom += len(probes) - 1
    errors: list[float | None] = []
    for source in sources:
        unread = max(0.0, 1.0 - source.read / max(1, source.num_bytes))
        if unread and not degrees_of_freedom:
            errors.append(None)
        else:
            variance = squares / degrees_of_freedom if degrees_of_freedom else 0.0
            errors.append(2 * math.sqrt(variance / max(1, len(source.probes)) * unread))
    return errors


def _total(parts: Sequence[SourceEstimate]) -> SourceEstimate:
    """Sum the sources, assuming that their errors are independent."""

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


def _num_shards(job: PreprocessJob, parts: Sequence[SourceEstimate], sequences: int) -> int:
    """Return the number of shards in all folders; with `per_source` every source has its own."""
    outputs = [(part.name, int(part.tokens) // job.length) for part in parts] if job.layout.per_source else []
    shards = 0
    for name, count in outputs or [("", sequences)]:
        folders = len(job.layout.folders_of(name))
        shards += folders * math.ceil(count / folders / shard_size(count, job.layout.shard_sequences))
    return shards


def _num_gets(sources: Sequence[_SampledSource]) -> int:
    """Return the number of requests that read the remote inputs, including repeated passes."""
    return sum(
        math.ceil(source.factor) * max(1, math.ceil(item.num_bytes / _GET_BYTES))
        for source in sources
        for item in source.files
        if storage.is_remote(item.url)
    )


def _num_puts(job: PreprocessJob, shards: int, output_bytes: int) -> int:
    """Return the number of requests that write the shards: one each, or for large ones start, parts and completion."""
    if not storage.is_remote(job.layout.root):
        return 0
    num_parts = math.ceil(output_bytes / max(1, shards) / _PUT_BYTES)
    return shards * (num_parts + 2 if num_parts > 2 else 1)


# --- report ------------------------------------------------------------------------------------------------------


def describe(prediction: Estimate) -> str:
    """Return a table of the sources, followed by the predicted output and cost of the run."""
    total = prediction.total
    header = ("source", "files", "input", "factor", "documents", "tokens", "sampled")
    parts = [*prediction.sources, total] if len(prediction.sources) > 1 else prediction.sources
    rows = [header, *map(_row, parts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    lines.append(
        f"± is twice the standard error, from the variance of {total.probes} samples; it does not cover data that is "
        "unlike all samples"
    )
    if None in (total.documents_error, total.tokens_error):
        lines.append("±?: error unknown: only beginnings of files were read, and later documents may differ in length")
    num_workers = prediction.workers
    lines += [
        f"output: {prediction.sequences:,} sequences in {prediction.shards:,} shards, "
        f"{format_bytes(prediction.output_bytes)}; work folder: {format_bytes(prediction.work_bytes)} until the "
        "run finishes",
        f"time: about {format_duration(prediction.tokenize_s + prediction.write_s)} with {num_workers} "
        f"worker{'s' * (num_workers != 1)}: {format_duration(prediction.tokenize_s)} to tokenize, if each worker "
        f"reaches the {prediction.encode_bytes_per_s / 1e6:,.2f} MB/s of input measured here with one process; "
        f"{format_duration(prediction.write_s)} to write, at an assumed {format_bytes(_DISK_BYTES_PER_S)}/s; the "
        "start of Ray, if needed, is not included",
        f"memory: about {format_bytes(prediction.memory_bytes)}",
    ]
    if prediction.get_requests or prediction.put_requests:
        lines.append(
            f"requests to remote storage: about {prediction.get_requests:,} to read, "
            f"{prediction.put_requests:,} to write"
        )
    if prediction.bad_documents:
        lines.append(f"bad documents in the sample: {prediction.bad_documents:,}")
    return "\n".join([*lines, *(f"problem: {problem}" for problem in prediction.problems)])


def _row(part: SourceEstimate) -> tuple[str, ...]:
    def with_error(amount: float, error: float | None) -> str:
        return f"{amount:,.0f} ±{'?' if error is None else f' {error:.1%}'}"

    share = part.sampled_bytes / part.num_bytes if part.num_bytes else 1.0
    return (
        part.name,
        f"{part.files:,}",
        format_bytes(part.num_bytes),
        "" if part.name == "total" else f"{part.factor:g}",
        with_error(part.documents, part.documents_error),
        with_error(part.tokens, part.tokens_error),
        f"{share:.1%}",
    )
