"""The graph of a preprocessing run: units of work -> runs -> shards, on Ray, restartable at any point.

    inputs ─ plan_units ─► run_unit (many) ─► runs, tails ─► write_shards (many) ─► manifests, dataset.json

Every file appears whole, and a step that left its record in the work folder is not done again.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.datapreprocess.accounting import (
    Output,
    bad_input_message,
    dataset_record,
    exceeds_bad_fraction,
    line_bases,
    plural,
    summary,
)
from open_lm.datapreprocess.assembly import Assembler, CountBuckets
from open_lm.datapreprocess.cluster import Cluster, Shared, available_cpus
from open_lm.datapreprocess.inputs import plan_units, unit_size
from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.memory import SPILLED_BYTES_PER_INPUT_BYTE, Budget, plan_budget
from open_lm.datapreprocess.monitor import Monitor
from open_lm.datapreprocess.shuffle import Run, bucket_counts
from open_lm.datapreprocess.state import (
    collect_rejects,
    finished_bytes,
    finished_dataset,
    has_fallen_back,
    load_reports,
    open_work,
    record_fallback,
    remove_stale_shards,
    remove_unstarted_work,
    remove_work,
    work_folder,
)
from open_lm.datapreprocess.tasks import Call, Feed
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.datapreprocess.units import MAX_SHOWN, UnitReport, UnitTask, feed_unit, run_chunk, run_unit
from open_lm.datapreprocess.writer import (
    DATASET,
    REJECTS,
    WrittenShard,
    dataset_url,
    write_dataset,
    write_manifests,
    write_shards,
)
from open_lm.errors import DataError, UserError

_logger = logging.getLogger(__name__)
_BUCKET_BYTES = 4 << 20  # of input, for each bucket of the shuffle
_MIN_BUCKETS, _MAX_BUCKETS = 64, 1 << 16
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 16 << 20, 64 << 20  # of text that a feed hands over at a time
_RUNS_COUNTED = 256  # by one task
# Text bytes in a byte of (compressed) input, and how much text a worker turns into shards in a second, with and without
# the fast tokenizer. More threads than this wait for each other more than they work.
_TEXT_IN_INPUT, _FAST_BYTES_PER_S, _BYTES_PER_S = 4, 50e6, 2e6
_USEFUL_THREADS = 3
_RAY_START_S = 8.0  # with its end
Reports = dict[tuple[int, int], UnitReport]


def run(job: PreprocessJob, encoder: DocumentEncoder) -> dict[str, Any]:
    """Make the data set of a job, or what is missing of it; returns the content of its dataset.json.

    Raises ConfigError for a conflict with what is there, DataError for inputs that cannot be used.
    """
    job = _absolute(job)
    settings = job.settings(_tokenizer_facts(encoder))
    finished = finished_dataset(job, settings)
    if finished is not None:
        _logger.info("already done: %s in %s", summary(finished), job.layout.root)
        remove_work(work_folder(job))  # where the removal at the end was interrupted
        return finished
    started = time.monotonic()
    work = open_work(job, settings)
    try:
        alone = _alone(job, encoder, work)
        with Cluster(job.workers, job.ray_address, job.ray_options, alone=alone) as cluster:
            record = _make(job, settings, encoder, cluster, work)
    except UserError:
        remove_unstarted_work(work)
        raise
    remove_work(work)
    _logger.info("%s in %s, after %.1f s", summary(record), job.layout.root, time.monotonic() - started)
    return record


def _tokenizer_facts(encoder: DocumentEncoder) -> dict[str, Any]:
    return {
        "tokenizer_fingerprint": encoder.fingerprint,
        "eot_id": encoder.eot_id,
        "bos_id": encoder.bos_id,
        "vocab_size": encoder.vocab_size,
    }


def _alone(job: PreprocessJob, encoder: DocumentEncoder, work: str) -> bool:
    """Whether threads of this process would be done before Ray's workers, its start and end counted."""
    workers = min(job.workers or available_cpus(), available_cpus())
    text_bytes = max(0, job.num_bytes - finished_bytes(work)) * _TEXT_IN_INPUT
    rate = _FAST_BYTES_PER_S if encoder.name == "fastokens" else _BYTES_PER_S
    in_threads = text_bytes / (rate * min(workers, _USEFUL_THREADS))
    return in_threads <= _RAY_START_S + text_bytes / (rate * workers)


def _absolute(job: PreprocessJob) -> PreprocessJob:
    """The job with local paths that hold in every worker: they have a working directory of their own."""

    def absolute(url: str) -> str:
        return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))

    inputs = tuple(replace(item, url=absolute(item.url)) for item in job.inputs)
    return replace(job, inputs=inputs, layout=replace(job.layout, root=absolute(job.layout.root)))


