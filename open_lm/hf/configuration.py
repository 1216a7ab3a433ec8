"""The model's shape as a transformers configuration."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from open_lm.model.transformer import Params, create_params

CALLABLES = ("norm_type", "attn_func")  # follow from model_norm and attn_name; a config.json holds the names
FIELDS = tuple(field.name for field in fields(Params) if field.name not in CALLABLES)
# Spellings of the model's JSON files, read as well.
ALIASES = {"hidden_dim": "dim", "qk_norm": "apply_qk_norm", "norm_type": "model_norm"}


class OpenLMConfig(PretrainedConfig):
    """The fields of `open_lm.model.Params` as attributes, also under transformers' own names (hidden_size, …)."""

    model_type = "openlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads plain class attributes
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self, params: Params | None = None, params_args_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """From a model's shape, or from single fields.

        Args:
            params: the shape; `Transformer.params` or what `create_params` returns.
            params_args_dict: attributes for `create_params` in its place, as older config.json files hold them.
            **kwargs: fields of Params (or their spellings in model_configs/*.json), and what transformers knows itself.
        """
        if params is None and params_args_dict is not None:
            params = create_params(Namespace(**params_args_dict))
        shape = {name: getattr(params or Params, name) for name in FIELDS}
        given = {ALIASES.get(name, name): value for name, value in kwargs.items() if name not in CALLABLES[1:]}
        given = {self.attribute_map.get(name, name): value for name, value in given.items()}
        shape |= {name: given.pop(name) for name in FIELDS if name in given}
        given["tie_word_embeddings"] = shape["weight_tying"]
        for name, value in shape.items():
            setattr(self, name, value)
        super().__init__(**given)

    def to_params(self) -> Params:
        """The shape that `open_lm.model.Transformer` is made from."""
        return Params(**{name: getattr(self, name) for name in FIELDS})
