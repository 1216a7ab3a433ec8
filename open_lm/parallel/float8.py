"""Matrix products of the blocks in 8-bit floating point (--fp8), with torchao.

Inputs, weights and gradients are scaled by their largest absolute value (dynamic per-tensor scaling) and rounded to 8
bits: e4m3, gradients e5m2. Products are accumulated in higher precision, and the stored weights keep their precision
(Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from open_lm.config.layout import MeshLayout
from open_lm.distributed.processes import run_on_master
from open_lm.errors import ConfigError
from open_lm.kernels.linear import FusedLinear
from open_lm.model.mixture_of_experts import Router

MIN_CAPABILITY = (8, 9)  # the lowest compute capability with fp8 matrix products
# The kernels need the reduction dimension and the rows of the second operand to be multiples of 16. Over forward and
# backward pass that concerns both widths of a matrix and the number of tokens.
SIZE_MULTIPLE = 16


def check_float8(device: torch.device) -> None:
    """Raise ConfigError if the device does not support --fp8."""
    if device.type != "cuda":
        raise ConfigError(
            f"--fp8 needs a CUDA device of compute capability 8.9 or more; this is a {device.type} device"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--fp8 needs compute capability 8.9 or more (H100, L4, …); {name} has {major}.{minor}")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError('--fp8 needs torchao, which is not installed: pip install "open_lm[cuda]", or torchao')


def check_micro_batch_tokens(global_batch_size: int, accum_freq: int, seq_len: int, layout: MeshLayout) -> None:
    """Raise ConfigError if a rank's number of tokens in a training micro-batch is not a multiple of 16."""
    micro_batches = layout.data_size * accum_freq
    sequences, length = global_batch_size // micro_batches, seq_len // layout.context
    if sequences * length % SIZE_MULTIPLE == 0:
        return
    step = SIZE_MULTIPLE // math.gcd(SIZE_MULTIPLE, length)
    context = f" / --context-parallel {layout.context}" if layout.context > 1 else ""
    raise ConfigError(
        f"--fp8 needs a multiple of {SIZE_MULTIPLE} tokens in a rank's micro-batch, found {sequences} sequences x "
        f"{seq_len}{context} = {sequences * length} tokens: set --global-batch-size to a multiple of "
        f"{step * micro_batches} (--batch-size to a multiple of {step})"
    )


def convert_to_float8(blocks: Iterable[nn.Module], ranks: int = 1, emulate: bool = False) -> int:
    """Convert the linear layers of the blocks to fp8 in place and return the number of converted layers. Collective.

    Mixture-of-experts routers are not converted. Neither are matrices whose widths, divided by `ranks` of tensor
    parallelism, are not multiples of 16; a warning lists them. Parameters and their names do not change.

    Args:
        blocks: modules whose linear layers are converted.
        ranks: number of tensor-parallel ranks.
        emulate: compute the fp8 results in float32, for devices without fp8 products.

    Raises:
        ConfigError: there is no linear layer, or none has suitable widths.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    converted: dict[nn.Module, nn.Module] = {}  # by original: a module may have two names
    unconverted: dict[nn.Module, str] = {}
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, nn.Linear) or isinstance(parent, Router):
                    continue
                if not _has_suitable_widths(child, ranks):
                    unconverted[child] = f"{name} from {child.in_features} to {child.out_features}"
                    continue
                if child not in converted:
                    converted[child] = convert_to_float8_training(child, config=config)
                    if isinstance(child, FusedLinear):
                        _make_fused(converted[child], child.parts)
                setattr(parent, name, converted[child])
    if not converted and not unconverted:
        raise ConfigError("--fp8: the blocks have no torch.nn.Linear to convert; remove the flag")
    if unconverted:
        _warn_unconverted(list(unconverted.values()), len(converted), ranks)
    return len(converted)


def _warn_unconverted(unconverted: list[str], num_converted: int, ranks: int) -> None:
    """Warn about matrices that are not converted; raise ConfigError if no matrix is converted."""
    per_rank = f" ({SIZE_MULTIPLE} on each of {ranks} --tensor-parallel ranks)" if ranks > 1 else ""
    requirement = f"--fp8 needs widths that are multiples of {SIZE_MULTIPLE * ranks}{per_rank}"
    matrices = ", ".join(sorted(set(unconverted)))
    if not num_converted:
        fewer = ", use fewer --tensor-parallel ranks" if ranks > 1 else ""
        raise ConfigError(
            f"{requirement}; no matrix of the blocks has such widths ({matrices}): choose a model with suitable "
            f"widths{fewer}, or remove --fp8"
        )
    total = len(unconverted) + num_converted
    message = (
        f"{requirement}; {len(unconverted)} of {total} matrices of the blocks do not have such widths and are not "
        f"converted to fp8: {matrices}"
    )
    run_on_master(lambda: logging.warning(message))


def _has_suitable_widths(linear: nn.Linear, ranks: int) -> bool:
    return not any(width % (SIZE_MULTIPLE * ranks) for width in (linear.in_features, linear.out_features))


def _make_fused(linear: nn.Module, parts: int) -> None:
    """Make a converted layer an instance of FusedLinear too."""
    base: Any = type(linear)
    linear.__class__ = _fused_class(base)
    linear.parts = parts  # type: ignore[assignment]


@functools.cache  # torch.compile reuses the graph of a block only if its modules have the same classes
def _fused_class(base: type) -> type:
    return type(f"Fused{base.__name__}", (base, FusedLinear), {})
