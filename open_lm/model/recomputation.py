"""Activation checkpointing: keeping less of a forward pass, and computing the rest again in the backward pass.

By policy: "full" keeps a block's inputs alone (Chen et al. 2016, https://arxiv.org/abs/1604.06174); "op" also the
results of matrix products and of attention, so that only cheap operators between them run twice (Korthikanti et al.
2022, section 5, https://arxiv.org/abs/2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from open_lm.config.sections import CHECKPOINTING_POLICIES

POLICIES = tuple(policy for policy in CHECKPOINTING_POLICIES if policy != "none")

# Operators by name, so that those of other versions and of packages that are not loaded need no guard.
_PRODUCTS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm"})
_ATTENTION = (
    *("aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
    *("xformers", "flex_attention", "open_lm::cpu_attention"),
)


def recomputed(function: Callable[..., Any], policy: str = "full") -> Callable[..., Any]:
    """`function`, whose insides are computed again in the backward pass as far as `policy`, one of POLICIES, says.

    The model's forward has no dropout, so random states are not kept: reading them would wait for a CUDA device.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "op":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, function, **options)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_expensive(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_expensive(operator: Any) -> bool:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return name.partition(".")[0] in _PRODUCTS or name.startswith(_ATTENTION)
