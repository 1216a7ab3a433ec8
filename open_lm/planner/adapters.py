"""The parameters that a run with --lora trains, and the bytes of its frozen weights.

Mirrors model/adapters.py and model/quantization.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from open_lm.config.adapters import AdapterConfig, LoraSettings, parse_lora
from open_lm.planner.shapes import Weight

QUANTIZED_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # per value: the value, its block's maximum, the scale of the maxima


def trained_weights(weights: Iterable[Weight], cfg: AdapterConfig) -> list[Weight]:
    """Return the parameters that training changes: `weights`, or with --lora their adapters."""
    if cfg.lora is None:
        return list(weights)
    settings = parse_lora(cfg.lora)
    return [adapter for weight in weights for adapter in _adapters(weight, settings)]


def is_quantized(weight: Weight, cfg: AdapterConfig) -> bool:
    """Return whether --qlora stores a weight in 4 bits."""
    return cfg.qlora is not None and _is_linear(weight)


def _is_linear(weight: Weight) -> bool:
    return weight.block is not None and weight.role in ("in", "out") and len(weight.shape) == 2


def _adapters(weight: Weight, settings: LoraSettings) -> Iterator[Weight]:
    if not _is_linear(weight) or (settings.targets == "attention" and "attention" not in weight.name):
        return
    (outputs, inputs), rank = weight.shape, settings.r
    shapes: dict[str, tuple[int, ...]] = {"A": (weight.parts * rank, inputs), "B": (outputs, rank)}
    if settings.dora:
        shapes["magnitude"] = (outputs,)
    for name, shape in shapes.items():
        # Tensor parallelism splits the columns of A with those of the weight, the rows of the others with its rows.
        is_split = (weight.role == "out") == (name == "A")
        role = weight.role if is_split else "norm"
        yield Weight(f"{weight.name}.lora_{name}", shape, role, weight.block, weight.parts, weight.key_heads)
