"""Registration of custom CPU operators with torch, for compilation, fake tensors and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(schema: str, kernel: Callable[..., Any], fake_kernel: Callable[..., Any]) -> None:
    """Register the operator open_lm::NAME with the schema "NAME(Tensor x, …) -> …".

    `kernel` is its CPU implementation, `fake_kernel` returns empty results for fake tensors. torch.library.custom_op is
    not used because its first call takes seconds to load the compiler.
    """
    name = f"open_lm::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu", kernel)
    torch.library.register_fake(name, fake_kernel)


def register_backward(name: str, save_for_backward: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the derivative of open_lm::`name`.

    save_for_backward(ctx, inputs, output) runs after the operator, backward(ctx, *grads) in the backward pass. The
    latter must call open_lm::`name`_backward, which has no derivative: differentiating it raises RuntimeError.
    """
    torch.library.register_autograd(f"open_lm::{name}", backward, setup_context=save_for_backward)
    torch.library.register_autograd(f"open_lm::{name}_backward", _raise_no_second_derivative)


def _raise_no_second_derivative(_ctx: Any, *_grads: Any) -> None:
    raise RuntimeError("open_lm's CPU operators have no second derivative")
