"""Matrix products of the blocks in 8-bit floating point (--fp8), by torchao.

Inputs, weights and gradients are scaled by their largest value, one scale for each tensor found anew for each product,
and rounded to 8 bits (e4m3; gradients e5m2); products are added in higher precision. Weights themselves stay as they
are. (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.)
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

MIN_CAPABILITY = (8, 9)  # compute capability of the first devices that have such products
# Of both widths of a matrix and of the tokens that gradients of matrices are summed over, as the devices want it: what
# a product adds over, and its second matrix's rows, have to be multiples of this.
WIDTH_MULTIPLE = 16


def check_float8(device: torch.device) -> None:
    """ConfigError where --fp8 cannot work on this device."""
    if device.type != "cuda":
        raise ConfigError(
            f"--fp8 needs a CUDA device of compute capability 8.9 or more; this is a {device.type} device"
        )
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--fp8 needs compute capability 8.9 or more (H100, L4, …); {name} has {found[0]}.{found[1]}")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError('--fp8 needs torchao, which is not installed: pip install "open_lm[cuda]", or torchao')


def check_micro_batch_tokens(global_batch_size: int, accum_freq: int, seq_len: int, layout: MeshLayout) -> None:
    """ConfigError where the tokens that a rank has of a training micro-batch are no multiple of 16."""
    micro_batches = layout.data_size * accum_freq
    rows, length = global_batch_size // micro_batches, seq_len // layout.context
    if rows * length % WIDTH_MULTIPLE == 0:
        return
    step = WIDTH_MULTIPLE // math.gcd(WIDTH_MULTIPLE, length)
    shared = f" / --context-parallel {layout.context}" if layout.context > 1 else ""
    raise ConfigError(
        f"--fp8 needs a multiple of {WIDTH_MULTIPLE} tokens in a rank's micro-batch, which are {rows} sequences x "
        f"{seq_len}{shared} = {rows * length} tokens: give --global-batch-size a multiple of {step * micro_batches} "
        f"(--batch-size of {step})"
    )


def convert_to_float8(blocks: Iterable[nn.Module], ranks: int = 1, emulate: bool = False) -> int:
    """Let the linear layers of the blocks multiply in 8 bits, in place; returns how many do.

    Routers of experts stay as they are, and so do matrices whose widths, once divided over `ranks` of tensor
    parallelism, are no multiples of 16, which is said. Parameters and their names do not change. emulate: compute the
    same in float32, on devices without such products. Collective.

    Raises:
        ConfigError: no matrix has such widths, or there is none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    converted: dict[nn.Module, nn.Module] = {}  # a module may have two names
    left: dict[nn.Module, str] = {}
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, nn.Linear) or isinstance(parent, Router):
                    continue
                if not _fits(child, ranks):
                    left[child] = f"{name} from {child.in_features} to {child.out_features}"
                    continue
                if child not in converted:
                    converted[child] = convert_to_float8_training(child, config=config)
                    if isinstance(child, FusedLinear):
                        _make_fused(converted[child], child.parts)
                setattr(parent, name, converted[child])
    if not converted and not left:
        raise ConfigError("--fp8: the blocks have no torch.nn.Linear, whose products it computes; leave it out")
    if left:
        _tell_left(list(left.values()), len(converted), ranks)
    return len(converted)


def _tell_left(left: list[str], converted: int, ranks: int) -> None:
    """Warn of matrices that are left as they are; ConfigError where they are all."""
    divided = f", {WIDTH_MULTIPLE} on each rank of --tensor-parallel {ranks}" if ranks > 1 else ""
    needs = f"--fp8 needs widths that are multiples of {WIDTH_MULTIPLE * ranks}{divided}"
    others = f"of the blocks have others ({', '.join(sorted(set(left)))})"
    if not converted:
        fewer = ", fewer ranks of --tensor-parallel" if ranks > 1 else ""
        raise ConfigError(f"{needs}; all matrices {others}: choose a model with such widths{fewer}, or leave out --fp8")
    told = f"{needs}; {len(left)} of {len(left) + converted} matrices {others}, and are not multiplied in 8 bits"
    run_on_master(lambda: logging.warning(told))


def _fits(linear: nn.Linear, ranks: int) -> bool:
    return not any(width % (WIDTH_MULTIPLE * ranks) for width in (linear.in_features, linear.out_features))


def _make_fused(linear: nn.Module, parts: int) -> None:
    """Let a converted layer be a FusedLinear still."""
    own: Any = type(linear)
    linear.__class__ = _fused(own)
    linear.parts = parts  # type: ignore[assignment]


@functools.cache  # equal blocks are compiled once, if their modules are of the same classes
def _fused(own: type) -> type:
    return type(f"Fused{own.__name__}", (own, FusedLinear), {})
