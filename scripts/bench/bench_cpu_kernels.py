#!/usr/bin/env python
"""Compare our bfloat16 CPU kernels with torch's: time of the forward and backward pass, and error.

    python scripts/bench_cpu_kernels.py --heads 12 --head-width 64 --batch 4 --length 2048

Measurements of the two alternate, so that other load on the machine affects both; each time is the best of all rounds.
The error is the norm of the difference from float64 divided by the norm of the float64 value, the maximum over the
result and all gradients, on one sequence of at most 512 tokens. bench_loss.py measures the head and its loss,
bench_train.py full steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.config.model_keys import gated_width
from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.linear import linear
from open_lm.kernels.native import attention as native_attention
from open_lm.kernels.native import elements
from open_lm.model.positional_embedding.rotary import rotate_halves


@dataclass(frozen=True)
class KernelCase:
    """A differentiable function, computed by our kernels and by torch's.

    inputs: returns the function's tensor arguments for (batch, length) tokens; all of them need gradients.
    """

    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    inputs: Callable[[int, int], list[Tensor]]


def cases(heads: int, width: int) -> Iterator[KernelCase]:
    dim = heads * width
    hidden = gated_width(dim)

    def qkv(batch: int, length: int) -> list[Tensor]:
        return list(torch.randn(batch, length, 3 * heads, width).split(heads, dim=2))

    yield KernelCase("attention", causal_attention, sdpa, qkv)
    for count in (4, 32):
        yield KernelCase(
            f"attention, {count} documents", partial(documents_ours, count), partial(documents_sdpa, count), qkv
        )
    yield KernelCase(
        "rotation",
        lambda x: rotate_halves(x, *cos_sin(x), dtype=x.dtype),
        torch_rotation,
        lambda batch, length: qkv(batch, length)[:1],
    )
    yield KernelCase(
        "silu(gate) * up",
        gated_silu,
        lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
        lambda batch, length: [torch.randn(batch, length, 2 * hidden)],
    )
    for name, fan_in, fan_out in (("qkv", dim, 3 * dim), ("gate, up", dim, 2 * hidden), ("down", hidden, dim)):
        yield KernelCase(f"linear, {name}", linear, F.linear, partial(linear_inputs, fan_in, fan_out))


def linear_inputs(in_features: int, out_features: int, batch: int, length: int) -> list[Tensor]:
    return [torch.randn(batch, length, in_features), torch.randn(out_features, in_features) / in_features**0.5]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def documents_ours(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within `count` documents of equal length, with our kernel."""
    length = -(-q.shape[1] // count)
    starts = (torch.arange(q.shape[1]) // length * length).int().expand(len(q), -1).contiguous()
    return causal_attention(q, k, v, starts)


def documents_sdpa(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within `count` documents of equal length, with one call of torch's kernel per document."""
    pieces = zip(*(x.split(-(-q.shape[1] // count), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa(*piece) for piece in pieces], dim=1)


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[1])[:, None, None] / 10.0 ** torch.arange(x.shape[-1] // 2)
    return angles.cos(), angles.sin()


def torch_rotation(x: Tensor) -> Tensor:
    cos, sin = cos_sin(x)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def run(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor) -> tuple[list[Tensor], float, float]:
    """Return the result and the gradients of its weighted sum, and the milliseconds of forward and backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    out = function(*leaves)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out, leaves, weights)
    end = time.perf_counter()
    return [out.detach(), *gradients], 1e3 * (middle - start), 1e3 * (end - middle)


def max_error(function: Callable[..., Tensor], case: KernelCase, length: int) -> float:
    """Return the maximum relative error of result and gradients in bfloat16, compared with torch in float64."""
    torch.manual_seed(0)
    inputs = [x.bfloat16() for x in case.inputs(1, length)]
    weights = torch.randn_like(case.torchs(*inputs))
    actual, *_ = run(function, inputs, weights)
    exact, *_ = run(case.torchs, [x.double() for x in inputs], weights.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    problems = {"attention": native_attention.problem(args.head_width), "other kernels": elements.problem()}
    for kernels, problem in problems.items():
        if problem is not None:
            print(f"{kernels}: both columns show torch's kernels, because {problem}")
    keep_freed_memory()  # as in training
    shape = f"{args.batch} x {args.length} tokens, {args.heads} heads of {args.head_width}"
    print(f"{shape}, {torch.get_num_threads()} threads")
    print(
        f"{'milliseconds':27}{'ours fwd':>9}{'bwd':>8}{'torch fwd':>11}{'bwd':>8}{'speedup':>9}"
        f"{'our error':>11}{'torch':>9}"
    )
    for case in cases(args.heads, args.head_width):
        inputs = [x.bfloat16() for x in case.inputs(args.batch, args.length)]
        weights = torch.randn_like(case.torchs(*inputs))
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.rounds):
            for name, function in (("ours", case.ours), ("torch", case.torchs)):
                _, forward, backward = run(function, inputs, weights)
                before = best.get(name, (forward, backward))
                best[name] = (min(before[0], forward), min(before[1], backward))
        errors = [max_error(f, case, min(args.length, 512)) for f in (case.ours, case.torchs)]
        ours, torchs = best["ours"], best["torch"]
        print(
            f"{case.name:27}{ours[0]:9.1f}{ours[1]:8.1f}{torchs[0]:11.1f}{torchs[1]:8.1f}{sum(torchs) / sum(ours):9.2f}"
            f"{errors[0]:11.1e}{errors[1]:9.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
