"""One measurement of bench_train.py, in a process of its own: `bench_train_worker.py JOB`, JOB as JSON; the result is
the last line printed.

A step that is measured is any function(inputs, targets) -> loss. Ours is the one that training uses, its model,
optimizer and options made by the run's own session; others come from a function(model, precision, device) that makes
one, and that is given the trainer's whole configuration too where it has a parameter `config`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from matmul_ceiling import linear_shapes, own_flops, square_flops
from step_profile import profile_step
from torch import Tensor

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, ModelConfig
from open_lm.errors import ConfigError, run_cli
from open_lm.model.transformer import create_model
from open_lm.monitor.metrics import peak_memory_bytes

OURS, CEILING = "ours", "ceiling"
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Job:
    """What to measure: `kind` is OURS, CEILING or the module:function that makes another's step. `model` is the path of
    a configuration, `flags` what the trainer is given beside it, `dtypes` those of the ceiling, `python` what runs the
    process. `check`: measure nothing, but say whether another's step can be made."""

    kind: str
    model: str
    device: str
    precision: str
    batch_size: int
    seq_len: int
    vocab_size: int
    micro_batches: int
    warmup: int
    steps: int
    flags: list[str]
    dtypes: list[str]
    profile: bool = False
    trace: str | None = None
    python: str = sys.executable
    check: bool = False

    def command(self) -> list[str]:
        return [self.python, __file__, json.dumps(asdict(self))]


@dataclass(frozen=True)
class Measured:
    """Seconds of each step, from the beginning to the end of the first step, and the most memory beyond what the
    process held before there was a model; of one more step, where it was profiled, the seconds by room and pass and
    all."""

    step_s: list[float]
    first_step_s: float
    memory_bytes: int
    profile: dict[str, dict[str, float]] | None = None
    profiled_s: float | None = None


def trainer_flags(model: str, batch_size: int, flags: Sequence[str]) -> list[str]:
    """The command line of a training run of `model` on random tokens."""
    own = ["--model", model, "--global-batch-size", str(batch_size), "--dataset-type", "synthetic", "--workers", "0"]
    return [*own, "--train-num-samples", "1000000000", "--epochs", "1", "--logs", "none", *flags]


def imported_step(job: Job) -> Step:
    """What module:function makes."""
    return called(job, imported(job)[1])


def imported(job: Job) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and its function; modules are looked for beside this file and in the working directory too."""
    sys.path.append(os.getcwd())
    name, _, function = job.kind.partition(":")
    try:
        module = importlib.import_module(name)
        return module, getattr(module, function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--against {job.kind}: cannot be imported ({error}); expected module:function") from error


def called(job: Job, function: Callable[..., Any]) -> Any:
    """`function` of model, precision and device, and of the configuration where it asks for one."""
    settings = {}
    if "config" in inspect.signature(function).parameters:
        settings["config"] = Config.from_namespace(parse_args(trainer_flags(job.model, job.batch_size, job.flags)))
    return function(job.model, job.precision, torch.device(job.device), **settings)


def check(job: Job) -> dict[str, str]:
    """The version of torch that will be measured with; ConfigError where a step cannot be made, as far as its module's
    own `check` finds out."""
    module, _ = imported(job)
    if hasattr(module, "check"):
        called(job, module.check)
    return {"torch": torch.__version__}


def random_batches(job: Job, count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (B,T) of random tokens on the device, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, job.batch_size, job.seq_len + 1)
    ids = torch.randint(job.vocab_size, shape, generator=generator).to(job.device)
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids]


def timed(step: Step, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[float], float]:
    """Seconds of each step and the last loss. On CUDA by the device's clock, so that the host runs ahead as it does in
    training."""
    is_cuda = batches[0][0].is_cuda
    if not is_cuda:
        marks = [time.perf_counter()]
        for inputs, targets in batches:
            loss = step(inputs, targets)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)], float(loss)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for (inputs, targets), event in zip(batches, events[1:], strict=True):
        loss = step(inputs, targets)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)], float(loss)


def measure(job: Job) -> Measured:
    """The step of `job`, from before there is a model."""
    with ExitStack() as stack:
        if job.kind != OURS:
            return _measure(job, lambda: imported_step(job))
        from our_step import OurStep  # the rooms of a whole run, which others do not need

        flags = trainer_flags(job.model, job.batch_size, job.flags)
        return _measure(job, lambda: stack.enter_context(OurStep(flags)))


def _measure(job: Job, build: Callable[[], Step]) -> Measured:
    device = torch.device(job.device)
    batches = random_batches(job, job.warmup + job.steps)
    memory_before, start = peak_memory_bytes(device), time.perf_counter()
    step = build()
    made_s = time.perf_counter() - start
    warm_s, _ = timed(step, batches[: job.warmup]) if job.warmup else ([], 0.0)
    step_s, loss = timed(step, batches[job.warmup :])
    if not math.isfinite(loss):
        raise ConfigError(f"{job.kind}: the loss after {len(batches)} steps is {loss}, so that its speed means nothing")
    memory = peak_memory_bytes(device) - memory_before
    profile, profiled_s = None, None
    if job.profile:
        profile, profiled_s = profile_step(step, *batches[-1], None if job.trace is None else Path(job.trace))
    return Measured(step_s, made_s + [*warm_s, *step_s][0], memory, profile, profiled_s)


def ceiling(job: Job) -> dict[str, dict[str, float]]:
    """FLOP/s by type: at the model's own shapes and tokens of a micro-batch, and at a square."""
    with torch.device("meta"):
        shapes = linear_shapes(create_model(ModelConfig(model=job.model)))
    tokens = job.batch_size // job.micro_batches * job.seq_len
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
    return {
        name: {
            "own": own_flops(shapes, tokens, getattr(torch, name), device),
            "square": square_flops(getattr(torch, name), device),
        }
        for name in job.dtypes
    }


def main(argv: Sequence[str]) -> None:
    job = Job(**json.loads(argv[0]))
    if job.check:
        print(json.dumps(check(job)), flush=True)
        return
    result = ceiling(job) if job.kind == CEILING else asdict(measure(job))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
