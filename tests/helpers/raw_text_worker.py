"""Make the index of a text and read batches of it, without a model, in this process or on the ranks of a group.

Usage: `python -m raw_text_worker FOLDER JOB…`, with the variables that torchrun sets; a JOB is the JSON arguments of
`read`. If its folder of logs has a `{rank}`, each rank is a node with a disk of its own. Each rank writes its results
to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, DataConfig, ParallelConfig
from open_lm.data.loader import TrainLoader, build_train_loader
from open_lm.datapreprocess import inputs
from open_lm.distributed.processes import Runtime, init_runtime, shutdown
from open_lm.errors import end_process, run_cli
from open_lm.monitor.run_folder import RunPaths
from open_lm.training.raw_text import prepare_text

SEQ_LEN, VOCAB_SIZE = 32, 258


def prepare(flags: list[str], logs: str, runtime: Runtime | None = None) -> DataConfig:
    """Make the index in the run folder `logs`/run, in units of at most 4 KiB, and return the settings that read it."""
    args = parse_args([*flags, "--logs", logs, "--name", "run"])
    config, paths = Config.from_namespace(args), RunPaths(logs, "run")
    architecture = {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    minimum, inputs._MIN_UNIT_BYTES = inputs._MIN_UNIT_BYTES, 1 << 12
    try:
        with ExitStack() as stack:
            return prepare_text(
                args, config, architecture, runtime or Runtime(), paths, stack=stack, is_stopped=lambda: False
            ).data
    finally:
        inputs._MIN_UNIT_BYTES = minimum


def loader_of(
    data: DataConfig, batch: int, state: dict[str, Any] | None = None, runtime: Runtime | None = None
) -> TrainLoader:
    """Return the loader of this rank's share of global batches of `batch` sequences."""
    runtime = runtime or Runtime()
    return build_train_loader(
        data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=batch // runtime.world_size, rank=runtime.rank,
        world_size=runtime.world_size, state=state,
    )  # fmt: skip


def read(  # noqa: PLR0917 - the keys of a job
    flags: list[str],
    logs: str,
    batch: int,
    steps: int,
    state: dict[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> list[tuple[list[list[int]], dict[str, Any]]]:
    """Return the inputs of this rank in each step, and the state after it."""
    loader = loader_of(prepare(flags, logs, runtime), batch, state, runtime)
    try:
        return [(batch.inputs.tolist(), state) for batch, state in loader.batches(steps)]
    finally:
        loader.close()


def main() -> None:
    folder, *jobs = sys.argv[1:]
    runtime = init_runtime(ParallelConfig())
    results = []
    for job in map(json.loads, jobs):
        logs = job["logs"].replace("{rank}", str(runtime.rank))
        is_node = logs != job["logs"]
        rank = replace(runtime, local_rank=0, local_world_size=1) if is_node else runtime
        results.append(read(**{**job, "logs": logs}, runtime=rank))
    Path(folder, f"{runtime.rank}.json").write_text(json.dumps(results))
    shutdown(runtime)


if __name__ == "__main__":
    end_process(run_cli(lambda _: main()))
