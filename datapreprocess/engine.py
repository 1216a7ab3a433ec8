"""The graph of a preprocessing run: units of work -> sorted runs -> shards, on Ray, restartable at any point.

    inputs ─ plan_units ─► run_unit (many) ─► runs, tails ─ slices ─► write_shards (many) ─► manifests, dataset.json

Every file appears whole, and a step that left its record in the work folder is not done again.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.shard_format import ShardInfo
from open_lm.datapreprocess.account import check_counts, data_set_record, explain_bad_documents, summary
from open_lm.datapreprocess.cluster import Cluster
from open_lm.datapreprocess.job import Job, plan_units
from open_lm.datapreprocess.pack import join_tails, pad
from open_lm.datapreprocess.progress import Board, Display
from open_lm.datapreprocess.readers import BadDocument
from open_lm.datapreprocess.shuffle import Run, RunWriter, read_keys, slices
from open_lm.datapreprocess.state import finished_dataset, open_work, remove_idle_work, remove_work
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.datapreprocess.units import MAX_SHOWN, UnitReport, UnitTask, load_report, load_tail, run_unit
from open_lm.datapreprocess.writer import (
    ShardPlan,
    ShardTask,
    group_shards,
    plan_shards,
    write_dataset,
    write_manifests,
    write_shards,
)
from open_lm.errors import DataError, UserError, join_problems

_logger = logging.getLogger(__name__)
_RUN_BYTES = 32 << 20
_PART_BYTES = 64 << 20
_REPORT_EVERY_S = 0.5
_encoders: dict[tuple[str, int], DocumentEncoder] = {}  # of a worker process, kept from one unit to the next


def run(job: Job, encoder: DocumentEncoder) -> dict[str, Any]:
    """Make the data set of a job, or what is missing of it; returns the content of its dataset.json.

    Raises ConfigError for a conflict with what is there, DataError for inputs that cannot be used.
    """
    root = job.layout.root
    if not storage.is_remote(root):  # workers have a working directory of their own
        job = replace(job, layout=replace(job.layout, root=os.path.abspath(storage.local_path(root))))
    settings = job.settings(encoder.fingerprint, encoder.eot_id, encoder.vocab_size)
    finished = finished_dataset(job, settings)
    if finished is not None:
        _logger.info("already done: %s in %s", summary(finished), root)
        return finished
    started = time.monotonic()
    work = open_work(job, settings)
    tasks = [UnitTask.of(job, unit, work, _RUN_BYTES) for unit in plan_units(_absolute(job).inputs, job.sampling)]
    try:
        with Cluster(job.workers, job.ray_address, job.ray_options) as cluster:
            reports = _tokenize(cluster, tasks, encoder)
            results = _write(cluster, job, tasks, reports, work=work, encoder=encoder)
    except UserError:
        remove_idle_work(work)
        raise
    record = {"settings": settings, "inputs": job.input_records(), **results}
    write_dataset(job.layout, record)
    remove_work(work)
    _logger.info("%s in %s, after %.1f s", summary(record), root, time.monotonic() - started)
    return record


def _absolute(job: Job) -> Job:
    inputs = (
        item if storage.is_remote(item.url) else replace(item, url=os.path.abspath(storage.local_path(item.url)))
        for item in job.inputs
    )
    return replace(job, inputs=tuple(inputs))


def _tokenize(cluster: Cluster, tasks: Sequence[UnitTask], encoder: DocumentEncoder) -> list[UnitReport]:
    """The reports of all units, in their order; those that an earlier run finished are not done again."""
    reports = {report.index: report for task in tasks if (report := load_report(task))}
    if reports:
        _logger.info("%d of %d units of work are done already", len(reports), len(tasks))
    missing = [task for task in tasks if task.unit.index not in reports]
    board, shared = cluster.actor(Board), cluster.share(encoder)
    display = Display("tokenizing", sum(task.unit.num_bytes for task in missing), "MB")
    problems: list[BadDocument] = []
    failures: dict[str, None] = {}  # in the order they are found, each once

    def arguments() -> Iterator[tuple[Any, ...]]:
        for task in missing:
            if len(problems) + len(failures) >= MAX_SHOWN:
                return
            # After the first problem the rest is only looked through, so that all problems are told together.
            yield (
                replace(task, check_only=bool(problems or failures)),
                (encoder.fingerprint, encoder.vocab_size),
                [shared],
                board,
            )

    def tick(final: bool = False) -> None:
        num_bytes, tokens = cluster.get(board.totals.remote())
        display.show(num_bytes, f"{tokens:,} tokens", final)

    for report in cluster.run(_unit_in_worker, arguments(), tick):
        reports[report.index] = report
        failures |= dict.fromkeys(report.failures)
        if not tasks[report.index].skip_bad_lines:
            problems += report.bad_shown
    if missing:
        tick(final=True)
    told = sorted(failures)
    if problems:
        told.append(explain_bad_documents([task.unit for task in tasks], reports))
    if told:
        raise DataError(join_problems(told, "The input cannot be used" if failures else ""))
    return [reports[task.unit.index] for task in tasks]


def _unit_in_worker(task: UnitTask, encoder_key: tuple[str, int], shared: list[Any], board: Any) -> UnitReport:
    """Runs in a worker process."""
    import ray

    if not storage.exists(task.work):
        raise DataError(
            f"the work folder {task.work} cannot be seen from node {platform.node()}: on a cluster name a folder that "
            "all nodes share, or a remote one, with --work-dir"
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one processor for each worker
    if encoder_key not in _encoders:
        _encoders[encoder_key] = ray.get(shared[0])
    last = time.monotonic()

    def report(num_bytes: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_EVERY_S:
            last = time.monotonic()
            board.update.remote(task.unit.index, num_bytes, tokens)

    result = run_unit(task, _encoders[encoder_key], report)
    # Waited for, so that the last word on the board is the final count.
    ray.get(board.update.remote(task.unit.index, task.unit.num_bytes, result.tokens))
    return result


def _write(
    cluster: Cluster,
    job: Job,
    tasks: Sequence[UnitTask],
    reports: Sequence[UnitReport],
    *,
    work: str,
    encoder: DocumentEncoder,
) -> dict[str, Any]:
    """Write shards and manifests; returns counts and what became of the tail."""
    if not sum(report.documents for report in reports):
        raise DataError(f"the {len(job.inputs)} input files hold no document; is --content_key right?")
    runs = [run for task, report in zip(tasks, reports, strict=True) for run in report.runs(task)]
    tails = [load_tail(task, encoder.dtype) for task in tasks]
    joined, tail = join_tails(tails, job.length, encoder.dtype)
    writer = RunWriter(
        storage.join(work, "tails-{:04d}.run"), len(tasks), job.seed if job.shuffle else None, _RUN_BYTES
    )
    writer.add(joined)
    writer.flush()
    runs += writer.runs
    padded = pad(tail, job.length) if len(tail) and not job.drop_tail else None
    shards = plan_shards(job.layout, sum(run.count for run in runs) + (padded is not None))
    if not shards:
        raise DataError(f"{len(tail)} tokens are too few for one sequence of {job.length} ids, and the tail is dropped")
    infos = _write_shards(cluster, job, shards, runs=runs, padded=padded, work=work, dtype=encoder.dtype)
    check_counts(reports, infos, 0 if padded is not None else len(tail))
    write_manifests(job.layout, shards, infos)
    return data_set_record(job, [task.unit for task in tasks], reports, shards=shards, infos=infos, tail=tail)


def _write_shards(
    cluster: Cluster,
    job: Job,
    shards: Sequence[ShardPlan],
    *,
    runs: Sequence[Run],
    padded: np.ndarray | None,
    work: str,
    dtype: np.dtype[Any],
) -> list[ShardInfo]:
    """Write all shards, several neighbours to a task, and return their infos in order."""
    sequence_bytes = job.length * dtype.itemsize
    total_bytes = sum(shard.count for shard in shards) * sequence_bytes
    groups = group_shards(shards, sequence_bytes, min(_PART_BYTES, total_bytes // (2 * cluster.workers)))
    bounds = slices(read_keys(runs), [group[0].first for group in groups])
    display = Display("writing", len(shards), "shards")
    infos: dict[int, ShardInfo] = {}

    def arguments() -> Iterator[tuple[ShardTask]]:
        for group, part in zip(groups, bounds, strict=True):
            last = padded if group is groups[-1] else None
            yield (ShardTask(tuple(group), tuple(runs), part, last, job.length, job.kind, dtype, work),)

    for written in cluster.run(write_shards, arguments()):
        infos.update(written)
        display.show(len(infos))
    display.show(len(infos), final=True)
    return [infos[shard.first] for shard in shards]
