"""Run a preprocessing job on Ray: inputs -> units of work -> sorted runs -> shards. It can resume at any point.

    inputs ─ plan_units ─► run_unit (many) ─► runs, tails ─► write_shards (many) ─► manifests, dataset.json

All files are written atomically. A step whose record is in the work folder is not repeated.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import DATASET_NAME, REJECTS_NAME
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
from open_lm.datapreprocess.cluster import Cluster, Shared
from open_lm.datapreprocess.inputs import plan_units, unit_size
from open_lm.datapreprocess.job import PreprocessJob
from open_lm.datapreprocess.memory import SPILLED_BYTES_PER_INPUT_BYTE, Budget, plan_budget
from open_lm.datapreprocess.monitor import Monitor
from open_lm.datapreprocess.shuffle import Run, bucket_counts
from open_lm.datapreprocess.state import (
    PLAN_NAME,
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
from open_lm.datapreprocess.writer import WrittenShard, dataset_url, write_dataset, write_manifests, write_shards
from open_lm.errors import DataError, UserError
from open_lm.system.cpus import available_cpus
from open_lm.tokenizer import COPY_FOLDER, FILE_NAMES

_logger = logging.getLogger(__name__)
_BUCKET_BYTES = 4 << 20  # input bytes per bucket of the shuffle
_MIN_BUCKETS, _MAX_BUCKETS = 64, 1 << 16
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 16 << 20, 64 << 20  # decompressed text in a chunk of a streamed file
_RUNS_PER_COUNT_TASK = 256
_TEXT_BYTES_PER_INPUT_BYTE = 4  # the input may be compressed
_FAST_BYTES_PER_S, _BYTES_PER_S = 50e6, 2e6  # text per worker, with and without the fast tokenizer
_USEFUL_THREADS = 3  # more threads only wait for each other
_RAY_START_S = 8.0  # to start and stop a local Ray
ReportsByKey = dict[tuple[int, int], UnitReport]  # by unit and chunk


def run(job: PreprocessJob, encoder: DocumentEncoder) -> dict[str, Any]:
    """Create the data set of a job, or complete an interrupted one; return the content of its dataset.json.

    Raise ConfigError if the output folder contains something else, and DataError if inputs are unusable.
    """
    job = _with_absolute_paths(job)
    settings = job.settings(encoder.settings())
    finished = finished_dataset(job, settings)
    if finished is not None:
        _logger.info("already done: %s in %s", summary(finished), job.layout.root)
        remove_work(work_folder(job))  # it still exists if the previous run was killed while removing it
        return finished
    started = time.monotonic()
    work = open_work(job, settings)
    try:
        threads_only = job.ray_address is None and _threads_are_faster(job, encoder, work)
        with Cluster(job.workers, job.ray_address, job.ray_options, threads_only=threads_only) as cluster:
            record = _make_dataset(job, settings, encoder, cluster, work)
    except UserError:
        remove_unstarted_work(work)
        raise
    remove_work(work)
    _logger.info("finished in %.1f s: %s in %s", time.monotonic() - started, summary(record), job.layout.root)
    return record


def _threads_are_faster(job: PreprocessJob, encoder: DocumentEncoder, work: str) -> bool:
    """Return whether threads of this process finish sooner than Ray workers, including the start and stop of Ray."""
    workers = min(job.workers or available_cpus(), available_cpus())
    text_bytes = max(0, job.num_bytes - finished_bytes(work)) * _TEXT_BYTES_PER_INPUT_BYTE
    rate = _FAST_BYTES_PER_S if encoder.name == "fastokens" else _BYTES_PER_S
    threads_s = text_bytes / (rate * min(workers, _USEFUL_THREADS))
    return threads_s <= _RAY_START_S + text_bytes / (rate * workers)


def _with_absolute_paths(job: PreprocessJob) -> PreprocessJob:
    """Return the job with absolute local paths, since workers have a different working directory."""

    def absolute(url: str) -> str:
        return url if storage.is_remote(url) else os.path.abspath(storage.local_path(url))

    inputs = tuple(replace(item, url=absolute(item.url)) for item in job.inputs)
    return replace(job, inputs=inputs, layout=replace(job.layout, root=absolute(job.layout.root)))


def _make_dataset(
    job: PreprocessJob, settings: dict[str, Any], encoder: DocumentEncoder, cluster: Cluster, work: str
) -> dict[str, Any]:
    """Tokenize the inputs, write shards and metadata files, and return the content of the dataset.json."""
    per_node = cluster.workers_per_node
    budget = plan_budget(
        job.memory_limit,
        per_node,
        job.num_bytes * SPILLED_BYTES_PER_INPUT_BYTE,
        threads_too=cluster.runs_threads_during_startup,
    )
    if budget.workers < per_node:
        _logger.info("--memory-limit allows %d of %d workers per node", budget.workers, per_node)
        cluster.limit_workers(budget.workers)
    encoder = _choose_encoder(encoder, work)
    tasks = _plan_tasks(job, budget, encoder.name, work)
    monitor = Monitor(job, encoder.dtype, cluster.workers)
    reports = _tokenize(job, tasks, cluster, encoder, monitor)
    if reports is None:  # the fast tokenizer differs from the reference: repeat without it
        encoder = encoder.reference()
        tasks = [replace(task, encoder=encoder.name) for task in tasks]
        reports = _tokenize(job, tasks, cluster, encoder, monitor)
    assert reports is not None, "only the fast tokenizer can differ from the reference"
    remove_stale_shards(job, work, settings, reports)
    assembler = Assembler(job, work, encoder.dtype, budget.buffer_bytes, cluster.workers, _bucket_counter(cluster))
    outputs = _write_outputs(job, tasks, reports, assembler, cluster, monitor)
    bases = line_bases([task.unit for task in tasks], reports)
    collect_rejects(tasks, work, storage.join(job.layout.root, REJECTS_NAME), bases)
    for output in outputs if job.layout.per_source else []:
        source_tasks = [task for task in tasks if task.unit.source == output.source]
        collect_rejects(source_tasks, work, storage.join(job.layout.root, output.source, REJECTS_NAME), bases)
    return _write_records(job, settings, encoder, outputs)


def _write_records(
    job: PreprocessJob, settings: dict[str, Any], encoder: DocumentEncoder, outputs: Sequence[Output]
) -> dict[str, Any]:
    """Write a dataset.json and the tokenizer to every folder; the dataset.json that marks the output as finished last.

    Every folder has its own copy of the tokenizer, so that it can be moved and trained on separately.
    """
    full_record = dataset_record(job, settings, encoder.name, outputs)
    files = encoder.tokenizer_files()
    for output in outputs:
        folders = job.layout.folders_of(output.source)
        output_settings = settings | {"folders": list(folders)}
        record = dataset_record(job, output_settings, encoder.name, [output]) if job.layout.per_source else full_record
        for folder in folders:
            _write_tokenizer(storage.join(job.layout.folder(folder), COPY_FOLDER), files)
            url = storage.join(job.layout.folder(folder), DATASET_NAME)
            if url != dataset_url(job.layout):
                write_dataset(url, record)
    write_dataset(dataset_url(job.layout), full_record)
    return full_record


def _write_tokenizer(folder: str, files: Mapping[str, bytes]) -> None:
    """Write the files of the tokenizer; remove those that an interrupted run with another tokenizer has left."""
    for name in FILE_NAMES:
        if name in files:
            storage.write_bytes(storage.join(folder, name), files[name])
        else:
            storage.remove(storage.join(folder, name))


def _plan_tasks(job: PreprocessJob, budget: Budget, encoder: str, work: str) -> list[UnitTask]:
    """Return the tasks of all units, with settings derived from the size of the inputs and the memory budget."""
    sources = job.sources
    target = max(1, job.num_bytes // _BUCKET_BYTES)
    buckets = min(max(1 << (target - 1).bit_length(), _MIN_BUCKETS), _MAX_BUCKETS)
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


def _choose_encoder(encoder: DocumentEncoder, work: str) -> DocumentEncoder:
    """Return the encoder, or its reference if the fast tokenizer differs from it, now or in an earlier run."""
    difference = encoder.self_check()
    if difference:
        _logger.warning("the fast tokenizer is not used: %s", difference)
    elif has_fallen_back(work):
        _logger.warning("the fast tokenizer is not used: an earlier run found that it differs from the reference")
    elif encoder.fallback_reason:
        _logger.info("encoding with %s: %s", encoder.name, encoder.fallback_reason)
    return encoder.reference() if difference or has_fallen_back(work) else encoder


# --- tokenizing --------------------------------------------------------------------------------------------------


def _tokenize(
    job: PreprocessJob, tasks: Sequence[UnitTask], cluster: Cluster, encoder: DocumentEncoder, monitor: Monitor
) -> list[UnitReport] | None:
    """Process the units that have no report from an earlier run, and return the reports of all units in order.

    Return None, and discard all reports, if the fast tokenizer differs from the reference.
    """
    work = tasks[0].work if tasks else ""
    reports: ReportsByKey = load_reports(tasks, work)
    # The last report of a streamed unit may have been saved before reports of earlier chunks, so count them.
    num_reports = Counter(index for index, _ in reports)
    done = {
        report.index for report in reports.values() if report.last and num_reports[report.index] == report.number + 1
    }
    for index in {index for index, _ in reports} - done:  # the last chunk may be incomplete because reading failed
        del reports[max(key for key in reports if key[0] == index)]
    if done:
        _logger.info("%d of %s already done", len(done), plural(len(tasks), "unit"))
    monitor.start_tokenizing(tasks, reports.values())
    missing = sorted((task for task in tasks if task.unit.index not in done), key=lambda task: -task.unit.num_bytes)
    shared = Shared(encoder)

    def calls() -> Iterator[Call[UnitReport] | Feed[UnitReport]]:
        for task in missing:
            if task.unit.streamed:
                done_chunks = frozenset(number for index, number in reports if index == task.unit.index)
                yield Feed(feed_unit, (task, done_chunks), _run_chunk_in_worker, (task, shared))
            else:
                yield Call(_run_unit_in_worker, (task, shared))

    for report in cluster.run(calls(), monitor.tick):
        if report.mismatch:
            _logger.warning("restarting the encoding without the fast tokenizer: %s", report.mismatch)
            record_fallback(work)
            return None
        reports[report.index, report.number] = report
        monitor.finished_unit(report)
        if monitor.problems >= MAX_SHOWN and exceeds_bad_fraction(
            [task.unit for task in tasks], list(reports.values()), job.max_bad_fraction
        ):
            break
    monitor.finish_stage()
    _check_inputs(job, tasks, [reports[key] for key in sorted(reports)], work)
    return [reports[key] for key in sorted(reports)]


def _check_inputs(job: PreprocessJob, tasks: Sequence[UnitTask], reports: Sequence[UnitReport], work: str) -> None:
    """Raise DataError if more of the input is bad than the job allows, or if it contains no documents."""
    units = [task.unit for task in tasks]
    if exceeds_bad_fraction(units, reports, job.max_bad_fraction):
        rejects = storage.join(job.layout.root, REJECTS_NAME)
        collect_rejects(tasks, work, rejects, line_bases(units, reports))
        if not sum(report.documents for report in reports):
            remove_work(work)  # it contains nothing to resume
        raise DataError(bad_input_message(units, reports, limit=job.max_bad_fraction, rejects=rejects))
    if not sum(report.documents for report in reports):
        remove_work(work)  # it contains nothing to resume
        raise DataError(
            f"found no documents in {plural(len(job.inputs), 'input file')}; "
            + ("check the input and --overlong" if job.options.records else "check whether --content_key is correct")
        )


def _require_work_folder(task: UnitTask) -> None:
    """Raise DataError if the work folder is not visible from this node."""
    if not storage.exists(storage.join(task.work, PLAN_NAME)):
        raise DataError(
            f"work folder {task.work}: not found on node {platform.node()}; on a cluster, set --work-dir to a folder "
            "that all nodes share or to a remote folder"
        )


def _run_unit_in_worker(task: UnitTask, encoder: Shared[DocumentEncoder]) -> UnitReport:
    _require_work_folder(task)
    return run_unit(task, encoder.get())


def _run_chunk_in_worker(task: UnitTask, encoder: Shared[DocumentEncoder], item: Any) -> UnitReport:
    _require_work_folder(task)
    return run_chunk(task, encoder.get(), item)


# --- writing -----------------------------------------------------------------------------------------------------


def _write_outputs(  # noqa: PLR0917 - the components of one run
    job: PreprocessJob,
    tasks: Sequence[UnitTask],
    reports: Sequence[UnitReport],
    assembler: Assembler,
    cluster: Cluster,
    monitor: Monitor,
) -> list[Output]:
    """Write the shards and manifests of every output: one for all sources together, or one per source."""
    plans = []
    for source in job.sources if job.layout.per_source else [""]:
        source_tasks = [task for task in tasks if not source or task.unit.source == source]
        if not source_tasks:  # the factor of this source is 0
            continue
        indexes = {task.unit.index for task in source_tasks}
        plans.append(assembler.plan(source, source_tasks, [report for report in reports if report.index in indexes]))
    monitor.start_writing(sum(len(plan.shards) for plan in plans))
    written: dict[str, WrittenShard] = {}
    for shards in cluster.run((Call(write_shards, (task,)) for plan in plans for task in plan.tasks), monitor.tick):
        for shard in shards:
            written[shard.url] = shard
            monitor.finished_shard(shard)
    monitor.finish_stage()
    outputs = [plan.output([written[shard.url] for shard in plan.shards]) for plan in plans]
    for output in outputs:
        output.verify_totals(job.drop_tail)
        write_manifests(job.layout, output.shards, output.written)
    return outputs


def _bucket_counter(cluster: Cluster) -> CountBuckets:
    """Return a function that counts the sequences in each bucket, distributed over all workers."""

    def count(runs: Sequence[Run], buckets: int) -> np.ndarray:
        parts = [runs[start : start + _RUNS_PER_COUNT_TASK] for start in range(0, len(runs), _RUNS_PER_COUNT_TASK)]
        counts = np.zeros(buckets, np.int64)
        for part in cluster.run(Call(bucket_counts, (part, buckets)) for part in parts):
            counts += part
        return counts

    return count
