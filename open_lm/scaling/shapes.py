"""Shapes of a ladder's models: configurations of model_configs/, or generated ones of any size. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from open_lm.config.architecture import model_names
from open_lm.config.model_keys import feed_forward_width
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.planner.shapes import ModelShape, shape_of

# Members of the family, from the smallest to the largest.
FAMILY = (
    "open_lm_11m", "open_lm_25m", "open_lm_41m", "open_lm_87m", "open_lm_160m", "open_lm_411m", "open_lm_830m",
    "open_lm_1b", "open_lm_3b", "open_lm_7b",
)  # fmt: skip
# Settings of all models of a ladder that change the number of parameters, as in Gadre et al. 2024.
MODEL_FLAGS: dict[str, Any] = {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True}
ASPECT = 48  # width over depth of generated shapes, between the members of 160M and 1B parameters
_ESTIMATE_ERROR = 0.5  # of the logarithm of 12 L D^2 + 2 V D relative to the number of parameters
_ASPECT_WEIGHT = 0.3  # importance of that ratio relative to the size
_MAX_DEPTH = 40
_HEAD_WIDTH = 64
_NARROW = 512  # generated shapes below this width have feed-forward networks in steps of 32 instead of 256
_SAME_MEMBER = 0.05  # relative difference of parameters


@dataclass(frozen=True)
class Shape:
    """A model of a ladder.

    Attributes:
        model: value of --model, a name of model_configs/ or the name of a file to write next to the ladder.
        architecture: (key, value) pairs of that file; empty for a name.
        params, active_params, params_non_embedding: number of parameters: all, those in matrix products, and those
            outside of input and output embedding.
        flops_per_token: FLOPs of a forward and backward pass per token.
        seq_len, vocab_size: of the model.
    """

    model: str
    architecture: tuple[tuple[str, Any], ...]
    params: int
    active_params: int
    params_non_embedding: int
    flops_per_token: float
    seq_len: int
    vocab_size: int

    @property
    def label(self) -> str:
        """Name of the shape without file ending."""
        return self.model.removesuffix(".json")


@functools.cache
def named_shape(model: str) -> Shape:
    """Return the shape of a configuration by name or path. Raise ConfigError as `shape_of`."""
    return _shape(model, {}, shape_of(ModelConfig(model=model, **MODEL_FLAGS)))


def generated_shape(params: float, vocab_size: int, seq_len: int, aspect: float = ASPECT) -> Shape:
    """Return a shape of about `params` parameters, with widths in steps of 16 (from 512 on: 64).

    Of shapes of similar sizes, it is the one whose ratio of width to depth is nearest to `aspect`.

    Raises:
        ConfigError: even the smallest shape is much larger.
    """

    def distance(shape: Shape) -> float:
        keys = dict(shape.architecture)
        ratio = keys["hidden_dim"] / keys["n_layers"] / aspect
        return abs(math.log(shape.params / params)) + _ASPECT_WEIGHT * abs(math.log(ratio))

    widths = [*range(16, _NARROW, 16), *range(_NARROW, 12289, 64)]
    sizes = [(width, depth) for width in widths for depth in _depths(width, aspect)]
    estimates = [abs(math.log((12 * w * w * d + 2 * vocab_size * w) / params)) for w, d in sizes]
    limit = max(_ESTIMATE_ERROR, 2 * min(estimates))
    near = [size for size, error in zip(sizes, estimates, strict=True) if error <= limit]
    best = min((_generate(*size, vocab_size, seq_len) for size in near), key=distance)
    if not 0.5 < best.params / params < 2:
        raise ConfigError(
            f"--sizes: found {params:.3g} parameters, but the nearest shape with a vocabulary of {vocab_size} has "
            f"{best.params:,}; choose another size, or a smaller vocabulary with --vocab-size"
        )
    return best


def _depths(width: int, aspect: float) -> list[int]:
    """Return the depths of a width whose ratio differs by at most a fifth from `aspect`."""
    low, high = (min(max(2, round(width / (aspect * factor))), _MAX_DEPTH) for factor in (1.2, 0.8))
    return list(range(low, high + 1))


def _generate(width: int, depth: int, vocab_size: int, seq_len: int) -> Shape:
    heads = width // _HEAD_WIDTH if width >= 4 * _HEAD_WIDTH and width % _HEAD_WIDTH == 0 else 4
    architecture = {
        "hidden_dim": width, "n_layers": depth, "n_heads": heads, "seq_len": seq_len, "vocab_size": vocab_size,
        "post_embed_norm": False, "weight_tying": False, **MODEL_FLAGS,
    }  # fmt: skip
    if width < _NARROW:
        architecture["ffn_dim"] = 32 * round(8 * width / 3 / 32)
    same = ("seq_len", "vocab_size", "post_embed_norm", "weight_tying", "model_norm", "qk_norm", "n_layers", "n_heads")
    values: dict[str, Any] = _template() | {key: architecture[key] for key in same}
    values |= {"name": f"d={width}_l={depth}_h={heads}", "dim": width, "n_kv_heads": heads, "head_dim": width // heads}
    ffn_dim = architecture.get("ffn_dim", feed_forward_width(values["ffn_type"], width))
    values |= {"ffn_dim": ffn_dim, "moe_ffn_dim": 4 * width}
    shape = ModelShape(**values)
    return _shape(f"{shape.name}.json", architecture, shape)


@functools.cache
def _template() -> dict[str, Any]:
    """Return the fields of a member, which a generated shape replaces where it differs."""
    member = shape_of(ModelConfig(model=FAMILY[0], **MODEL_FLAGS))
    return {field.name: getattr(member, field.name) for field in fields(ModelShape)}


def _shape(model: str, architecture: Mapping[str, Any], shape: ModelShape) -> Shape:
    lookup = 0 if shape.weight_tying else shape.vocab_size * shape.dim
    return Shape(
        model=model,
        architecture=tuple(architecture.items()),
        params=shape.num_params,
        active_params=shape.num_params - lookup,
        params_non_embedding=shape.num_params - shape.vocab_size * shape.dim - lookup,
        flops_per_token=shape.flops_per_token,
        seq_len=shape.seq_len,
        vocab_size=shape.vocab_size,
    )


def parse_sizes(texts: Sequence[str], vocab_size: int, seq_len: int, aspect: float = ASPECT) -> list[Shape]:
    """Return the shapes of --sizes, names of configurations or numbers of parameters, the smallest first.

    Raises:
        ConfigError: a text that is neither.
    """
    shapes = []
    for text in texts:
        try:
            params = float(text)
        except ValueError:
            if text not in model_names() and not text.endswith(".json"):
                raise ConfigError(
                    f"--sizes: found {text!r}, expected numbers of parameters such as 25e6, or model configurations "
                    f"such as {', '.join(FAMILY[:3])}"
                ) from None
            shapes.append(named_shape(text))
        else:
            if not 0 < params < 1e13:
                raise ConfigError(f"--sizes: found {text!r}, expected a number of parameters such as 25e6")
            shapes.append(generated_shape(params, vocab_size, seq_len, aspect))
    labels = Counter(shape.label for shape in shapes)
    repeated = [label for label, number in labels.items() if number > 1]
    if repeated:
        raise ConfigError(
            f"--sizes: {' '.join(texts)} give {', '.join(repeated)} several times; choose sizes that differ more"
        )
    return sorted(shapes, key=lambda shape: shape.params)


def target_shape(params: int, shapes: Sequence[Shape], aspect: float = ASPECT) -> Shape:
    """Return the shape of about `params` parameters for a ladder of `shapes`: a member of the family, or a new one."""
    members = [named_shape(name) for name in FAMILY] if any(not shape.architecture for shape in shapes) else []
    member = next((shape for shape in members if abs(shape.params - params) <= _SAME_MEMBER * params), None)
    return member or generated_shape(params, shapes[0].vocab_size, shapes[0].seq_len, aspect)
