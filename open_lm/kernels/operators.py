"""Operators of our own, registered with torch: compilation, fake tensors and recomputation take them as its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register open_lm::NAME of `schema`, "NAME(Tensor x, …) -> …": what it does on a CPU, and what it gives of fake
    tensors.

    Not by torch.library.custom_op, whose first call takes seconds to load the compiler.
    """
    name = f"open_lm::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu", kernel)
    torch.library.register_fake(name, shapes)


def differentiate(name: str, keep: Callable[..., None], gradients: Callable[..., Any]) -> None:
    """Give open_lm::`name` a derivative: keep(ctx, inputs, output) follows it, gradients(ctx, *grads) goes back.

    `gradients` is to be open_lm::`name`_backward, which has no derivative of its own: asking for one is an error.
    """
    torch.library.register_autograd(f"open_lm::{name}", gradients, setup_context=keep)
    torch.library.register_autograd(f"open_lm::{name}_backward", _refuse)


def _refuse(_ctx: Any, *_grads: Any) -> None:
    raise RuntimeError("gradients of our CPU operators cannot be differentiated once more")
