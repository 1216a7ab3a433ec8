#!/usr/bin/env python
"""Our kernels for bfloat16 on a CPU beside torch's: time of forward and backward pass, and error.

    python scripts/bench_cpu_kernels.py --heads 12 --head-width 64 --batch 4 --length 2048

The two take turns, so that what else the machine does falls on both; a time is the best of the rounds. Errors are the
norm of the difference from float64 over the norm, the larger of results and gradients, on one sequence of at most 512
tokens. The head and its loss are in bench_loss.py, whole steps in bench_train.py.
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

from open_lm.config.architecture import gated_width
from open_lm.kernels.cpu_attention import causal_attention
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.kernels.gating import gated_silu
from open_lm.kernels.linear import linear
from open_lm.kernels.native import attention as native_attention
from open_lm.kernels.native import elements
from open_lm.model.positional_embedding.rotary import rotate_halves


@dataclass(frozen=True)
class Case:
    """A function of tensors that need gradients, by our kernels and by torch's, and those tensors for B x T tokens."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: Callable[[int, int], list[Tensor]]


def cases(heads: int, width: int) -> Iterator[Case]:
    dim = heads * width
    hidden = gated_width(dim)

    def parts(batch: int, length: int) -> list[Tensor]:
        return list(torch.randn(batch, length, 3 * heads, width).split(heads, dim=2))

    yield Case("attention", causal_attention, sdpa, parts)
    for count in (4, 32):
        yield Case(f"attention, {count} documents", partial(in_documents, count), partial(one_by_one, count), parts)
    yield Case(
        "rotation",
        lambda x: rotate_halves(x, *angles(x), dtype=x.dtype),
        plain_rotation,
        lambda batch, length: parts(batch, length)[:1],
    )
    yield Case(
        "silu(gate) * up",
        gated_silu,
        lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
        lambda batch, length: [torch.randn(batch, length, 2 * hidden)],
    )
    for name, into, out_of in (("qkv", dim, 3 * dim), ("gate, up", dim, 2 * hidden), ("down", hidden, dim)):
        yield Case(f"linear, {name}", linear, F.linear, partial(layer, into, out_of))


def layer(into: int, out_of: int, batch: int, length: int) -> list[Tensor]:
    return [torch.randn(batch, length, into), torch.randn(out_of, into) / into**0.5]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def in_documents(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside `count` documents of equal length."""
    length = -(-q.shape[1] // count)
    starts = (torch.arange(q.shape[1]) // length * length).int().expand(len(q), -1).contiguous()
    return causal_attention(q, k, v, starts)


def one_by_one(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = zip(*(x.split(-(-q.shape[1] // count), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa(*piece) for piece in pieces], dim=1)


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    turns = torch.arange(x.shape[1])[:, None, None] / 10.0 ** torch.arange(x.shape[-1] // 2)
    return turns.cos(), turns.sin()


def plain_rotation(x: Tensor) -> Tensor:
    cos, sin = angles(x)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def run(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor) -> tuple[list[Tensor], float, float]:
    """Result and gradients of the weighted sum; milliseconds forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    begin = time.perf_counter()
    out = function(*leaves)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out, leaves, weights)
    end = time.perf_counter()
    return [out.detach(), *gradients], 1e3 * (middle - begin), 1e3 * (end - middle)


def largest_error(function: Callable[..., Tensor], case: Case, length: int) -> float:
    torch.manual_seed(0)
    inputs = [x.bfloat16() for x in case.inputs(1, length)]
    weights = torch.randn_like(case.theirs(*inputs))
    found, *_ = run(function, inputs, weights)
    exact, *_ = run(case.theirs, [x.double() for x in inputs], weights.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for kernels, problem in (("attention", native_attention.problem(args.head_width)), ("others", elements.problem())):
        if problem is not None:
            print(f"{kernels}: torch's in both columns, since {problem}")
    keep_freed_memory()  # as training has it
    shape = f"{args.batch} x {args.length} tokens, {args.heads} heads of {args.head_width}"
    print(f"{shape}, {torch.get_num_threads()} threads")
    print(f"{'milliseconds':27}{'ours':>7}{'back':>8}{'torch':>9}{'back':>8}{'times':>8}{'error':>10}{'torch':>9}")
    for case in cases(args.heads, args.head_width):
        inputs = [x.bfloat16() for x in case.inputs(args.batch, args.length)]
        weights = torch.randn_like(case.theirs(*inputs))
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.rounds):
            for name, function in (("ours", case.ours), ("theirs", case.theirs)):
                _, forward, backward = run(function, inputs, weights)
                before = best.get(name, (forward, backward))
                best[name] = (min(before[0], forward), min(before[1], backward))
        errors = [largest_error(f, case, min(args.length, 512)) for f in (case.ours, case.theirs)]
        ours, theirs = best["ours"], best["theirs"]
        print(
            f"{case.name:27}{ours[0]:7.1f}{ours[1]:8.1f}{theirs[0]:9.1f}{theirs[1]:8.1f}{sum(theirs) / sum(ours):8.2f}"
            f"{errors[0]:10.1e}{errors[1]:9.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
