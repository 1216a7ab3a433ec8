"""Initialization of the weights of all models.

Legend: D model width, F hidden width of the feed-forward, H heads, K head width, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from open_lm.config.registry import FEED_FORWARDS
from open_lm.distributed.param_names import clean_name, is_adapter_name
from open_lm.distributed.sharded_tensor import copy_local_shard, fused_weight_parts
from open_lm.model.adapters import fill_adapter
from open_lm.model.parametrization import parametrization_of

INPUT_WEIGHTS = (
    "tok_embeddings.weight",
    "output.weight",
    "in_proj.weight",
    "q_proj.weight",
    "kv_proj.weight",
    "router.layer.weight",
    "mlp.w1",
    "mlp.w3",
)
OUTPUT_WEIGHTS = ("out_proj.weight", "mlp.w2")  # and the matrices that feed-forward networks declare in their registry


_BLOCK_VALUES = 1 << 20  # a multiple of 16


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialize all parameters and buffers of a Transformer in place.

    | parameters                                                    | standard deviation                  |
    |---------------------------------------------------------------|-------------------------------------|
    | tok_embeddings, output                                        | 1/sqrt(D)                           |
    | q_proj, kv_proj, in_proj, router, inputs of feed-forward      | 1/sqrt(D)                           |
    | out_proj                                                      | 1/sqrt(H K) / sqrt(2 (layer + 1))   |
    | outputs of feed-forward networks and experts                  | 1/sqrt(F) / sqrt(2 (layer + 1))     |
    | weights of norms; all biases                                  | a gain of exactly 1; exactly 0      |
    | low-rank adapters                                             | see `adapters.fill_adapter`         |

    The distribution is normal, truncated at three standard deviations. Layers count from 0. Deeper layers write less
    into the residual stream (Zhang et al. 2019, https://arxiv.org/abs/1908.11365). Each parameter has its own
    generator, seeded by (seed, name of the parameter). On one kind of device its values depend on nothing else, such as
    the number of ranks. A sharded parameter thus needs memory for its full tensor only while it is initialized, and
    ranks do not communicate. Tied weights are initialized once. Allocate models created on the meta device with
    `to_empty` first. The maximal-update parametrization has further factors, see parametrization.py.

    Raises:
        ValueError: a parameter that is not in the table, or one on the meta device.
    """
    parts = fused_weight_parts(model)
    gains = {
        clean_name(f"{name}.weight"): 1.0 - module.gain_offset
        for name, module in model.named_modules()
        if hasattr(module, "gain_offset")
    }
    scaling = parametrization_of(model)
    with torch.no_grad():
        for wrapped_name, parameter in model.named_parameters():
            name = clean_name(wrapped_name)
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device; call model.to_empty(device=…) first")
            gain, std_factor = gains.get(name, 1.0), scaling.init_factor(name)
            _fill(parameter, name, seed, parts=parts.get(name, 1), gain=gain, std_factor=std_factor)
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Recompute buffers that are not learned and may be missing from a checkpoint, such as rotary frequencies."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()


def _fill(parameter: Tensor, name: str, seed: int, *, parts: int, gain: float, std_factor: float) -> None:
    if is_adapter_name(name):
        values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        fill_adapter(values, name, seed)
        copy_local_shard(parameter, values, parts)
    elif name.endswith(".bias"):
        parameter.zero_()
    elif name.endswith("norm.weight"):
        parameter.fill_(gain)
    else:
        copy_local_shard(parameter, _initial_values(parameter, name, seed, std_factor), parts)


def standard_deviation(name: str, shape: torch.Size) -> float:
    """Return the standard deviation of a weight (out, in) or (E, in, out), as in the table of `init_weights`.

    Dimension 1 is the fan-in of both shapes.
    """
    if name.endswith((*OUTPUT_WEIGHTS, *_feed_forward_weights("outputs"))):
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if layer is not None:
            return 1 / math.sqrt(shape[1]) / math.sqrt(2 * (int(layer[1]) + 1))
    elif name.endswith((*INPUT_WEIGHTS, *_feed_forward_weights("inputs"))):
        return 1 / math.sqrt(shape[1])
    raise ValueError(f"no rule to initialize the parameter {name} of shape {tuple(shape)}")


def _feed_forward_weights(fact: str) -> Iterator[str]:
    """Yield the names of the "inputs" or "outputs" matrices of all registered feed-forward networks."""
    for entry in FEED_FORWARDS.entries().values():
        yield from (f"feed_forward.{name}.weight" for name in entry.facts.get(fact, ()))


def _initial_values(parameter: Tensor, name: str, seed: int, std_factor: float) -> Tensor:
    """Return the full parameter in float32, so that a half-precision model is the rounded float32 model."""
    std = std_factor * standard_deviation(name, parameter.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    truncated_normal_(values.view(-1), std, generator)
    return values


def truncated_normal_(values: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill values (N,) float32 from a normal distribution truncated at three standard deviations.

    As long as any value is out of range, redraw all values and replace those that are out of range. The result is
    bit-identical to nn.init.trunc_normal_ of torch 2.13 and newer, which needs additional memory of three times the
    values. On a CPU this function needs it for one block of values only.
    """
    limit = torch.tensor(3 * std).item()  # rounded to float32
    values.normal_(0, std, generator=generator)
    blocks = _generator_blocks(values)
    while any(bool((block.abs() > limit).any()) for block in blocks):
        for block in blocks:
            redrawn = torch.empty_like(block).normal_(0, std, generator=generator)
            torch.where(block.abs() > limit, redrawn, block, out=block)


def _generator_blocks(values: Tensor) -> list[Tensor]:
    """Split values (N,) so that filling the blocks in order draws the same numbers as filling all values at once.

    A CPU generator draws 16 values at a time, and the last fewer than 16 together with the 16 before them.
    """
    if values.device.type != "cpu":
        return [values]
    starts = [*range(0, max(1, len(values) - 15), _BLOCK_VALUES), len(values)]
    return [values[begin:end] for begin, end in pairwise(starts)]
