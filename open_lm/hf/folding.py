"""Fold the factors of the maximal-update parametrization into weights, for models that have no such factors.

    logits              the output layer's weight times the output multiplier
    attention scores    queries times the attention factor: rows of their matrix and bias, or with normalized queries
                        the gain (and bias) of their norm

A tied output layer with a multiplier becomes a separate weight. Queries whose norm has no gain keep their factor as
attn_scale. See open_lm/model/parametrization.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from open_lm.model.params import LayerKind, Params
from open_lm.model.transformer import Transformer

OUTPUT, EMBEDDINGS = "output.weight", "tok_embeddings.weight"


class Folding:
    """The mapping from a model to one of the standard parametrization that computes the same logits.

    Attributes:
        params: the architecture of the result; equal to the model's if its parametrization is standard.
        changes: whether any weight changes.
        unties: whether the result has a separate output layer, unlike the model.
    """

    def __init__(self, params: Params) -> None:
        scaling = params.parametrization
        self._multiplier, self._factor = scaling.output_multiplier, scaling.attention_factor
        self._normalizes, self._queries = params.apply_qk_norm, params.n_heads * params.head_dim
        norm = params.norm(1)
        self._gain_offset = float(getattr(norm, "gain_offset", 0.0))
        self.unties = params.weight_tying and self._multiplier != 1.0
        scale = params.attn_scale
        if self._normalizes and getattr(norm, "weight", None) is None and self._factor != 1.0:
            scale, self._factor = params.attention_options(LayerKind(False, True)).scale, 1.0
        self.changes = self._multiplier != 1.0 or self._factor != 1.0
        self.params = dataclasses.replace(
            params,
            mup=False,
            mup_base_width=None,
            mup_base_head_dim=None,
            attn_scale=scale,
            weight_tying=params.weight_tying and not self.unties,
        )

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight of the result, by its name, from the model's weight of this name.

        If the result unties the output layer, its weight comes from the shared weight. Products are computed in
        float32 and rounded once, to the dtype of the weight.
        """
        if name == OUTPUT:
            return _scaled(tensor, self._multiplier)
        if self._factor == 1.0:
            return tensor
        if self._normalizes:
            if name.endswith("q_norm.weight"):
                return (self._factor * (tensor.float() + self._gain_offset) - self._gain_offset).to(tensor.dtype)
            return _scaled(tensor, self._factor) if name.endswith("q_norm.bias") else tensor
        return self.scale_queries(name.rpartition(".")[0], tensor)

    def scale_queries(self, layer: str, tensor: Tensor) -> Tensor:
        """Scale the rows of the queries in a tensor (O,…) with a row for each of the O outputs of a linear layer."""
        if self._factor == 1.0 or self._normalizes or not layer.endswith(("attention.in_proj", "attention.q_proj")):
            return tensor
        rows = tensor.split([self._queries, len(tensor) - self._queries])
        return torch.cat((_scaled(rows[0], self._factor), rows[1]))


def fold(model: Transformer) -> Transformer:
    """Return a model of the standard parametrization with the same logits, in evaluation mode."""
    folding, state = Folding(model.params), model.state_dict()
    with torch.device("meta"):
        result = Transformer(folding.params)
    folded = {name: folding.apply(name, state[name]) for name in result.state_dict()}
    result.load_state_dict(folded, assign=True)
    return result.eval()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
