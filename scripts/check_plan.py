"""Compare the planner's memory with what torch's memory tracker sees of a real training step on tensors without data.

    python scripts/check_plan.py                       all cases, a line each
    python scripts/check_plan.py --only fsdp --detail  those whose names hold "fsdp", by category

A step is train.train_step on the model that parallelize makes, its tensors fake (FakeTensorMode) and its process group
too, so that one process stands for rank 0 of many and nothing is computed or allocated. What kernels keep on the CPU
and on CUDA differs a little; the planner knows both (device_type), and compared is the CPU's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from open_lm.config import Config
from open_lm.errors import ConfigError, run_cli
from open_lm.layout import layout_of
from open_lm.params import parse_args
from open_lm.planner.memory import Job, peak
from open_lm.planner.shapes import shape_of

PER_NODE = 8
# Nothing is computed. The more threads, the larger and fewer are the blocks of logits that the loss works on in a CPU's
# cache: a MiB for each, which no plan counts.
THREADS = 16


@dataclass(frozen=True)
class Case:
    """A step to compare: flags of the trainer, on so many ranks, with micro-batches of `batch` sequences."""

    name: str
    flags: str
    ranks: int = 1
    batch: int = 2

    @property
    def config(self) -> Config:
        return Config.from_namespace(parse_args(self.flags.split()))

    def job(self) -> Job:
        config = self.config
        layout = layout_of(config.parallel, self.ranks, min(PER_NODE, self.ranks))
        return Job(shape_of(config.model), config, layout, self.batch, device_type="cpu")


def _cases() -> list[Case]:
    amp, mixed = "--precision amp_bfloat16", "--precision amp_bfloat16 --fsdp --fsdp-amp"
    cases = [
        Case("single fp32", "--precision fp32"),
        Case("single amp", amp),
        Case("single bf16", "--precision bf16"),
        Case("single amp full", f"{amp} --activation-checkpointing full"),
        Case("single amp op", f"{amp} --activation-checkpointing op"),
        Case("single amp every 2", f"{amp} --activation-checkpointing 2"),
        Case("single amp muon", f"{amp} --optimizer muon"),
        Case("fsdp fp32", "--precision fp32 --fsdp", 8),
        Case("fsdp amp", f"{amp} --fsdp", 8),
        Case("fsdp mixed", mixed, 8),
        Case("fsdp mixed full", f"{mixed} --activation-checkpointing full", 8),
        Case("fsdp pure bf16", f"{amp} --fsdp --fsdp-pure-bf16", 8),
        Case("zero2 mixed", f"{mixed} --fsdp-zero2", 8),
        Case("zero2 mixed full", f"{mixed} --fsdp-zero2 --activation-checkpointing full", 8),
        Case("hybrid mixed", f"{mixed} --fsdp-hybrid", 16),
    ]
    small = [
        Case(f"{case.name}, {model[8:]}", f"--model {model} {case.flags}", case.ranks, case.batch)
        for model in ("open_lm_11m", "open_lm_160m")
        for case in cases
    ]
    variants = ("--model-norm rms_norm", "--qk-norm", "--ffn-type gelu", "--ffn-type gemma_geglu",
                "--model-norm gain_only_lp_layer_norm", "--moe-freq 2 --moe-num-experts 8")  # fmt: skip
    return [
        *small,
        *(Case(f"{flags[2:]}, 160m", f"--model open_lm_160m {amp} {flags}") for flags in variants),
        Case("fsdp mixed, 1b", f"--model open_lm_1b {mixed}", 8),
        Case("fsdp mixed full, 7b", f"--model open_lm_7b {mixed} --activation-checkpointing full", 8),
        Case("zero2 mixed full, 7b", f"--model open_lm_7b {mixed} --fsdp-zero2 --activation-checkpointing full", 8),
    ]


# --- tracking -------------------------------------------------------------------------------------------------------
def tracked(case: Case) -> dict[str, int]:
    """Bytes by the tracker's categories, "Total" among them, at the peak of a second step."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from open_lm.distributed import Runtime, build_layout
    from open_lm.optim import build_optimizer
    from open_lm.parallelize import parallelize
    from open_lm.precision import get_autocast, parameter_dtype
    from open_lm.train import StepOptions, train_step

    config = case.config
    torch.set_num_threads(THREADS)
    if case.ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=case.ranks, store=FakeStore())
    runtime = Runtime(world_size=case.ranks, local_world_size=min(PER_NODE, case.ranks))
    layout = build_layout(runtime, config.parallel)
    precision = config.precision.precision
    dtype = parameter_dtype(precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(config, dtype)
        model = parallelize(
            model, layout, config.parallel, device=torch.device("cpu"), model_cfg=config.model, dtype=dtype
        )
        optimizer = build_optimizer(model, config.optim)
        autocast = get_autocast(precision, "cpu")
        options = StepOptions(runtime, layout, autocast, grad_clip_norm=1.0)
        ids = torch.zeros(case.batch, shape_of(config.model).seq_len, dtype=torch.int64)
        with _assumed_values():
            train_step(model, ids, ids, optimizer, options)  # makes the optimizer's state
        if case.job().is_sharded:
            tracker: Any = FSDPMemTracker(model, optimizer)
            tracker.track_external(optimizer, ids)
        else:
            tracker = MemTracker()
            tracker.track_external(model, optimizer, ids)
        with tracker, _assumed_values():
            train_step(model, ids, ids, optimizer, options)
        (device,) = (d for d in tracker.get_tracker_snapshot("peak") if d.type == "cpu")
        snapshot = tracker.get_tracker_snapshot("peak")[device]
    if case.ranks > 1:
        dist.destroy_process_group()
    found = {getattr(key, "name", str(key)): value for key, value in snapshot.items()}
    return {**found, "Total": found["Total"] - (THREADS << 20)}


def _model(config: Config, dtype: Any) -> Any:
    """The model of `config`, on fake tensors: they cannot be filled, nor moved."""
    import torch

    from open_lm.model import Transformer, create_params

    class Unfilled(Transformer):
        def reset_parameters(self, seed: int | None = None) -> None: ...

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Unfilled(create_params(config.model))
    finally:
        torch.set_default_dtype(standard)


@contextmanager
def _assumed_values() -> Iterator[None]:
    """Where code on a CPU looks at values, it finds that all tokens have targets and all comparisons hold."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Assumed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1
            if func is torch.ops.aten.nonzero.default:
                return torch.arange(len(args[0]))[:, None]
            return func(*args, **(kwargs or {}))

    with Assumed():
        yield


# --- what is said ---------------------------------------------------------------------------------------------------
def compare(case: Case, detail: bool) -> float:
    """The planner's total over the tracker's, less one; printed."""
    memory, found = peak(case.job()), tracked(case)
    error = memory.total / found["Total"] - 1
    print(
        f"{case.name:44}{memory.total / 2**20:>10,.0f}{found['Total'] / 2**20:>10,.0f}{error:>+8.1%}  {memory.phase}",
        flush=True,
    )
    if detail:
        said = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in memory.items() if value)
        seen = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in found.items() if value and name != "Total")
        print(f"    predicted  {said}\n    tracked    {seen}", flush=True)
    return error


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names hold it")
    parser.add_argument("--detail", action="store_true", help="show categories")
    args = parser.parse_args(argv)
    cases = [case for case in _cases() if args.only in case.name]
    if not cases:
        raise ConfigError(f"--only {args.only}: no such case; there are {', '.join(case.name for case in _cases())}")
    print(f"{'MiB of a rank':44}{'predicted':>10}{'tracked':>10}{'error':>8}  peak")
    errors = [compare(case, args.detail) for case in cases]
    print(f"{len(errors)} cases, errors from {min(errors):+.1%} to {max(errors):+.1%}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