def _make(
    job: PreprocessJob, settings: dict[str, Any], encoder: DocumentEncoder, cluster: Cluster, work: str
) -> dict[str, Any]:
    per_machine = cluster.workers_per_node
    budget = plan_budget(
        job.memory_limit,
        per_machine,
        job.num_bytes * SPILLED_BYTES_PER_INPUT_BYTE,
        twice=cluster.runs_threads_during_startup,
    )
    if budget.workers < per_machine:
        _logger.info("%d of %d workers of a machine fit into --memory-limit", budget.workers, per_machine)
        cluster.limit_workers(budget.workers)
    encoder = _checked(encoder, work)
    tasks = _plan(job, budget, encoder.name, work)
    monitor = Monitor(job, encoder.dtype, cluster.workers)
    reports = _tokenize(job, tasks, cluster, encoder, monitor)
    if reports is None:  # the fast tokenizer differs somewhere: once more, without it
        encoder = encoder.reference()
        tasks = [replace(task, encoder=encoder.name) for task in tasks]
        reports = _tokenize(job, tasks, cluster, encoder, monitor)
    assert reports is not None, "the reference does not differ from itself"
    remove_stale_shards(job, work, settings, reports)
    assembler = Assembler(job, work, encoder.dtype, budget.buffer_bytes, cluster.workers, _bucket_counter(cluster))
    outputs = _write(job, tasks, reports, assembler, cluster, monitor)
    bases = line_bases([task.unit for task in tasks], reports)
    collect_rejects(tasks, work, storage.join(job.layout.root, REJECTS), bases)
    for output in outputs if job.layout.per_source else []:
        own = [task for task in tasks if task.unit.source == output.source]
        collect_rejects(own, work, storage.join(job.layout.root, output.source, REJECTS), bases)
    return _write_records(job, settings, encoder.name, outputs)


def _write_records(
    job: PreprocessJob, settings: dict[str, Any], encoder: str, outputs: Sequence[Output]
) -> dict[str, Any]:
    """A dataset.json in every folder, and last the one that tells that all is done."""
    whole = dataset_record(job, settings, encoder, outputs)
    for output in outputs:
        folders = job.layout.folders_of(output.source)
        own = settings | {"folders": list(folders)}
        record = dataset_record(job, own, encoder, [output]) if job.layout.per_source else whole
        for folder in folders:
            url = storage.join(job.layout.folder(folder), DATASET)
            if url != dataset_url(job.layout):
                write_dataset(url, record)
    write_dataset(dataset_url(job.layout), whole)
    return whole


