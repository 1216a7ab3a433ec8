"""Count what a training step costs the host on CUDA: operators and waits for the device, without a device.

    python scripts/checks/step_counts.py                    all cases
    python scripts/checks/step_counts.py --only "ddp;muon"  cases whose name contains "ddp" or "muon"

A step is that of a training run (model, loss, backward pass, clipping, optimizer, averagers and statistics), with fake
CUDA tensors and a fake process group: it takes the code of CUDA, on rank 0 of any number of ranks, and computes and
allocates nothing. A torch that was built without CUDA gets the device from fake_cuda.cpp, which needs a C++ compiler.

Operators are those that torch dispatches, without views. Two models of 1 and 3 blocks separate the operators of a
block from the others. A wait is an operator whose result the host needs before it can continue (.item(), nonzero, a
boolean index, a copy without non_blocking). One fused attention kernel stands for attention in every case: flex
attention is compiled, which fake tensors do not support. The exit code is 1 if a step waits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_cuda import DEVICE, PRELOADED, fake_cuda, run_with_fake_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_lm.errors import ConfigError, run_cli

SHAPE = {"hidden_dim": 256, "n_heads": 4, "seq_len": 256, "vocab_size": 4096, "post_embed_norm": False}


@dataclass(frozen=True)
class CountedCase:
    """A step to count: trainer flags, number of ranks, and further keys of the model's JSON file."""

    name: str
    flags: str = "--precision amp_bfloat16"
    ranks: int = 1
    keys: dict[str, Any] = field(default_factory=dict)


_AMP, _FSDP = "--precision amp_bfloat16", "--precision amp_bfloat16 --fsdp --fsdp-amp"
_DOCUMENTS = "--document-mask --end-of-text-id 0"
_EXPERTS = {"moe_freq": 1, "moe_num_experts": 4, "moe_top_k": 2}
CASES = (
    CountedCase("fp32", "--precision fp32"),
    CountedCase("amp_bfloat16"),
    CountedCase("bf16", "--precision bf16"),
    CountedCase("fsdp, one rank", _FSDP),
    CountedCase("documents", f"{_AMP} {_DOCUMENTS}"),
    CountedCase("documents, op", f"{_AMP} {_DOCUMENTS} --activation-checkpointing op"),
    CountedCase("full recomputation", f"{_AMP} --activation-checkpointing full"),
    CountedCase("two micro-batches", f"{_AMP} --accum-freq 2"),
    CountedCase("z-loss", f"{_AMP} --z-loss-coefficient 1e-4"),
    CountedCase("spikes", f"{_AMP} --skip-loss-spikes 6"),
    CountedCase("experts", _AMP, keys=_EXPERTS),
    CountedCase("muon", f"{_AMP} --optimizer muon"),
    CountedCase("averagers", f"{_AMP} --averagers ema_0.99,poly_8"),
    CountedCase("ddp", _AMP, ranks=8),
    CountedCase("fsdp", _FSDP, ranks=8),
    CountedCase("hybrid", f"{_FSDP} --fsdp-hybrid", ranks=8),
    CountedCase("fsdp, muon, averagers", f"{_FSDP} --optimizer muon --averagers ema_0.99,poly_8", ranks=8),
    CountedCase("tensor", f"{_AMP} --tensor-parallel 2", ranks=2),
    CountedCase("tensor, fsdp", f"{_FSDP} --tensor-parallel 2", ranks=8),
    CountedCase("context", f"{_FSDP} --context-parallel 2", ranks=2),
    CountedCase("mixture, fsdp", _FSDP, ranks=8, keys=_EXPERTS),
    CountedCase("expert parallel", f"{_FSDP} --expert-parallel 4", ranks=8, keys=_EXPERTS),
)


# --- counting -------------------------------------------------------------------------------------------------------
_WAITS = frozenset({
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal",
    "aten::is_nonzero", "aten::repeat_interleave.Tensor", "aten::_unique2", "aten::unique_consecutive",
    "aten::unique_dim",
})  # fmt: skip
_NOT_COUNTED = ("prim::", "aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")


