"""A rank with an injected fault: `python -m fault_worker FAULT FOLDER` under torchrun; writes FAULT_RANK.json."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainer_worker
from torch.distributed.tensor import DTensor

from open_lm.config.sections import DataConfig, OptimConfig, ParallelConfig
from open_lm.data.loader import build_train_loader
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, agree_on_name, build_layout, init_runtime, restart_count, shutdown
from open_lm.errors import end_process, run_cli
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.monitor import watchdog
from open_lm.monitor.watchdog import Watchdog
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import const_lr
from open_lm.parallel.parallelize import parallelize
from open_lm.training.control import Decision, RunControl
from open_lm.training.step import StepOptions, train_step
from open_lm.training.trainer import Trainer

GLOBAL_BATCH = 4


def build_trainer(runtime: Runtime, cfg: ParallelConfig, **changes: Any) -> Trainer:
    """Build the trainer of a small model on synthetic data; training does not depend on the number of ranks."""
    layout = build_layout(runtime, cfg)
    with torch.device("meta"):
        model = Transformer(Params(**trainer_worker.SHAPE))
    parallel_model = parallelize(
        model,
        layout,
        cfg,
        device=runtime.device,
        initialise=lambda module: init_weights(module, seed=5),
    )
    loader = build_train_loader(
        DataConfig(dataset_type="synthetic", workers=0),
        seq_len=trainer_worker.SEQ_LEN,
        vocab_size=trainer_worker.VOCAB,
        batch_size=GLOBAL_BATCH // runtime.world_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    optimizer = build_optimizer(parallel_model, OptimConfig(lr=1e-2))
    settings: dict[str, Any] = {
        "model": parallel_model,
        "optimizer": optimizer,
        "scheduler": const_lr(optimizer, 1e-2, 2),
        "loader": loader,
        "options": StepOptions(runtime, layout, get_autocast("fp32"), grad_clip_norm=1.0),
        "report": lambda values, step: None,
        "seq_len": trainer_worker.SEQ_LEN,
        "global_batch_size": GLOBAL_BATCH,
        "total_steps": 20,
        "log_every": 3,
    }
    return Trainer(**{**settings, **changes})


def tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Return copies of this rank's local shards of parameters, moments and step counts."""
    state = trainer.optimizer.state_dict()["state"].values()
    values = [*trainer.model.parameters(), *(value for moments in state for value in moments.values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in values]


def skip(runtime: Runtime, layout: str) -> list[bool]:
    """Make the loss NaN on rank 1 only; return [step skipped, nothing changed, next step trains]."""
    trainer = build_trainer(runtime, trainer_worker.LAYOUTS[layout])
    local_size = trainer_worker.BATCH_SIZE // runtime.world_size
    local = slice(runtime.rank * local_size, (runtime.rank + 1) * local_size)
    batches = [[tensor[local] for tensor in trainer_worker.batch(step)] for step in range(3)]
    train_step(trainer.model, *batches[0], trainer.optimizer, trainer.options)
    before = tensors(trainer)

    def should_skip(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return trainer._guard.should_skip(loss, norm)

    handle = None
    if runtime.rank == 1:
        handle = trainer.model.register_forward_hook(lambda _m, _i, out: (out[0] * math.nan, *out[1:]))
    result = train_step(trainer.model, *batches[1], trainer.optimizer, trainer.options, should_skip=should_skip)
    if handle is not None:
        handle.remove()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, tensors(trainer), strict=True))
    next_result = train_step(trainer.model, *batches[2], trainer.optimizer, trainer.options)
    changed = not any(torch.equal(a, b) for a, b in zip(before, tensors(trainer), strict=True) if a.numel() > 1)
    return [bool(result.skipped), unchanged, not next_result.skipped and changed]


def stop(runtime: Runtime) -> list[int]:
    """Send rank 1 a signal in step 4, and let rank 0's save timer expire in step 2.

    Return the steps after which all ranks decide to stop, and the negated steps after which they decide to save.
    """
    decisions: list[tuple[int, Decision]] = []
    now = [0.0]
    with RunControl(runtime.is_master, save_every_minutes=1, clock=lambda: now[0]) as control:
        trainer = build_trainer(runtime, ParallelConfig(), control=control)

        def after_step(decision: Decision) -> None:
            decisions.append((trainer.step, decision))
            now[0] += 50
            if trainer.step == 4 and runtime.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        trainer.after_step = after_step
        trainer.run_epoch(0, 6)
    stops = [step for step, decision in decisions if decision.stop]
    return stops + [-step for step, decision in decisions if decision.save]


def agree(runtime: Runtime, _out: str) -> dict[str, Any]:
    """Return the ranks' common decisions to skip, stop and save, and the trainer's state."""
    trainer = build_trainer(runtime, ParallelConfig(fsdp=True))
    trainer.run_epoch(0, 5)
    return {
        "skip": {layout: skip(runtime, layout) for layout in ("plain", "fsdp", "hybrid")},
        "stop": stop(runtime),
        "state": trainer.state(),
    }


def hang(runtime: Runtime, out: str) -> None:
    """Hang rank 1 after 4 steps, so that the watchdog ends the job."""
    with Watchdog(3.0, runtime, str(Path(out) / "stacks")):
        for step in range(4):
            watchdog.heartbeat("step", step)
            dist.barrier()
        if runtime.rank == 1:
            watchdog.heartbeat("waiting for data")
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()  # deadlock
        dist.barrier()


def fail(runtime: Runtime, _out: str) -> dict[str, Any]:
    """Fail on rank 1 at the first start; return the name and the restart count after the restart."""
    name = agree_on_name(runtime, lambda: f"run-{os.getpid()}")
    Path(f"name_{restart_count()}_{runtime.rank}").write_text(name)
    if restart_count() == 0:
        with Watchdog(60.0, runtime):
            if runtime.rank == 1:
                raise ZeroDivisionError("the cause")
            dist.barrier()
    return {"name": name, "restarts": restart_count()}


def die(runtime: Runtime, _out: str) -> None:
    """Kill rank 1 between two barriers."""
    with Watchdog(60.0, runtime):
        dist.barrier()
        if runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


FAULTS = {"agree": agree, "hang": hang, "fail": fail, "die": die}


def main(argv: list[str]) -> None:
    runtime = init_runtime(ParallelConfig())
    try:
        result = FAULTS[argv[0]](runtime, argv[1])
    finally:
        shutdown(runtime)
    Path(argv[1], f"{argv[0]}_{runtime.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    end_process(run_cli(main, sys.argv[1:]))
