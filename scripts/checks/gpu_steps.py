"""The steps of first_gpu_half_hour.py. Each is a function of the machine and the folder with earlier results."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_dim": 64, "n_heads": 4, "n_layers": 2, "seq_len": 64, "vocab_size": 512, "post_embed_norm": False}
AMP = ["--precision", "amp_bfloat16"]


@dataclass(frozen=True)
class Machine:
    """is_cpu: run the shrunk form on a CPU. peer_python: the interpreter with torchtitan, if there is one."""

    is_cpu: bool
    peer_python: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.is_cpu else "cuda"


@dataclass(frozen=True)
class Found:
    """What a step found; `ok` is None if there is nothing to compare with, as for speeds on a CPU."""

    text: str
    ok: bool | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuStep:
    """A step: what is expected, the limit of its time, and its function."""

    expected: str
    limit_s: float
    run: Callable[[Machine, Path], Found]


STEPS: dict[str, GpuStep] = {}


def step(name: str, expected: str, minutes: float) -> Callable[[Callable[[Machine, Path], Found]], Any]:
    """Register a step."""

    def register(function: Callable[[Machine, Path], Found]) -> Callable[[Machine, Path], Found]:
        STEPS[name] = GpuStep(expected, minutes * 60, function)
        return function

    return register


def run_step(name: str, machine: Machine, folder: Path) -> Found:
    """Run a step in this process."""
    found = STEPS[name].run(machine, folder)
    print(found.text, flush=True)
    return found


# --- checks ---------------------------------------------------------------------------------------------------------
@step("device", "a known device with the memory of the table", 1)
def check_device(machine: Machine, folder: Path) -> Found:
    import torch

    from open_lm.config.devices import memory_bytes, peak_16_bit_flops

    if machine.is_cpu:
        return Found(f"CPU, torch {torch.__version__}")
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    peak, memory = peak_16_bit_flops(name), memory_bytes(name)
    text = f"{name}, {total / 2**30:.1f} GiB, torch {torch.__version__}"
    if peak is None or memory is None:
        return Found(f"{text}; open_lm/config/devices.py does not know it", False)
    text += f"; in the table {memory / 2**30:.1f} GiB, {peak / 1e12:.0f} TFLOP/s"
    return Found(text, abs(total / memory - 1) < 0.02, {"name": name, "memory_bytes": total})


@step("tests", "no failure; skipped: xformers and FlashAttention 3, if they are not installed", 8)
def run_tests(machine: Machine, folder: Path) -> Found:
    chosen = ["tests/config/test_devices.py"] if machine.is_cpu else ["-m", "gpu", "tests"]
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", f"--junitxml={report}", *chosen]
    done = subprocess.run(command, check=False, cwd=ROOT)
    if not report.exists():
        return Found(f"exit code {done.returncode}", False)
    counts = dict(re.findall(r'\b(tests|failures|errors|skipped)="(\d+)"', report.read_text()))
    return Found(", ".join(f"{counts[key]} {key}" for key in sorted(counts)), done.returncode == 0, counts)


@step("waits", "no wait for the device in steps with document masks, eager and compiled", 4)
def check_waits(machine: Machine, folder: Path) -> Found:
    import torch
    from bench_train_worker import trainer_flags
    from our_step import OurStep

    model = _model(machine, folder, "open_lm_160m")
    losses = []
    for compiled in [[]] if machine.is_cpu else [[], ["--torchcompile"]]:
        flags = [*AMP, "--document-mask", "--end-of-text-id", "0", "--grad-clip-norm", "1", *compiled]
        with OurStep(trainer_flags(model, 4, flags)) as our_step:
            params = our_step.session.params
            ids = torch.randint(params.vocab_size, (4, params.seq_len + 1), generator=torch.Generator().manual_seed(0))
            ids[:, ::37] = 0
            inputs, targets = (x.to(machine.device).contiguous() for x in (ids[:, :-1], ids[:, 1:]))
            for _ in range(3):  # the first steps compile and load libraries
                our_step(inputs, targets)
            _set_sync_debug_mode(machine, "error")
            try:
                loss = our_step(inputs, targets)
            finally:
                _set_sync_debug_mode(machine, "default")
            losses.append(loss.item())
    finite = all(loss < 20 for loss in losses)  # false for NaN
    return Found(f"no wait; losses {', '.join(f'{loss:.3f}' for loss in losses)}", finite, {"losses": losses})


def _set_sync_debug_mode(machine: Machine, mode: str) -> None:
    import torch

    if not machine.is_cpu:
        torch.cuda.set_sync_debug_mode(mode)


@step("kernels", "errors of the loss below 1 %; its Triton kernel at least 1.5 times as fast as torch's operators", 3)
def check_kernels(machine: Machine, folder: Path) -> Found:
    from bench_loss import Bench, open_lm_loss

    from open_lm.kernels import linear_loss

    sizes = (
        {"dim": 64, "vocab": 512, "tokens": 256} if machine.is_cpu else {"dim": 512, "vocab": 50432, "tokens": 16384}
    )
    bench = Bench(Namespace(**sizes, device=machine.device, dtype="bfloat16", scale=0.05, check_tokens=256))
    errors = bench.errors(open_lm_loss)

    def fastest() -> float:
        return min(bench.seconds(bench.forward_backward, open_lm_loss) for _ in range(2 if machine.is_cpu else 10))

    with_kernel = fastest()
    with mock.patch.object(linear_loss, "softmax_kernels", lambda logits: None):
        without = fastest()
    speedup = without / with_kernel
    text = f"errors {errors[0]:.1e}, {errors[1]:.1e}, {errors[2]:.1e}; {1e3 * with_kernel:.1f} ms, {speedup:.2f} times"
    ok = max(errors) < 1e-2 and (machine.is_cpu or speedup >= 1.5)
    return Found(text, ok, {"errors": list(errors), "seconds": with_kernel, "speedup": speedup})


@step("nccl", "a run of one rank with FSDP ends with exit code 0", 3)
def check_nccl(machine: Machine, folder: Path) -> Found:
    model = _model(machine, folder, "open_lm_11m")
    tokens = "2048" if machine.is_cpu else "131072"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    command += ["open_lm.main", "--model", model, "--dataset-type", "synthetic", "--train-num-samples", tokens]
    command += ["--epochs", "1", "--global-batch-size", "8", "--workers", "0", "--fsdp", "--fsdp-amp", *AMP]
    with TemporaryDirectory() as run_folder:
        done = subprocess.run(command, check=False, cwd=run_folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return Found(f"exit code {done.returncode}", done.returncode == 0)


# --- speeds ---------------------------------------------------------------------------------------------------------
MODEL_1B = ["--model-norm", "rms_norm", "--torchcompile", "--fsdp", "--fsdp-amp"]


@step("1b", "at least 50 % MFU (estimate for an H200: 54 %), as fast as torchtitan", 6)
def measure_1b(machine: Machine, folder: Path) -> Found:
    return _measured(machine, folder, "1b", "open_lm_1b", 8, MODEL_1B, min_mfu=0.5, peer=True)


@step("7b", "at least 50 % MFU, as fast as torchtitan", 6)
def measure_7b(machine: Machine, folder: Path) -> Found:
    policy = "--activation-checkpointing half-op"  # torchtitan's selective checkpointing
    flags = f"--model-norm rms_norm --torchcompile --precision bf16 {policy}".split()
    return _measured(machine, folder, "7b", "open_lm_7b", 4, flags, min_mfu=0.5, peer=True)


@step("fp8", "faster than 1b", 4)
def measure_fp8(machine: Machine, folder: Path) -> Found:
    flags = MODEL_1B if machine.is_cpu else [*MODEL_1B, "--fp8"]  # no CPU has the products
    return _compared(_measured(machine, folder, "fp8", "open_lm_1b", 8, flags), folder, "1b", 1.0)


@step("11m", "at least 15 % MFU", 3)
def measure_11m(machine: Machine, folder: Path) -> Found:
    return _measured(machine, folder, "11m", "open_lm_11m", 32, ["--torchcompile"], min_mfu=0.15)


@step("graphs", "CUDA graphs at least as fast as 11m without", 3)
def measure_graphs(machine: Machine, folder: Path) -> Found:
    flags = ["--torchcompile", *([] if machine.is_cpu else ["--torchcompile-mode", "reduce-overhead"])]
    return _compared(_measured(machine, folder, "graphs", "open_lm_11m", 32, flags), folder, "11m", 0.98)


@step("planner", "the planned memory of 1b within 10 % of the allocator's peak", 1)
def check_planner(machine: Machine, folder: Path) -> Found:
    from open_lm.config.command_line import parse_args
    from open_lm.config.layout import resolve_layout
    from open_lm.config.sections import Config
    from open_lm.planner.memory import peak
    from open_lm.planner.setup import TrainingSetup
    from open_lm.planner.shapes import shape_of

    measured = _values(folder, "1b").get("memory_bytes")
    if not measured:
        return Found("1b has no result", False)
    model = _model(machine, folder, "open_lm_1b")
    config = Config.from_namespace(parse_args(["--model", model, *AMP, *MODEL_1B]))
    layout = resolve_layout(config.parallel, 1, 1)
    total = peak(TrainingSetup(shape_of(config.model), config, layout, 8, device_type=machine.device)).total
    text = f"planned {total / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB"
    return Found(text, None if machine.is_cpu else abs(total / measured - 1) < 0.1, {"planned_bytes": total})


@step("loader", "the data loader is faster than the step of 11m", 2)
def measure_loader(machine: Machine, folder: Path) -> Found:
    import bench_loader

    sequences, workers, seconds = (64, 0, 0.2) if machine.is_cpu else (4096, 4, 3.0)
    with TemporaryDirectory() as temporary:
        with mock.patch.dict(os.environ, {"OPEN_LM_SHARED": temporary}):  # random tokens
            bench_loader.make_data(Path(temporary), sequences)
        data = str(Path(temporary, "npy", "manifest.jsonl"))
        result = bench_loader.our_speed(Namespace(data=data, workers=[workers], batch_size=32, seconds=seconds))
    loader = result["tokens"] / result["seconds"]
    training = _values(folder, "11m").get("tokens_per_second")
    text = f"{loader:,.0f} tokens/s" + (f", step {training:,.0f}" if training else "; 11m has no result")
    ok = None if machine.is_cpu or not training else loader > training
    return Found(text, ok, {"tokens_per_second": loader})


def _measured(  # noqa: PLR0917 (the settings of a measurement)
    machine: Machine,
    folder: Path,
    name: str,
    model: str,
    batch_size: int,
    flags: Sequence[str],
    min_mfu: float = 0.0,
    peer: bool = False,
) -> Found:
    """Measure a training step with bench_train.py, next to torchtitan if `peer` and its interpreter is known."""
    result = folder / f"bench_{name}.json"
    shape = _model(machine, folder, model)
    if machine.is_cpu:
        flags, batch_size = [flag for flag in flags if flag != "--torchcompile"], 2
    command = ["bench_train.py", "--model", shape, "--device", machine.device, "--batch-size", str(batch_size)]
    command += ["--rounds", "1", "--steps", "2" if machine.is_cpu else "20", "--ceiling", "--json", str(result)]
    against = ["--against", "torchtitan", "--peer-python", machine.peer_python] if peer and machine.peer_python else []
    _run([*command, *against, *flags])
    (entry,) = json.loads(result.read_text())["models"].values()
    speeds = {key: statistics.median(values["speeds"]) for key, values in entry["results"].items()}
    ours = speeds.pop("ours")
    memory = max(entry["results"]["ours"]["memory_bytes"])
    values: dict[str, Any] = {"tokens_per_second": ours, "memory_bytes": memory}
    text, ok = f"{ours:,.0f} tokens/s, {memory / 1e9:.1f} GB", None
    if not machine.is_cpu:
        import torch

        from open_lm.monitor.metrics import device_peak_flops

        peak = device_peak_flops(torch.device("cuda", 0), torch.bfloat16)
        values["mfu"] = mfu = ours * entry["flops_per_token"] / peak if peak else 0.0
        text, ok = f"{text}, {mfu:.1%} MFU", mfu >= min_mfu
    for other, speed in speeds.items():
        values[other] = speed
        text, ok = f"{text}, {ours / speed:.2f} times {other}", ok is not False and ours >= speed
    return Found(text, ok, values)


def _compared(found: Found, folder: Path, other: str, minimum: float) -> Found:
    """Return a measurement with its speed relative to that of an earlier step."""
    before = _values(folder, other).get("tokens_per_second")
    if not before:
        return Found(f"{found.text}; {other} has no result", None, found.values)
    ratio = found.values["tokens_per_second"] / before
    ok = None if found.ok is None else ratio >= minimum
    return Found(f"{found.text}, {ratio:.2f} times {other}", ok, {**found.values, "ratio": ratio})


def _run(command: Sequence[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "bench" / command[0]), *command[1:]], check=True)


def _values(folder: Path, name: str) -> dict[str, Any]:
    """Return the values of an earlier step; empty if it has no result."""
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_text())["values"]) if path.exists() else {}


def _model(machine: Machine, folder: Path, name: str) -> str:
    """Return the name of a model configuration, or on a CPU a tiny one."""
    if not machine.is_cpu:
        return name
    path = folder / "tiny.json"
    path.write_text(json.dumps(SMALL, allow_nan=False))
    return str(path)
