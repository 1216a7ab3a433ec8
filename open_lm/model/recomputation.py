"""Activation checkpointing: store fewer activations in the forward pass and recompute them in the backward pass.

The policy "full" stores only a block's inputs (Chen et al. 2016, https://arxiv.org/abs/1604.06174). "op" also stores
the results of matrix products, attention and expert parallelism's exchanges, so that only the cheap operators between
them run twice (Korthikanti et al. 2022, section 5, https://arxiv.org/abs/2205.05198). "half-op" is "op" without every
second matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from open_lm.config.sections import CHECKPOINTING_POLICIES
from open_lm.kernels.kept_calls import KeptCalls

POLICIES = tuple(policy for policy in CHECKPOINTING_POLICIES if policy != "none")

# Operators by name, because some are missing in other versions of torch or without optional packages.
_PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm"})
_ATTENTION = (
    *("aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
    *("xformers", "flex_attention", "open_lm::cpu_attention"),
)
_EXCHANGE = "_c10d_functional::all_to_all_single"


def with_recomputation(
    function: Callable[..., Any], policy: str = "full", has_dropout: bool = False
) -> Callable[..., Any]:
    """Return `function` with activation checkpointing; `policy` is one of POLICIES.

    Without dropout the random state is not saved: reading it would wait for a CUDA device.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if policy in _SELECTIVE:
        compiling = torch.compiler.is_compiling()
        selective = _SELECTIVE[policy]
        options["context_fn"] = selective if compiling else partial(_with_kept_calls, selective)
    return partial(checkpoint, function, **options)


def _with_kept_calls(contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return the contexts of a forward pass and of its recomputation, which does not repeat calls of `keep_result`."""
    forward, recomputation = contexts()
    calls = KeptCalls()
    return _Contexts(forward, calls.recording), _Contexts(recomputation, calls.replaying)


class _Contexts:
    """Two contexts as one that can be entered repeatedly."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


def _save_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_expensive)


def _save_half_of_products() -> tuple[Any, Any]:
    """Return contexts that save the first, third, … matrix product. The recomputation counts from one again."""
    counts = {False: 0, True: 0}  # by SelectiveCheckpointContext.is_recompute

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if _name(operator) in _PRODUCTS:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return _save_expensive(context, operator)

    return create_selective_checkpoint_contexts(policy)


def _save_expensive(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_expensive(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_expensive(operator: Any) -> bool:
    name = _name(operator)
    return name in _PRODUCTS or name == _EXCHANGE or name.startswith(_ATTENTION)


def _name(operator: Any) -> str:
    """Return the name of an operator without its overload."""
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return name.partition(".")[0]


_SELECTIVE = {"op": _save_products, "half-op": _save_half_of_products}
