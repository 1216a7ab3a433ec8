"""Load a folder in the format of transformers as the weights of a native model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_lm import storage
from open_lm.errors import CheckpointError, join_problems
from open_lm.hf.family_configs import differences
from open_lm.hf.folders import CONFIG, read_json
from open_lm.hf.importing import read_model
from open_lm.hf.tensor_map import TensorMap
from open_lm.hf.weight_files import WeightFiles
from open_lm.model.params import Params, params_from_keys


def read_params(folder: str) -> Params:
    """Return the architecture of a folder in the format of transformers.

    Raises:
        ConfigError: a config.json that is not supported.
    """
    return params_from_keys(read_model(read_json(storage.join(folder, CONFIG)), folder)[0])


def read_native_weights(folder: str, params: Any = None) -> dict[str, Tensor]:
    """Return the full weights of a local or remote folder by native name; tied weights share one tensor.

    Args:
        folder: an exported folder, or any other that `convert import` accepts.
        params: the architecture of the model to fill, whose rows may be padded or in the order of llama_rotary; None
            for that of the folder.

    Raises:
        CheckpointError: the folder has another architecture, or weights that do not fit.
        ConfigError: a config.json that is not supported.
    """
    keys, config = read_model(read_json(storage.join(folder, CONFIG)), folder)
    own = params_from_keys(keys)
    if params is None:
        params = own
    elif not isinstance(params, Params):
        raise CheckpointError(f"{folder}: --hf-model cannot load it as weights; give the folder as --hf-model")
    elif problems := differences(params, own):
        raise CheckpointError(join_problems(problems, f"{folder}: is not the model of --model (in this order)"))
    weights, tensor_map = WeightFiles(folder), TensorMap(params, config)
    tensor_map.check(weights.tensors, f"{folder}: the weights do not fit {CONFIG}")
    tensors = {name: _read(weights, tensor_map, name) for name in tensor_map.shapes}
    return tensors | {alias: tensors[stored] for alias, stored in tensor_map.aliases.items()}


def _read(weights: WeightFiles, tensor_map: TensorMap, name: str) -> Tensor:
    """Return a native tensor."""
    shape, parts = tensor_map.shapes[name], tensor_map.parts(name)
    rows: list[Tensor] = []
    for part in parts:
        if part.source is None:
            rows.append(torch.zeros(part.rows, *shape[1:], dtype=rows[0].dtype))
        else:
            rows.append(tensor_map.to_native(name, part, weights.read(part.source)))
    return rows[0] if len(rows) == 1 else torch.cat(rows)
