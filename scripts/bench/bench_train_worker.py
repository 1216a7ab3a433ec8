"""Run one measurement of bench_train.py in a separate process: `bench_train_worker.py RUN`.

RUN is a BenchmarkRun as JSON. The last printed line is the result as JSON.

A measured step is any function(inputs, targets) -> loss. "ours" is the step that training uses, with the model,
optimizer and options of a run's session. Other steps come from a builder, function(model, precision, device) -> step,
which also receives the trainer's full configuration if it has a parameter `config`.
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
from matmul_ceiling import layer_flops, linear_shapes, square_flops
from step_profile import profile_step
from torch import Tensor

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, ModelConfig
from open_lm.errors import ConfigError, run_cli
from open_lm.model.transformer import create_model
from open_lm.monitor.metrics import peak_memory_bytes
from open_lm.storage.strict_json import to_json

OURS, CEILING = "ours", "ceiling"
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class BenchmarkRun:
    """The settings of one measurement.

    kind: OURS, CEILING, or module:function of the builder of another step.
    model: path of a model configuration.
    flags: further flags of the trainer.
    dtypes: the types whose matrix-product rate is measured.
    trace: file for the profile; None writes none.
    python: the interpreter that runs the process.
    check: only check that the step can be built.
    """

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
        """Return the command that runs this measurement in a separate process."""
        return [self.python, __file__, to_json(asdict(self))]


@dataclass(frozen=True)
class StepMeasurement:
    """The result of measuring a step.

    step_s: seconds of each step after the warm-up.
    first_step_s: seconds from before the model is built until the end of the first step.
    memory_bytes: increase of the peak memory over that before the model is built.
    profile: seconds of one more step by category and pass; None without a profile.
    profiled_s: seconds of that step.
    """

    step_s: list[float]
    first_step_s: float
    memory_bytes: int
    profile: dict[str, dict[str, float]] | None = None
    profiled_s: float | None = None


def trainer_flags(model: str, batch_size: int, flags: Sequence[str]) -> list[str]:
    """Return the flags of a training run of `model` on random tokens."""
    base = ["--model", model, "--global-batch-size", str(batch_size), "--dataset-type", "synthetic", "--workers", "0"]
    return [*base, "--train-num-samples", "1000000000", "--epochs", "1", "--logs", "none", *flags]


def build_step(run: BenchmarkRun) -> Step:
    """Return the step that the builder of `run.kind` creates."""
    return call_with_settings(run, import_builder(run)[1])


def import_builder(run: BenchmarkRun) -> tuple[ModuleType, Callable[..., Any]]:
    """Return the module and function of `run.kind`. Modules may be in this folder or in the working directory."""
    sys.path.append(os.getcwd())
    name, _, function = run.kind.partition(":")
    try:
        module = importlib.import_module(name)
        return module, getattr(module, function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--against {run.kind}: cannot be imported ({error}); expected module:function") from error


def call_with_settings(run: BenchmarkRun, function: Callable[..., Any]) -> Any:
    """Return function(model, precision, device), called with `config` as well if it has such a parameter."""
    settings = {}
    if "config" in inspect.signature(function).parameters:
        settings["config"] = Config.from_namespace(parse_args(trainer_flags(run.model, run.batch_size, run.flags)))
    return function(run.model, run.precision, torch.device(run.device), **settings)


def check_builder(run: BenchmarkRun) -> dict[str, str]:
    """Return this process's version of torch.

    Raise ConfigError if the builder cannot be imported, or if the function `check` of its module (optional) rejects the
    settings.
    """
    module, _ = import_builder(run)
    if hasattr(module, "check"):
        call_with_settings(run, module.check)
    return {"torch": torch.__version__}


def random_batches(run: BenchmarkRun, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` pairs of inputs and targets (B,T) on the device: random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, run.batch_size, run.seq_len + 1)
    ids = torch.randint(run.vocab_size, shape, generator=generator).to(run.device)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]


def time_steps(step: Step, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[float], float]:
    """Return the seconds of each step and the last loss.

    On CUDA the device measures the time, so that the host runs ahead as in training.
    """
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


def measure(run: BenchmarkRun) -> StepMeasurement:
    """Build the step of `run` and measure it."""
    with ExitStack() as stack:
        if run.kind != OURS:
            return _measure(run, lambda: build_step(run))
        from our_step import OurStep  # imports most of open_lm, which other steps may not need

        flags = trainer_flags(run.model, run.batch_size, run.flags)
        return _measure(run, lambda: stack.enter_context(OurStep(flags)))


def _measure(run: BenchmarkRun, build: Callable[[], Step]) -> StepMeasurement:
    device = torch.device(run.device)
    batches = random_batches(run, run.warmup + run.steps)
    memory_before, start = peak_memory_bytes(device), time.perf_counter()
    step = build()
    build_s = time.perf_counter() - start
    warm_s, _ = time_steps(step, batches[: run.warmup]) if run.warmup else ([], 0.0)
    step_s, loss = time_steps(step, batches[run.warmup :])
    if not math.isfinite(loss):
        raise ConfigError(f"{run.kind}: the loss after {len(batches)} steps is {loss}; its speed is meaningless")
    memory = peak_memory_bytes(device) - memory_before
    profile, profiled_s = None, None
    if run.profile:
        profile, profiled_s = profile_step(step, *batches[-1], None if run.trace is None else Path(run.trace))
    return StepMeasurement(step_s, build_s + [*warm_s, *step_s][0], memory, profile, profiled_s)


def measure_ceilings(run: BenchmarkRun) -> dict[str, dict[str, float]]:
    """Return the FLOP/s of matrix products by type and shape.

    "own": the shapes of the model's linear layers, with the tokens of a micro-batch. "square": a large square.
    """
    with torch.device("meta"):
        shapes = linear_shapes(create_model(ModelConfig(model=run.model)))
    tokens = run.batch_size // run.micro_batches * run.seq_len
    device = torch.device(run.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
    return {
        name: {
            "own": layer_flops(shapes, tokens, getattr(torch, name), device),
            "square": square_flops(getattr(torch, name), device),
        }
        for name in run.dtypes
    }


def main(argv: Sequence[str]) -> None:
    run = BenchmarkRun(**json.loads(argv[0]))
    if run.check:
        print(to_json(check_builder(run)), flush=True)
        return
    result = measure_ceilings(run) if run.kind == CEILING else asdict(measure(run))
    print(to_json(result), flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
