"""Time, memory and error of ways to compute the cross entropy of a linear head, side by side.

    python scripts/bench_loss.py --dim 96 --vocab 50432 --tokens 8192 --dtype bfloat16

Compares the logits of all tokens at once, torch's linear_cross_entropy in each mode where this torch has it, the
Liger kernel where it is installed, and open_lm's. The ways take turns, so that what else the machine does hits all of
them; a time is the best of the rounds, of the sum of losses alone and with the gradients of hidden states and weight,
which are held in float32 as in training with automatic mixed precision. Memory is the peak beyond what was held before
(CUDA's allocator, or the process's resident memory on Linux). Errors are those of --check-tokens tokens against
float64: of their mean loss, and of each gradient as the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.kernels.linear_loss import linear_cross_entropy
from open_lm.model.losses import IGNORE_INDEX

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N,D), weight (V,D), targets (N,) -> the sum
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE_INDEX)


def torchs(dtype: torch.dtype, policy: Any) -> Loss:
    """torch's own; it knows no autocast. policy: how it accumulates, None for all logits at once."""
    options = None if policy is None else torch.nn.LinearCrossEntropyOptions(acc_policy=policy)

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, reduction="sum", options=options)

    return compute


def ways(dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    """Every way that this environment has."""
    found: dict[str, Loss] = {"full logits": full_logits}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for policy in (None, "auto", "accurate", "balanced", "compact"):
            found[f"torch {policy or 'reference'}"] = torchs(dtype, policy)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.transformers")
        liger = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
        found["liger"] = lambda hidden, weight, targets: liger(weight.to(dtype), hidden.to(dtype), targets)
    return {**found, "open_lm": chunks}


class Bench:
    """Inputs of one shape, and what is measured of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(args.tokens, args.dim, generator=generator)
        weight = torch.randn(args.vocab, args.dim, generator=generator) * args.scale
        self.hidden = hidden.to(self.device).requires_grad_()
        self.weight = weight.to(self.device).requires_grad_()
        self.targets = torch.randint(args.vocab, (args.tokens,), generator=generator).to(self.device)
        self.checked = slice(0, args.check_tokens)

    def loss(self, way: Loss, rows: slice = slice(None)) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return way(self.hidden[rows], self.weight, self.targets[rows])

    def forward(self, way: Loss) -> None:
        with torch.no_grad():
            self.loss(way)

    def both(self, way: Loss) -> None:
        self.hidden.grad = self.weight.grad = None
        self.loss(way).backward()

    def seconds(self, act: Callable[[Loss], None], way: Loss) -> float:
        self._wait()
        start = time.perf_counter()
        act(way)
        self._wait()
        return time.perf_counter() - start

    def memory_bytes(self, way: Loss) -> int:
        """The peak of forward and backward, with both gradients, beyond what was held before."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.both(way)
            return torch.cuda.max_memory_allocated(self.device) - before
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident_bytes("VmRSS")
        self.both(way)
        return _resident_bytes("VmHWM") - before

    def errors(self, way: Loss) -> tuple[float, float, float]:
        """Of the mean loss, of hidden's gradient and of the weight's."""
        exact = [x.detach().double().requires_grad_() for x in (self.hidden[self.checked], self.weight)]
        truth = F.cross_entropy(F.linear(*exact), self.targets[self.checked], reduction="sum")
        truth.backward()
        self.hidden.grad = self.weight.grad = None
        loss = self.loss(way, self.checked)
        loss.backward()
        tokens = len(exact[0])
        assert self.hidden.grad is not None and self.weight.grad is not None
        off = [
            float((found.double() - true.grad).norm() / true.grad.norm())
            for found, true in zip((self.hidden.grad[self.checked], self.weight.grad), exact, strict=True)
            if true.grad is not None
        ]
        return abs(loss.item() - truth.item()) / tokens, off[0], off[1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=50432)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.05, help="standard deviation of the weight; hidden's is 1")
    parser.add_argument("--check-tokens", type=int, default=512)
    parser.add_argument("--only", nargs="*", help="names of ways, as they are printed")
    args = parser.parse_args()
    bench = Bench(args)
    chosen = {name: way for name, way in ways(bench.dtype, bench.device).items() if not args.only or name in args.only}
    if not chosen:
        parser.error(f"--only {args.only}: expected some of {', '.join(ways(bench.dtype, bench.device))}")
    memory = {name: bench.memory_bytes(way) for name, way in chosen.items()}
    keep_freed_memory()  # as training does
    times = {
        name: ([bench.seconds(bench.forward, way)], [bench.seconds(bench.both, way)]) for name, way in chosen.items()
    }
    for _ in range(args.rounds):
        for name, way in chosen.items():
            times[name][0].append(bench.seconds(bench.forward, way))
            times[name][1].append(bench.seconds(bench.both, way))
    print(
        f"D {args.dim}, V {args.vocab}, {args.tokens} tokens, {args.dtype} on {args.device}, torch {torch.__version__}"
    )
    print(f"{'':18}{'forward':>12}{'and backward':>14}{'peak':>10}{'loss':>11}{'d hidden':>11}{'d weight':>11}")
    for name, way in chosen.items():
        forward, both = (min(values) / args.tokens * 1e6 for values in times[name])
        loss, of_hidden, of_weight = bench.errors(way)
        print(
            f"{name:18}{forward:9.1f} us{both:11.1f} us{memory[name] / 2**20:6.0f} MiB{loss:11.1e}{of_hidden:11.1e}"
            f"{of_weight:11.1e}"
        )
    print("times are for each token")


if __name__ == "__main__":
    main()
