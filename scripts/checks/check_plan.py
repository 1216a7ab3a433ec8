"""Compare the planner's memory estimates with the memory that torch's MemTracker measures in a simulated training step.

    python scripts/check_plan.py                               all cases, one line each
    python scripts/check_plan.py --models open_lm_7b --detail  one model, with the memory by category
    python scripts/check_plan.py --only muon,tensor            only cases whose name contains "muon" or "tensor"

A step is training.step.train_step on the parallelized model, with fake tensors (FakeTensorMode) and a fake process
group. One process simulates rank 0 of any number of ranks; nothing is computed or allocated. The code takes the CUDA
branches but runs CPU operators. Where these save different tensors (norms under autocast), the planner estimates for
the CPU (device_type). The exit code is 1 if an estimate differs by more than 10 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from open_lm.config.command_line import parse_args
from open_lm.config.layout import resolve_layout
from open_lm.config.sections import Config
from open_lm.errors import ConfigError, run_cli
from open_lm.planner.memory import accumulated_gradient_bytes, host_bytes, peak
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of

MODELS = ("open_lm_160m", "open_lm_411m", "open_lm_1b", "open_lm_7b")
PER_NODE = 8
TOLERANCE = 0.1
HOST = "host"  # simulated device for host memory, because the CPU simulates the accelerator


@dataclass(frozen=True)
class PlanCase:
    """A step to compare: trainer flags, number of ranks, and micro-batches of `batch` sequences."""

    name: str
    flags: str
    ranks: int = 1
    batch: int = 2

    @property
    def config(self) -> Config:
        return Config.from_namespace(parse_args(self.flags.split()))

    def setup(self) -> TrainingSetup:
        config = self.config
        layout = resolve_layout(config.parallel, self.ranks, min(PER_NODE, self.ranks))
        return TrainingSetup(shape_of(config.model), config, layout, self.batch, device_type="cpu")


def cases(model: str) -> list[PlanCase]:
    """Return all cases for one model."""
    amp, mixed = "--precision amp_bfloat16", "--precision amp_bfloat16 --fsdp --fsdp-amp"
    full, op = "--activation-checkpointing full", "--activation-checkpointing op"
    compared = [
        PlanCase("single fp32", "--precision fp32"),
        PlanCase("single bf16", "--precision bf16"),
        PlanCase("single amp", amp),
        PlanCase("single amp full", f"{amp} {full}"),
        PlanCase("single amp op", f"{amp} --activation-checkpointing op"),
        PlanCase("single amp half-op", f"{amp} --activation-checkpointing half-op"),
        PlanCase("single amp every 2", f"{amp} --activation-checkpointing 2"),
        PlanCase("single accum", f"{amp} --accum-freq 2"),
        PlanCase("single muon full", f"{amp} --optimizer muon {full}"),
        PlanCase("rms_norm", f"{amp} --model-norm rms_norm"),
        PlanCase("gain_only_lp_layer_norm", f"{amp} --model-norm gain_only_lp_layer_norm"),
        PlanCase("qk-norm", f"{amp} --qk-norm"),
        PlanCase("gelu", f"{amp} --ffn-type gelu"),
        PlanCase("gemma_geglu", f"{amp} --ffn-type gemma_geglu"),
        PlanCase("experts", f"{amp} --moe-freq 2 --moe-num-experts 8"),
        PlanCase("ddp amp", amp, 8),
        PlanCase("ddp accum full", f"{amp} --accum-freq 2 {full}", 8),
        PlanCase("ddp muon full", f"{amp} --optimizer muon {full}", 8),
        PlanCase("fsdp fp32", "--precision fp32 --fsdp", 8),
        PlanCase("fsdp amp", f"{amp} --fsdp", 8),
        PlanCase("fsdp pure bf16", f"{amp} --fsdp --fsdp-pure-bf16", 8),
        PlanCase("fsdp", mixed, 8),
        PlanCase("fsdp full", f"{mixed} {full}", 8),
        PlanCase("fsdp accum full", f"{mixed} --accum-freq 2 {full}", 8),
        PlanCase("fsdp accum every full", f"{mixed} --accum-freq 2 --accum-reduce every-micro-batch {full}", 8),
        PlanCase("fsdp muon full", f"{mixed} --optimizer muon {full}", 8),
        PlanCase("fsdp experts", f"{mixed} --moe-freq 2 --moe-num-experts 8", 8),
        PlanCase("fsdp experts, 16 ranks", f"{mixed} --moe-freq 2 --moe-num-experts 8", 16),
        PlanCase("experts divided", f"{mixed} --moe-freq 2 --moe-num-experts 8 --expert-parallel 4", 8),
        PlanCase("experts divided op", f"{mixed} --moe-freq 2 --moe-num-experts 8 --expert-parallel 4 {op}", 8),
        PlanCase("zero2", f"{mixed} --fsdp-zero2", 8),
        PlanCase("zero2 accum full", f"{mixed} --fsdp-zero2 --accum-freq 2 {full}", 8),
        PlanCase("hybrid", f"{mixed} --fsdp-hybrid", 16),
        PlanCase("hybrid accum every", f"{mixed} --fsdp-hybrid --accum-freq 2 --accum-reduce every-micro-batch", 16),
        PlanCase("tensor", f"{amp} --tensor-parallel 4", 8),
        PlanCase("tensor+fsdp", f"{mixed} --tensor-parallel 4", 8),
        PlanCase("tensor+fsdp full", f"{mixed} --tensor-parallel 4 {full}", 8),
        PlanCase("tensor+fsdp muon full", f"{mixed} --tensor-parallel 4 --optimizer muon {full}", 8),
        PlanCase("context", f"{mixed} --context-parallel 4", 8),
        PlanCase("context full", f"{mixed} --context-parallel 4 {full}", 8),
        PlanCase("offload", f"{mixed} --fsdp-cpu-offload", 8),
        PlanCase("offload full", f"{mixed} --fsdp-cpu-offload {full}", 8),
        PlanCase("offload full, one rank", f"{mixed} --fsdp-cpu-offload {full}"),
    ]
    return [PlanCase(case.name, f"--model {model} {case.flags}", case.ranks, case.batch) for case in compared]


# --- tracking -------------------------------------------------------------------------------------------------------
def tracked(case: PlanCase) -> dict[str, int]:
    """Return the bytes of each tracker category at the peak of the second step.

    "Total" is the sum of the categories. "Host" is the part of --fsdp-cpu-offload in host memory. "Accumulated" are the
    gradients between the first and the second micro-batch.
    """
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils.weak import WeakIdKeyDictionary

    from open_lm.distributed.precision import get_autocast, parameter_dtype
    from open_lm.distributed.processes import Runtime, build_layout
    from open_lm.optim.build import build_optimizer
    from open_lm.parallel.parallelize import parallelize
    from open_lm.training.step import StepOptions, train_step

    class Peaks(MemTracker):
        """A MemTracker without peaks per module, whose update after every operator takes most of the time."""

        def _update_peak_stats(self, peak_state: Any) -> None:
            modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
            super()._update_peak_stats(peak_state)
            self.memory_tracking = modules

    config, device = case.config, torch.device("cpu")
    dtype, count = parameter_dtype(config.precision.precision), config.optim.accum_freq
    with ExitStack() as stack:
        stack.enter_context(_simulated_ranks())
        if case.ranks > 1 or config.parallel.fsdp:
            dist.init_process_group("fake", rank=0, world_size=case.ranks, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        runtime = Runtime(world_size=case.ranks, local_world_size=min(PER_NODE, case.ranks))
        layout = build_layout(runtime, config.parallel)
        if config.parallel.fsdp_cpu_offload:
            stack.enter_context(_host_memory())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = parallelize(
            _model(config, dtype), layout, config.parallel, device=device, model_cfg=config.model, dtype=dtype
        )
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            # Return each bucket unchanged: there are no other ranks to reduce with.
            model.register_comm_hook(None, lambda state, bucket: _completed(bucket.buffer()))
        optimizer = build_optimizer(model, config.optim)
        autocast = get_autocast(config.precision.precision, "cpu")
        every = config.parallel.reduces_every_micro_batch
        options = StepOptions(
            runtime, layout, autocast, accum_freq=count, reduces_every_micro_batch=every, grad_clip_norm=1.0
        )
        ids = torch.zeros(case.batch * count, shape_of(config.model).seq_len, dtype=torch.int64)
        with _assumed_values():
            train_step(model, ids, ids, optimizer, options)  # creates the optimizer's state
        tracker = Peaks()
        tracker.track_external(model, optimizer, ids)

        resident: list[int] = []  # before each micro-batch

        def enter(phase: str) -> None:
            if phase == "forward":  # the tracker does not expect a second forward pass (of the next micro-batch)
                tracker.reset_mod_stats()
                resident.append(tracker.get_tracker_snapshot("current")[device]["Total"])

        with tracker, _assumed_values():
            train_step(model, ids, ids, optimizer, options, enter_phase=enter)
        peaks = {peak_device.type: snapshot for peak_device, snapshot in tracker.get_tracker_snapshot("peak").items()}
    categories = {getattr(key, "name", str(key)): value for key, value in peaks["cpu"].items()}
    accumulated = resident[1] - resident[0] if count > 1 else 0
    return {**categories, "Host": peaks.get(HOST, {}).get("Total", 0), "Accumulated": accumulated}


def _model(config: Config, dtype: Any) -> Any:
    """Build the model of `config` on fake tensors, which cannot be initialized or moved."""
    import torch

    from open_lm.model.transformer import Transformer, create_params

    class UninitializedTransformer(Transformer):
        def reset_parameters(self, seed: int | None = None) -> None: ...

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UninitializedTransformer(create_params(config.model))
    finally:
        torch.set_default_dtype(default_dtype)


@contextmanager
def _assumed_values() -> Iterator[None]:
    """Answer reads of fake tensor values as if all tokens had targets and all comparisons were true."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class AssumedValues(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten._local_scalar_dense.default:
                return 1
            if func is aten.nonzero.default:
                return torch.arange(len(args[0]))[:, None]
            if func is aten.index_put_.default and args[1][0].dtype == torch.bool:
                return args[0]
            return func(*args, **(kwargs or {}))

    with AssumedValues():
        yield


