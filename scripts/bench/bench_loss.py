"""Compare time, memory and error of several implementations of the cross entropy of a linear head.

    python scripts/bench_loss.py --dim 96 --vocab 50432 --tokens 8192 --dtype bfloat16

Compares the logits of all tokens at once, torch's linear_cross_entropy in each mode (if this torch has it), the
Liger kernel (if installed) and open_lm's implementation. Measurements alternate, so that other load on the machine
affects all of them. A time is the best of all rounds: of the summed loss only, and with the gradients of hidden states
and weight, which are float32 as in training with automatic mixed precision. Memory is the increase of the peak (of
CUDA's allocator, or of the process's resident memory on Linux). Errors are relative to float64, on --check-tokens
tokens: the absolute error of the mean loss, and for each gradient the norm of the difference divided by the norm.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from resident_memory import peak_resident_bytes, reset_peak, resident_bytes
from torch import Tensor

from open_lm.data.masking import IGNORE_INDEX
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.kernels.linear_loss import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N,D), weight (V,D), targets (N,) -> sum of losses
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def open_lm_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE_INDEX)


def torch_loss(dtype: torch.dtype, policy: Any) -> Loss:
    """Return torch's linear_cross_entropy, which ignores autocast.

    policy: its accumulation policy; None computes all logits at once.
    """
    options = None if policy is None else torch.nn.LinearCrossEntropyOptions(acc_policy=policy)

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, reduction="sum", options=options)

    return compute


def implementations(dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    """Return the implementations that are available in this environment, by name."""
    losses: dict[str, Loss] = {"full logits": full_logits}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for policy in (None, "auto", "accurate", "balanced", "compact"):
            losses[f"torch {policy or 'reference'}"] = torch_loss(dtype, policy)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.transformers")
        liger = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
        losses["liger"] = lambda hidden, weight, targets: liger(weight.to(dtype), hidden.to(dtype), targets)
    return {**losses, "open_lm": open_lm_loss}


class Bench:
    """The inputs of one shape and the measurements on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(args.tokens, args.dim, generator=generator)
        weight = torch.randn(args.vocab, args.dim, generator=generator) * args.scale
        self.hidden = hidden.to(self.device).requires_grad_()
        self.weight = weight.to(self.device).requires_grad_()
        self.targets = torch.randint(args.vocab, (args.tokens,), generator=generator).to(self.device)
        self.checked = slice(0, args.check_tokens)

    def compute(self, loss: Loss, tokens: slice = slice(None)) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return loss(self.hidden[tokens], self.weight, self.targets[tokens])

    def forward(self, loss: Loss) -> None:
        with torch.no_grad():
            self.compute(loss)

    def forward_backward(self, loss: Loss) -> None:
        self.hidden.grad = self.weight.grad = None
        self.compute(loss).backward()

    def seconds(self, passes: Callable[[Loss], None], loss: Loss) -> float:
        self._synchronize()
        start = time.perf_counter()
        passes(loss)
        self._synchronize()
        return time.perf_counter() - start

    def memory_bytes(self, loss: Loss) -> int:
        """Return the increase of the memory peak in a forward and backward pass, including both gradients."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.forward_backward(loss)
            return torch.cuda.max_memory_allocated(self.device) - before
        reset_peak()
        before = resident_bytes()
        self.forward_backward(loss)
        return peak_resident_bytes() - before

    def errors(self, loss: Loss) -> tuple[float, float, float]:
        """Return the errors of the mean loss, of the gradient of the hidden states and of that of the weight."""
        exact = [x.detach().double().requires_grad_() for x in (self.hidden[self.checked], self.weight)]
        exact_loss = F.cross_entropy(F.linear(*exact), self.targets[self.checked], reduction="sum")
        exact_loss.backward()
        self.hidden.grad = self.weight.grad = None
        actual_loss = self.compute(loss, self.checked)
        actual_loss.backward()
        tokens = len(exact[0])
        assert self.hidden.grad is not None and self.weight.grad is not None
        errors = [
            float((actual.double() - expected.grad).norm() / expected.grad.norm())
            for actual, expected in zip((self.hidden.grad[self.checked], self.weight.grad), exact, strict=True)
            if expected.grad is not None
        ]
        return abs(actual_loss.item() - exact_loss.item()) / tokens, errors[0], errors[1]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=50432)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="type of the matrix products (default: bfloat16)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=0.05, help="standard deviation of the weight; that of the hidden states is 1"
    )
    parser.add_argument("--check-tokens", type=int, default=512)
    parser.add_argument("--only", nargs="*", help="measure only the implementations with these names, as printed")
    args = parser.parse_args()
    bench = Bench(args)
    available = implementations(bench.dtype, bench.device)
    losses = {name: loss for name, loss in available.items() if not args.only or name in args.only}
    if not losses:
        parser.error(f"--only {args.only}: expected some of {', '.join(available)}")
    memory = {name: bench.memory_bytes(loss) for name, loss in losses.items()}
    keep_freed_memory()  # as in training
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in losses}
    for _ in range(1 + args.rounds):
        for name, loss in losses.items():
            times[name][0].append(bench.seconds(bench.forward, loss))
            times[name][1].append(bench.seconds(bench.forward_backward, loss))
    print(
        f"D {args.dim}, V {args.vocab}, {args.tokens} tokens, {args.dtype} on {args.device}, torch {torch.__version__}"
    )
    print(f"{'':18}{'forward':>12}{'with backward':>15}{'peak':>10}{'loss error':>12}{'d hidden':>11}{'d weight':>11}")
    for name, loss in losses.items():
        forward, both = (min(values) / args.tokens * 1e6 for values in times[name])
        loss_error, hidden_error, weight_error = bench.errors(loss)
        print(
            f"{name:18}{forward:9.1f} us{both:12.1f} us{memory[name] / 2**20:6.0f} MiB{loss_error:12.1e}"
            f"{hidden_error:11.1e}{weight_error:11.1e}"
        )
    print("times are per token; d hidden, d weight: errors of the gradients")


if __name__ == "__main__":
    main()
