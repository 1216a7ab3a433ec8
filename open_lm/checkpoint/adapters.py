"""Checkpoints of runs with low-rank adapters (--lora): they contain only the adapters, and a reference to the base.

The reference, an AdapterRecord, is stored under KEY: in `extra` of a sharded checkpoint, and in epoch_N.pt. Other code
reads such a checkpoint like any other (`files.read_model_state`): as the weights of the base with merged adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm.config.adapters import LoraSettings, parse_lora
from open_lm.errors import CheckpointError
from open_lm.model.adapters import merged_weight

KEY = "lora"
_HASH_THREADS = 4
_SEPARATOR = ".adapter."  # between the name of a layer and that of a parameter of its adapter


@dataclass(frozen=True)
class AdapterRecord:
    """How the adapters of a checkpoint were trained.

    Attributes:
        settings: the settings of --lora.
        base: the checkpoint that the adapters belong to, or the name or folder of --hf-model.
        base_sha256: `weights_sha256` of the base.
        is_hf: whether the base is a model of --hf-model.
        qlora: the quantization of the base in training.
    """

    settings: LoraSettings
    base: str
    base_sha256: str
    is_hf: bool = False
    qlora: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "settings": self.settings.text()}

    @classmethod
    def find(cls, values: Mapping[str, Any]) -> AdapterRecord | None:
        """Return the record among the values of a checkpoint; None for a checkpoint of a full model."""
        content = values.get(KEY)
        return None if content is None else cls(**{**content, "settings": parse_lora(content["settings"])})

    def check_base(self, sha256: str, base: str, path: str) -> None:
        """Raise CheckpointError if the adapters in `path` were trained on another base than `base`."""
        if sha256 != self.base_sha256:
            raise CheckpointError(
                f"{path}: its adapters belong to another base: {base} has the weights with sha256 {sha256}, but the "
                f"adapters were trained on {self.base} with sha256 {self.base_sha256}; use the adapters with that base"
            )


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of a model's weights that does not depend on their names, order and file format.

    It covers dtype, shape and values of each tensor, without the rotary frequencies, which models compute. Tied weights
    count once.
    """
    tensors = {id(value): value for name, value in weights.items() if not name.endswith("inv_freq")}
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = set(pool.map(_digest, tensors.values()))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def by_layer(adapters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the parameters of adapters by layer: name of the layer -> name of the parameter -> tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapters.items():
        layer, _, parameter = name.partition(_SEPARATOR)
        layers.setdefault(layer, {})[parameter] = tensor
    return layers


def merged_weights(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], record: AdapterRecord
) -> dict[str, Tensor]:
    """Return the weights of the base with merged adapters, by the names of the base; see `merged_weight`."""
    merged = dict(base)
    for layer, parameters in by_layer(adapters).items():
        weight = base[f"{layer}.weight"]
        result = merged_weight(weight, dict(parameters), record.settings)
        merged |= {name: result for name, value in base.items() if value is weight}  # a layer may have two names
    return merged