def _plan(job: PreprocessJob, budget: Budget, encoder: str, work: str) -> list[UnitTask]:
    sources = job.sources
    wanted = max(1, job.num_bytes // _BUCKET_BYTES)
    buckets = min(max(1 << (wanted - 1).bit_length(), _MIN_BUCKETS), _MAX_BUCKETS)
    chunk_bytes = min(max(unit_size(job.inputs), _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES)
    return [
        UnitTask(
            unit=unit,
            work=work,
            options=job.options,
            length=job.length,
            seed=job.seed,
            shuffle=job.shuffle,
            split_documents=job.split_documents,
            factor=job.sampling.factor(unit.source),
            source=sources.index(unit.source),
            buckets=buckets,
            run_bytes=budget.buffer_bytes,
            chunk_bytes=chunk_bytes,
            encoder=encoder,
        )
        for unit in plan_units(job.inputs, job.sampling, job.options, keep_order=not job.shuffle)
    ]


def _checked(encoder: DocumentEncoder, work: str) -> DocumentEncoder:
    """The encoder, or its reference where the fast tokenizer is known or found to differ from it."""
    difference = encoder.self_check()
    if difference:
        _logger.warning("the fast tokenizer is not used: %s", difference)
    elif has_fallen_back(work):
        _logger.warning("the fast tokenizer is not used: an earlier start found that it differs")
    elif encoder.fallback_reason:
        _logger.info("encoding with %s: %s", encoder.name, encoder.fallback_reason)
    return encoder.reference() if difference or has_fallen_back(work) else encoder


# --- tokenizing --------------------------------------------------------------------------------------------------


def _tokenize(
    job: PreprocessJob, tasks: Sequence[UnitTask], cluster: Cluster, encoder: DocumentEncoder, monitor: Monitor
) -> list[UnitReport] | None:
    """The reports of all units in their order; those that an earlier start finished are not done again.

    None where the fast tokenizer was found to differ from the reference; then nothing is kept.
    """
    work = tasks[0].work if tasks else ""
    reports: Reports = load_reports(tasks, work)
    kept = Counter(index for index, _ in reports)  # the last report of a streamed unit may be there before others
    done = {report.index for report in reports.values() if report.last and kept[report.index] == report.number + 1}
    for index in {index for index, _ in reports} - done:  # the last stretch may end where the file broke off
        del reports[max(key for key in reports if key[0] == index)]
    if done:
        _logger.info("%d of %s done already", len(done), plural(len(tasks), "unit"))
    monitor.begin_tokenizing(tasks, reports.values())
    missing = sorted((task for task in tasks if task.unit.index not in done), key=lambda task: -task.unit.num_bytes)
    shared = Shared(encoder)

    def calls() -> Iterator[Call[UnitReport] | Feed[UnitReport]]:
        for task in missing:
            if task.unit.streamed:
                known = frozenset(number for index, number in reports if index == task.unit.index)
                yield Feed(feed_unit, (task, known), _run_chunk_in_worker, (task, shared))
            else:
                yield Call(_run_unit_in_worker, (task, shared))

    for report in cluster.run(calls(), monitor.tick):
        if report.mismatch:
            _logger.warning("all is encoded again without the fast tokenizer: %s", report.mismatch)
            record_fallback(work)
            return None
        reports[report.index, report.number] = report
        monitor.finished_unit(report)
        if monitor.problems >= MAX_SHOWN and exceeds_bad_fraction(
            [task.unit for task in tasks], list(reports.values()), job.max_bad_fraction
        ):
            break
    monitor.end()
    _judge(job, tasks, [reports[key] for key in sorted(reports)], work)
    return [reports[key] for key in sorted(reports)]


def _judge(job: PreprocessJob, tasks: Sequence[UnitTask], reports: Sequence[UnitReport], work: str) -> None:
    """DataError where more of the input is bad than the job tolerates, or where there is nothing in it."""
    if exceeds_bad_fraction([task.unit for task in tasks], reports, job.max_bad_fraction):
        rejects = storage.join(job.layout.root, REJECTS)
        units = [task.unit for task in tasks]
        collect_rejects(tasks, work, rejects, line_bases(units, reports))
        if not sum(report.documents for report in reports):
            remove_work(work)  # nothing in it is worth going on with
        raise DataError(bad_input_message(units, reports, limit=job.max_bad_fraction, rejects=rejects))
    if not sum(report.documents for report in reports):
        remove_work(work)  # nothing in it is worth going on with
        raise DataError(f"the {plural(len(job.inputs), 'input file')} hold no document; is --content_key right?")


def _expect_work_folder(task: UnitTask) -> None:
    if not storage.exists(storage.join(task.work, "plan.json")):
        raise DataError(
            f"the work folder {task.work} cannot be seen from node {platform.node()}: on a cluster name a folder that "
            "all nodes share, or a remote one, with --work-dir"
        )


def _run_unit_in_worker(task: UnitTask, encoder: Shared[DocumentEncoder]) -> UnitReport:
    _expect_work_folder(task)
    return run_unit(task, encoder.get())


def _run_chunk_in_worker(task: UnitTask, encoder: Shared[DocumentEncoder], item: Any) -> UnitReport:
    _expect_work_folder(task)
    return run_chunk(task, encoder.get(), item)


# --- writing -----------------------------------------------------------------------------------------------------


def _write(  # noqa: PLR0917 - the parts of one run
    job: PreprocessJob,
    tasks: Sequence[UnitTask],
    reports: Sequence[UnitReport],
    assembler: Assembler,
    cluster: Cluster,
    monitor: Monitor,
) -> list[Output]:
    """Write shards and manifests of every output: of all sources together, or of each."""
    plans = []
    for source in job.sources if job.layout.per_source else [""]:
        chosen = [task for task in tasks if not source or task.unit.source == source]
        if not chosen:  # the factor of this source is 0
            continue
        indexes = {task.unit.index for task in chosen}
        plans.append(assembler.plan(source, chosen, [report for report in reports if report.index in indexes]))
    monitor.begin_writing(sum(len(plan.shards) for plan in plans))
    written: dict[str, WrittenShard] = {}
    for shards in cluster.run((Call(write_shards, (task,)) for plan in plans for task in plan.tasks), monitor.tick):
        for shard in shards:
            written[shard.url] = shard
            monitor.finished_shard(shard)
    monitor.end()
    outputs = [plan.output([written[shard.url] for shard in plan.shards]) for plan in plans]
    for output in outputs:
        output.check(job.drop_tail)
        write_manifests(job.layout, output.shards, output.written)
    return outputs


def _bucket_counter(cluster: Cluster) -> CountBuckets:
    """Counts the buckets of many runs on all workers."""

    def count(runs: Sequence[Run], buckets: int) -> np.ndarray:
        parts = [runs[start : start + _RUNS_COUNTED] for start in range(0, len(runs), _RUNS_COUNTED)]
        counts = np.zeros(buckets, np.int64)
        for part in cluster.run(Call(bucket_counts, (part, buckets)) for part in parts):
            counts += part
        return counts

    return count