class StepCounter(TorchDispatchMode):
    """Count the dispatched operators of each phase, and record the waits.

    Attributes:
        phase: the current phase; the caller sets it.
        operators: the number of operators by phase, without views and allocations.
        waits: "operator at file:line" of each wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.operators: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # count the operators on its local tensors
        name = func._schema.name
        if not func.is_view and not name.startswith(_NOT_COUNTED):
            self.operators[self.phase] += 1
        if is_wait(func, args, kwargs or {}):
            self.waits.append(f"{func} at {_caller()}")
        return func(*args, **(kwargs or {}))


def is_wait(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for the device in this operator on CUDA tensors."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    name = func.name()
    if name in {"aten::_to_copy", "aten::copy_"}:
        source = tensors[-1].device
        target = torch.device(kwargs.get("device") or source) if name == "aten::_to_copy" else tensors[0].device
        non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        # A scalar of the host becomes an argument of the kernel.
        return source.type != target.type and not non_blocking
    if not any(tensor.is_cuda for tensor in tensors):
        return False
    if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        # Assigning a number through a single mask is masked_fill_.
        is_fill = "put" in name and len(args[1]) == 1 and args[2].numel() == 1 and not args[2].is_cuda
        return has_mask and not is_fill
    return name in _WAITS


def _caller() -> str:
    """Return file:line of the innermost frame in the package."""
    frames = [frame for frame in traceback.extract_stack() if "/open_lm/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"


@dataclass(frozen=True)
class StepCounts:
    """The operators of a step: of a forward and of a backward pass of one block, of both outside of the blocks, of
    clipping and the optimizer, of the averagers, and of statistics (counts, sums over ranks, means, skipped steps).
    `optimizer_block` are those of the optimizer for each block. waits: as in StepCounter."""

    forward_block: float
    backward_block: float
    outside: float
    optimizer_block: float
    optimizer: float
    averagers: float
    statistics: float
    waits: list[str]

    @property
    def block(self) -> float:
        return self.forward_block + self.backward_block


def count_case(case: CountedCase) -> StepCounts:
    """Count a step of models with 1 and 3 blocks."""
    small, large = (_count_step(case, layers) for layers in (1, 3))

    def per_block(phase: str) -> float:
        return (large.operators[phase] - small.operators[phase]) / 2

    forward, backward, optimizer = (per_block(phase) for phase in ("forward", "backward", "optimizer"))
    passes = small.operators["forward"] + small.operators["backward"]
    return StepCounts(
        forward_block=forward,
        backward_block=backward,
        outside=passes - forward - backward,
        optimizer_block=optimizer,
        optimizer=small.operators["optimizer"] - optimizer,
        averagers=small.operators["averagers"],
        statistics=small.operators["sums"] + small.operators["statistics"],
        waits=sorted({*small.waits, *large.waits}),
    )


def _count_step(case: CountedCase, layers: int) -> StepCounter:
    """Return the counts of the second step of a model, whose optimizer has its state."""
    from bench_train_worker import trainer_flags
    from our_step import OurStep

    from open_lm.data.device import DeviceBatch

    counter = StepCounter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder, "model.json")
        path.write_text(json.dumps({**SHAPE, **case.keys, "n_layers": layers}, allow_nan=False))
        stack.enter_context(fake_cuda(case.ranks))
        flags = trainer_flags(str(path), 2 * case.ranks, [*case.flags.split(), "--grad-clip-norm", "1"])
        trainer = stack.enter_context(OurStep(flags)).trainer
        if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
            # Return each bucket unchanged: there are no other ranks to reduce with.
            trainer.model.register_comm_hook(None, lambda _, bucket: _completed(bucket.buffer()))

        def enter(phase: str) -> None:
            counter.phase = phase

        phases: Any = SimpleNamespace(enter=enter, end_step=lambda: enter("statistics"))
        trainer._phases = phases
        size = 2 * case.ranks // trainer.options.layout.data_size
        ids = torch.zeros(size, SHAPE["seq_len"], dtype=torch.int64, device=DEVICE)
        filled = torch.ones(size, dtype=torch.bool, device=DEVICE)
        batch = DeviceBatch(ids, ids, filled, size, (size,) * len(trainer.loader.sources), 0)
        for number in range(2):
            with counter if number == 1 else ExitStack():
                result = trainer._train_step(batch)
                accepted = trainer._guard.accepted
                trainer._window.add(result.values, accepted)
                torch.cat([result.counts[:2].double(), trainer._guard.report()])
                if trainer.averagers is not None:
                    enter("averagers")
                    trainer.averagers.step()
    return counter


def _completed(value: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(value)
    return future


# --- output ---------------------------------------------------------------------------------------------------------
_COLUMNS = ("forward_block", "backward_block", "outside", "optimizer_block", "optimizer", "averagers", "statistics")


def format_row(name: str, counts: StepCounts) -> str:
    numbers = "".join(f"{getattr(counts, column):>11.0f}" for column in _COLUMNS)
    return f"{name:22}{numbers}{len(counts.waits):>8}  {'; '.join(counts.waits)}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXTS",
        help="cases whose name contains one of these texts, separated by semicolons",
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser


def main(argv: Sequence[str]) -> None:
    args = make_parser().parse_args(argv)
    if PRELOADED not in os.environ:
        result = run_with_fake_device(Path(__file__), argv)
        sys.stdout.write(result.stdout)
        sys.exit(result.returncode)
    os.environ.pop("LD_PRELOAD")
    chosen = [case for case in CASES if any(text in case.name for text in args.only.split(";"))]
    if not chosen:
        raise ConfigError(f"--only {args.only}: no such case, expected {', '.join(case.name for case in CASES)}")
    if not args.json:
        headings = ("fwd/block", "bwd/block", "outside", "opt/block", "optimizer", "averagers", "statistics", "waits")
        print(
            f"{'operators':22}" + "".join(f"{heading:>11}" for heading in headings[:-1]) + f"{'waits':>8}", flush=True
        )
    results = {}
    for case in chosen:
        results[case.name] = counts = count_case(case)
        if not args.json:
            print(format_row(case.name, counts), flush=True)
    if args.json:
        print(json.dumps({name: asdict(counts) for name, counts in results.items()}, allow_nan=False))
    if any(counts.waits for counts in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
