"""The standard parametrization and the maximal-update parametrization (muP), which `--mup` selects.

With muP (Yang et al. 2022, https://arxiv.org/abs/2203.03466) the best learning rate does not depend on the width of the
model, so it can be tuned on a narrow one. Both parametrizations are equal at the width D_base of the base model. Let
m = D / D_base, and let F, H K, the width of all key heads and the width of experts grow in proportion to D:

| parameters                     | initial std              | AdamW lr | Muon lr   | multiplier                        |
|--------------------------------|--------------------------|----------|-----------|-----------------------------------|
| tok_embeddings                 | e sqrt(m) x standard     | e        | (AdamW)   |                                   |
| output                         | sqrt(m) x standard       | 1        | (AdamW)   | hidden states x 1/m               |
| output, tied to tok_embeddings | as tok_embeddings        | e        | (AdamW)   | hidden states x 1/(e m)           |
| matrices of the blocks         | standard                 | 1/m      | 1/sqrt(m) | attention scores x sqrt(K_base/K) |
| router of experts              | 1/sqrt(m) x standard     | 1/m      | 1/m       |                                   |
| norms and biases               | standard                 | 1        | (AdamW)   |                                   |
| adapters: lora_A               | standard                 | 1/m      | 1/m       |                                   |
| adapters: lora_B, magnitudes   | standard                 | 1        | 1         |                                   |

"Standard" is the table of `init_weights`; the embeddings' 1/sqrt(D) thus becomes 1/sqrt(D_base). The learning rates are
factors of --lr. Weight decay is divided by the same factor, so that the product of both, the fraction by which a step
shrinks a weight, does not depend on the width. Gradients shrink like 1/m, those of the embeddings like 1/(e m), and
AdamW's eps with them (Dey et al. 2025, https://arxiv.org/abs/2505.01618).

e is the scale of the embeddings (Gemma's sqrt(D)) of the base model divided by that of this model: sqrt(D_base / D)
for a scale of sqrt(D), else 1. Attention scores get the scale sqrt(K_base) / K in place of 1/sqrt(K).

AdamW's update has entries of size lr, so a product with it grows with the number of inputs, which 1/m undoes. Muon's
update has a spectral norm of 0.2 lr sqrt(max(in, out)). An update that keeps the size of activations has one in
proportion to sqrt(out / in) (Bernstein and Newhouse 2024, https://arxiv.org/abs/2410.21265). The ratio of both scales
like 1/sqrt(m), or like 1/m for matrices of which only the inputs grow. Depth is not parametrized.

Legend: D model width, K head width, H heads, F hidden width of the feed-forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from open_lm.config.model_keys import scales_with_width
from open_lm.distributed.param_names import clean_name


class Rule(NamedTuple):
    """The exponents of m in the initial standard deviation and the learning rates of a kind of parameter."""

    init: float = 0.0
    adamw: float = 0.0
    muon: float = 0.0


# By kind of parameter.
RULES = {
    "embedding": Rule(init=0.5),
    "output": Rule(init=0.5),
    "hidden": Rule(adamw=-1.0, muon=-0.5),
    "router": Rule(init=-0.5, adamw=-1.0, muon=-1.0),
    "lora_A": Rule(adamw=-1.0, muon=-1.0),
    "vector": Rule(),
}
# The kind by the end of a parameter's name. All others, the matrices of the blocks, are "hidden".
_NAMES = {
    "tok_embeddings.weight": "embedding",
    "output.weight": "output",
    "router.layer.weight": "router",
    "lora_A": "lora_A",
    "lora_B": "vector",
    "lora_magnitude": "vector",
    "norm.weight": "vector",
    "bias": "vector",
}


def kind_of(name: str) -> str:
    """Return the kind of a parameter, a key of RULES, by its name in the model."""
    return next((kind for end, kind in _NAMES.items() if name.endswith(end)), "hidden")


class Factors(NamedTuple):
    """The factors of --lr and --eps for one parameter."""

    lr: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Parametrization:
    """The parametrization of one model; the default is the standard one, whose factors are all exactly 1.

    Attributes:
        width_ratio: m.
        embedding_ratio: e.
        head_ratio: K / K_base.
        is_tied: whether the output layer and the embeddings share their weight.
    """

    width_ratio: float = 1.0
    embedding_ratio: float = 1.0
    head_ratio: float = 1.0
    is_tied: bool = False

    @property
    def is_standard(self) -> bool:
        """Whether all factors are 1."""
        return self.width_ratio == self.embedding_ratio == self.head_ratio == 1.0

    @property
    def attention_factor(self) -> float:
        """The factor of the attention scores."""
        return 1 / math.sqrt(self.head_ratio)

    @property
    def output_multiplier(self) -> float:
        """The factor of the hidden states that the output layer maps to logits."""
        return 1 / (self.width_ratio * (self.embedding_ratio if self.is_tied else 1.0))

    def text(self, dim: int) -> str:
        """Describe the factors of a model of width `dim`, for the log."""
        adamw, muon = (self.width_ratio ** getattr(RULES["hidden"], name) for name in ("adamw", "muon"))
        return (
            f"muP: width {dim} is {self.width_ratio:.4g} times that of the base model: learning rates of the blocks' "
            f"matrices with AdamW x {adamw:.4g}, Muon x {muon:.4g}, attention scores x {self.attention_factor:.4g}, "
            f"logits x {self.output_multiplier:.4g}"
        )

    def init_factor(self, name: str) -> float:
        """Return the initial standard deviation of a parameter, relative to the standard parametrization."""
        kind = kind_of(name)
        return self.width_ratio ** RULES[kind].init * self._embedding_factor(kind)

    def optimizer_factors(self, name: str, orthogonal: bool = False) -> Factors:
        """Return the factors of a parameter for Muon's update if `orthogonal`, else for AdamW's."""
        kind = kind_of(name)
        exponent = RULES[kind].muon if orthogonal else RULES[kind].adamw
        scale = self._embedding_factor(kind)
        return Factors(lr=self.width_ratio**exponent * scale, eps=1 / (self.width_ratio * scale))

    def _embedding_factor(self, kind: str) -> float:
        return self.embedding_ratio if kind == "embedding" else 1.0


STANDARD = Parametrization()


def embedding_ratio(scale: float, dim: int, base_dim: int) -> float:
    """Return e: the scale of the embeddings at width `base_dim` divided by `scale`, that at width `dim`."""
    return math.sqrt(base_dim / dim) if scales_with_width(scale, dim) else 1.0


def parametrization_of(model: nn.Module) -> Parametrization:
    """Return the parametrization of a model, which may be wrapped; models of transformers have the standard one."""
    for module in model.modules():
        found = getattr(getattr(module, "params", None), "parametrization", None)
        if isinstance(found, Parametrization):
            return found
    return STANDARD


def optimizer_factors(model: nn.Module, orthogonal: bool = False) -> dict[int, Factors]:
    """Return `Parametrization.optimizer_factors` by the id of the parameter, without those that are all 1."""
    scaling = parametrization_of(model)
    found = {id(param): scaling.optimizer_factors(clean_name(n), orthogonal) for n, param in model.named_parameters()}
    return {key: factors for key, factors in found.items() if factors != Factors()}
