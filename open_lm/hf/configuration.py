"""The architecture of a model as a transformers configuration."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from open_lm.model.transformer import Params, create_params

CALLABLES = ("norm_type", "attn_func")  # derived from model_norm and attn_name, which config.json stores
FIELDS = tuple(field.name for field in fields(Params) if field.name not in CALLABLES)
# Alternative names from the model's JSON files.
ALIASES = {"hidden_dim": "dim", "qk_norm": "apply_qk_norm", "norm_type": "model_norm"}


class OpenLMConfig(PretrainedConfig):
    """A configuration with the fields of `open_lm.model.Params`, also under transformers' names (hidden_size, …)."""

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
        """Create a configuration from a model's architecture, or from single fields.

        Args:
            params: the architecture: `Transformer.params` or the result of `create_params`.
            params_args_dict: arguments of `create_params` to use instead, as older config.json files store them.
            **kwargs: fields of Params (or their names in model_configs/*.json), and arguments of PretrainedConfig.
        """
        if params is None and params_args_dict is not None:
            params = create_params(Namespace(**params_args_dict))
        architecture = {name: getattr(params or Params, name) for name in FIELDS}
        given = {ALIASES.get(name, name): value for name, value in kwargs.items() if name not in CALLABLES[1:]}
        given = {self.attribute_map.get(name, name): value for name, value in given.items()}
        architecture |= {name: given.pop(name) for name in FIELDS if name in given}
        given["tie_word_embeddings"] = architecture["weight_tying"]
        for name, value in architecture.items():
            setattr(self, name, value)
        super().__init__(**given)

    def to_params(self) -> Params:
        """Return the architecture as the argument of `open_lm.model.Transformer`."""
        return Params(**{name: getattr(self, name) for name in FIELDS})