@contextmanager
def _simulated_ranks() -> Iterator[None]:
    """Make object collectives and computations on values work with the fake group and fake tensors.

    Also selects the code of CUDA where the package depends on the device.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.attention import bias
    from torch.nn.parallel import distributed

    from open_lm.kernels import linear_loss
    from open_lm.kernels.native import attention
    from open_lm.model import feed_forward
    from open_lm.optim import matrix_assignment, muon

    def gather_copies(objects: list[Any], value: Any, group: Any = None) -> None:
        objects[:] = [value] * len(objects)

    def gated_silu(gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    patches: list[Any] = [
        mock.patch.object(dist, "all_gather_object", gather_copies),
        mock.patch.object(DeviceMesh, "__init__", _with_real_tensors(DeviceMesh.__init__)),
        mock.patch.object(matrix_assignment, "_shard_group", _with_real_tensors(matrix_assignment._shard_group)),
        # Take the branches of CUDA, independently of this CPU's cache size and instruction set.
        mock.patch.object(linear_loss, "_on_cpu", lambda tensor: False),
        mock.patch.object(linear_loss, "supports_float32_output", lambda device: True),
        mock.patch.object(feed_forward, "gated_silu", gated_silu),
        mock.patch.object(attention, "supports", lambda *tensors: False),
        mock.patch.object(muon, "orthogonalization_dtype", lambda device: torch.bfloat16),
        mock.patch.object(bias, "causal_lower_right", lambda *size: _NoMask()),
        # DDP compares parameters and reorders its buckets with collectives that the fake group cannot run.
        mock.patch.object(distributed, "_verify_param_shape_across_processes", lambda *args: None),
        mock.patch.object(dist.Reducer, "_rebuild_buckets", lambda reducer: False),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with FakeTensorMode disabled, because it reads tensor values."""
    from torch.utils._python_dispatch import _disable_current_modes

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


