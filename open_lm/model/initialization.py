"""The one initialisation of all models.

Legend: D model width, F hidden width of the feed-forward, H heads, K head width, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
import math
import re
from itertools import pairwise

import torch
from torch import Tensor, nn

from open_lm.distributed.param_names import clean_name
from open_lm.distributed.sharded_tensor import copy_local_shard, fused_weight_parts

INPUT_WEIGHTS = (
    "tok_embeddings.weight",
    "output.weight",
    "in_proj.weight",
    "w12.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "feed_forward.0.weight",
    "router.layer.weight",
    "mlp.w1",
)
OUTPUT_WEIGHTS = ("out_proj.weight", "w3.weight", "down_proj.weight", "feed_forward.2.weight", "mlp.w2")


_PIECE = 1 << 20  # values, a multiple of 16


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill all parameters and buffers of a Transformer, in place.

    | parameters                                                    | standard deviation                  |
    |---------------------------------------------------------------|-------------------------------------|
    | tok_embeddings, output                                        | 1/sqrt(D)                           |
    | in_proj, w12, gate_proj, up_proj, gelu's first, router, w1    | 1/sqrt(D)                           |
    | out_proj                                                      | 1/sqrt(H K) / sqrt(2 (layer + 1))   |
    | w3, down_proj, gelu's second, w2                              | 1/sqrt(F) / sqrt(2 (layer + 1))     |
    | weights of norms; all biases                                  | exactly 1; exactly 0                |

    Normal, cut off at three standard deviations; layers count from 0, and deeper ones write less into the residual
    stream (Zhang et al. 2019, https://arxiv.org/abs/1908.11365). Each parameter has a generator of its own, seeded by
    (seed, the parameter's name): on one kind of device its values depend on nothing else, such as the number of ranks,
    so a sharded parameter needs its whole tensor for a moment only, and no rank has to send anything. Tied weights are
    filled once. Models made on the meta device are first given memory with `to_empty`.

    Raises:
        ValueError: a parameter that the table does not name, or that has no memory.
    """
    parts = fused_weight_parts(model)
    with torch.no_grad():
        for wrapped_name, parameter in model.named_parameters():
            name = clean_name(wrapped_name)
            if parameter.is_meta:
                raise ValueError(f"{name} has no memory; call model.to_empty(device=…) first")
            _fill(parameter, name, seed, parts.get(name, 1))
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Recompute, in place, what is neither learned nor always in a checkpoint, such as rotary frequencies."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()


def _fill(parameter: Tensor, name: str, seed: int, parts: int) -> None:
    if name.endswith(".bias"):
        parameter.zero_()
    elif name.endswith("norm.weight"):
        parameter.fill_(1.0)
    else:
        copy_local_shard(parameter, _drawn(parameter, name, seed), parts)


def standard_deviation(name: str, shape: torch.Size) -> float:
    """The table of `init_weights`: of a weight (out, in) or (E, in, out), both with their fan-in in dimension 1."""
    if name.endswith(OUTPUT_WEIGHTS):
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if layer is not None:
            return 1 / math.sqrt(shape[1]) / math.sqrt(2 * (int(layer[1]) + 1))
    elif name.endswith(INPUT_WEIGHTS):
        return 1 / math.sqrt(shape[1])
    raise ValueError(f"no rule to initialise the parameter {name} of shape {tuple(shape)}")


def _drawn(parameter: Tensor, name: str, seed: int) -> Tensor:
    """The whole parameter's values in float32, so that a half-precision model is a rounding of the float32 one."""
    std = standard_deviation(name, parameter.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    draw(values.view(-1), std, generator)
    return values


def draw(values: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill values (N,) float32 with normal numbers. While there are some beyond three standard deviations all are drawn
    anew, and take the place of those.

    To the last bit what nn.init.trunc_normal_ gives since torch 2.13, which needs three times the memory of the values
    besides: here, on a CPU, of a piece of them.
    """
    limit = torch.tensor(3 * std).item()  # as float32
    values.normal_(0, std, generator=generator)
    pieces = _pieces(values)
    while any(bool((piece.abs() > limit).any()) for piece in pieces):
        for piece in pieces:
            again = torch.empty_like(piece).normal_(0, std, generator=generator)
            torch.where(piece.abs() > limit, again, piece, out=piece)


def _pieces(values: Tensor) -> list[Tensor]:
    """Pieces of values (N,) that a generator fills one after the other as it fills the whole: on a CPU, where it makes
    16 at a time, and what is left of them together with the 16 before."""
    if values.device.type != "cpu":
        return [values]
    starts = [*range(0, max(1, len(values) - 15), _PIECE), len(values)]
    return [values[begin:end] for begin, end in pairwise(starts)]
