"""Estimate the share of a device's peak FLOP/s that a step reaches, from published training runs.

The time of a token on one device is the sum of two parts:

- matrix products, which reach the share `products` for very wide models. Narrow models lose time in operators whose
  cost grows with the width D, where that of the products grows with D^2: the share is products / (1 + overhead / D).
- attention, which reaches the share `attention`. Its FLOPs are those without the causal mask, by the convention of
  `flops_per_token`. Long sequences and narrow models spend most of their time here.

The constants are the fit of scripts/checks/check_published.py to a half of tests/planner/published_runs.json; the
other half checks them. The runs are eager, from 2023 to 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from open_lm.config.devices import first_match
from open_lm.planner.shapes import ModelShape


@dataclass(frozen=True)
class Efficiency:
    """The efficiency of a kind of device.

    Attributes:
        products: share of the peak that the matrix products of very wide models reach.
        overhead: the model width at which other operators take as long as the matrix products.
        attention: share of the peak that attention reaches.
        source: where the figures come from.
    """

    products: float
    overhead: float
    attention: float
    source: str

    def mfu(self, shape: ModelShape, compiled: bool = False) -> float:
        """Return the share of the peak that a step without recomputation and communication reaches."""
        attention = shape.attention_flops_per_token
        products = self.products / (1 + self.overhead / shape.dim) * (COMPILED_SPEEDUP if compiled else 1.0)
        return shape.flops_per_token / ((shape.flops_per_token - attention) / products + attention / self.attention)


# Speed of compiled products with the operators between them, compared with eager ones. The gain in MFU is the mean of
# eight published pairs: Llama 2 7B to 70B on A100 and H100, 10 to 23 %
# (https://pytorch.org/blog/maximizing-training-throughput/).
COMPILED_SPEEDUP = 1.216

_PUBLISHED = "from published runs of llm-foundry, torchtitan and fms-fsdp"
_AMPERE = Efficiency(products=0.724, overhead=617, attention=0.555, source=_PUBLISHED)
_HOPPER = Efficiency(products=0.588, overhead=749, attention=0.300, source=_PUBLISHED)

# By words of the device name, the first match.
EFFICIENCY: Mapping[str, Efficiency] = {
    "A100": _AMPERE,
    "A800": _AMPERE,
    "H100": _HOPPER,
    "H200": _HOPPER,
    "H800": _HOPPER,
    "GH200": _HOPPER,
}
UNPUBLISHED = Efficiency(_HOPPER.products, _HOPPER.overhead, _HOPPER.attention, "assumed as on the H100")


def efficiency_of(device: str) -> Efficiency:
    """Return the efficiency of a device; for devices without published runs that of the H100."""
    return first_match(EFFICIENCY, device) or UNPUBLISHED