class _NoMask:
    """A replacement for the causal mask, which on CUDA is part of the kernel and takes no memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]


def _completed(value: Any) -> Any:
    """Return a completed future."""
    import torch

    future: Any = torch.futures.Future()
    future.set_result(value)
    return future


@contextmanager
def _host_memory() -> Iterator[None]:
    """Redirect FSDP2's copies to the CPU to another device, because the CPU simulates the accelerator."""
    from types import SimpleNamespace

    import torch
    from torch import Tensor
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from open_lm.parallel import parallelize

    if not hasattr(torch, HOST):
        cpu_names = ("Event", "Stream", "current_stream", "device_count", "is_available", "is_initialized", "stream")
        functions = {
            "current_device": lambda: 0,
            "_is_in_bad_fork": lambda: False,
            "get_amp_supported_dtype": lambda: [torch.bfloat16],
        }
        module = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in cpu_names}, **functions)
        _setup_privateuseone_for_python_backend(HOST, module)
    move = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        caller = sys._getframe(1).f_globals["__name__"]
        if (
            caller.startswith("torch.distributed.fsdp")
            and args == (torch.device("cpu"),)
            and tensor.device.type == "cpu"
        ):
            args = (HOST,)
        return move(tensor, *args, **kwargs)

    with (
        mock.patch.object(Tensor, "to", to),
        mock.patch.object(Tensor, "cpu", lambda tensor: move(tensor, HOST)),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(FSDPParamGroup, "_validate_cpu_offload_params", lambda group: None),
        mock.patch.object(parallelize, "_offloads", lambda cfg, device: cfg.fsdp_cpu_offload),
    ):
        yield


