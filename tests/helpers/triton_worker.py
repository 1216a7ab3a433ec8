"""Compile the Triton kernels of the loss, or run them in Triton's interpreter and print their errors as JSON.

Start it in an environment with Triton. With TRITON_INTERPRET=1 CPU tensors stand for CUDA tensors; without it the
kernels are compiled.
"""

from __future__ import annotations

import json
import os
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from open_lm.data.masking import IGNORE_INDEX
from open_lm.kernels import linear_loss, triton_softmax
from open_lm.kernels.linear_loss import linear_cross_entropy


def kernel_errors(columns: int, dtype: torch.dtype, with_factors: bool) -> list[float]:
    """Return the largest errors of maxima, logarithms of sums and probabilities of a few rows."""
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(5, columns, generator=generator) * 20).to(dtype)
    logits[1] = torch.finfo(dtype).min / 4  # padding only
    logits[2, 0] = 300.0  # one logit has all of the probability
    exact = logits.double()
    factors = torch.rand(5, generator=generator) if with_factors else None
    maxima, log_sums = triton_softmax.log_sum_exp(logits)
    expected = torch.softmax(exact, -1) * (1.0 if factors is None else factors.double()[:, None])
    errors = [
        (maxima - exact.amax(-1)).abs().max(),
        (log_sums - torch.logsumexp(exact - exact.amax(-1, keepdim=True), -1)).abs().max(),
    ]
    triton_softmax.to_probs_(logits, maxima + log_sums, factors)
    used = [0, 2, 3, 4]  # a rank whose columns are all padding multiplies its probabilities by 0
    return [error.item() for error in (*errors, (logits.double() - expected)[used].abs().max())]


def loss_errors(dtype: torch.dtype, z: float, per_token: bool) -> list[float]:
    """Return the relative differences of loss and gradients between the kernels and the CPU's code."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(5003, (70,), generator=generator)
    targets[::5] = IGNORE_INDEX
    leaves = [torch.randn(size, 16, generator=generator).to(dtype).requires_grad_() for size in (70, 5003)]
    weights = torch.rand(70, generator=generator)

    def compute() -> list[Tensor]:
        loss = linear_cross_entropy(
            *leaves, targets, ignore_index=IGNORE_INDEX, z_loss_coefficient=z, per_token=per_token, num_ids=5000
        )
        return [loss.detach(), *torch.autograd.grad((loss * weights).sum() if per_token else loss, leaves)]

    targets[targets >= 5000] = 0
    expected = compute()
    with (
        mock.patch.object(linear_loss, "_on_cpu", lambda tensor: False),
        mock.patch.object(linear_loss, "softmax_kernels", lambda logits: triton_softmax),
        mock.patch.object(linear_loss, "_chunk_rows", lambda hidden: 32),
    ):
        found = compute()
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def compiled_bytes(capability: int) -> list[int]:
    """Compile both kernels for a compute capability, without a device; return the sizes of their programs."""
    sizes = []
    for kernel, names, constants in (
        (triton_softmax._log_sum_exp, ("logits", "maxima", "log_sums"), {"BLOCK": 4096}),
        (triton_softmax._to_probs, ("logits", "log_sums", "factors"), {"HAS_FACTORS": True, "BLOCK": 4096}),
    ):
        signature = {**dict.fromkeys(names, "*fp32"), "logits": "*bf16", "columns": "i32"}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        sizes.append(len(program.asm["cubin"]))
    return sizes


def main() -> None:
    if "TRITON_INTERPRET" not in os.environ:
        print(json.dumps({capability: compiled_bytes(capability) for capability in (80, 90)}))
        return
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    kernels = {
        f"{columns} {dtype} {factors}": kernel_errors(columns, dtype, factors)
        for columns, dtype, factors in ((1, dtypes[0], False), (4096, dtypes[1], True), (5003, dtypes[2], False))
    }
    losses = {
        f"{dtype} {z} {per_token}": loss_errors(dtype, z, per_token)
        for dtype, z, per_token in ((dtypes[0], 0.0, False), (dtypes[0], 1e-2, True), (dtypes[1], 1e-2, False))
    }
    empty = torch.empty(0, 7)
    triton_softmax.to_probs_(empty, triton_softmax.log_sum_exp(empty)[0], None)
    print(json.dumps({"kernels": kernels, "losses": losses}))


if __name__ == "__main__":
    main()