# --- output ---------------------------------------------------------------------------------------------------------
def compare(case: PlanCase, detail: bool) -> float:
    """Print a case, and return the relative error of the planner's total."""
    setup = case.setup()
    memory, measured = peak(setup), tracked(case)
    error = memory.total / measured["Total"] - 1
    notes = f", host memory {_mib(host_bytes(setup))} / {_mib(measured['Host'])}" if measured["Host"] else ""
    if setup.is_sharded and measured["Accumulated"]:
        notes += f", accumulated {_mib(accumulated_gradient_bytes(setup))} / {_mib(measured['Accumulated'])}"
    print(
        f"{case.name:44}{_mib(memory.total):>10}{_mib(measured['Total']):>10}{error:>+8.1%}  {memory.phase}{notes}",
        flush=True,
    )
    if detail:
        predicted = ", ".join(f"{name} {_mib(value)}" for name, value in memory.items() if value)
        categories = ", ".join(f"{name} {_mib(value)}" for name, value in measured.items() if value and name != "Total")
        print(f"    predicted  {predicted}\n    tracked    {categories}", flush=True)
    return error


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(MODELS), help=f"comma-separated model names (default: {','.join(MODELS)})"
    )
    parser.add_argument("--only", default="", metavar="TEXT,…", help="run only cases whose name contains one of these")
    parser.add_argument("--detail", action="store_true", help="print the memory of each category")
    args = parser.parse_args(argv)
    errors = []
    for model in args.models.split(","):
        chosen = [case for case in cases(model) if any(part in case.name for part in args.only.split(","))]
        if not chosen:
            names = ", ".join(case.name for case in cases(model))
            raise ConfigError(f"--only {args.only}: no case matches; use parts of these names: {names}")
        print(f"{f'MiB per rank, {model}':44}{'predicted':>10}{'tracked':>10}{'error':>8}  peak")
        errors += [compare(case, args.detail) for case in chosen]
    print(f"{len(errors)} cases, errors from {min(errors):+.1%} to {max(errors):+.1%}")
    if max(map(abs, errors)) > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
