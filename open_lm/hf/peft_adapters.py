"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT loads them on the exported base (`open_lm.hf.convert export`), or on the model of --hf-model:
`peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EXPORTED), FOLDER)`. A layer that fuses several
matrices, such as in_proj, has one adapter for each of them. If the exported model has the matrices separately, each
gets its adapter. If it fuses k of them, their adapters become one of rank k r: A stacked, B block-diagonal.
Legend: I input width, O output width, P fused matrices, r rank.
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.adapters import AdapterRecord, by_layer, weights_sha256
from open_lm.checkpoint.files import read_adapters
from open_lm.config.adapters import LoraSettings
from open_lm.config.architecture import read_family, read_run_settings
from open_lm.config.sections import ModelConfig
from open_lm.errors import CheckpointError, ConfigError, StorageError
from open_lm.hf.family_configs import config_of, full_config
from open_lm.hf.folding import Folding
from open_lm.hf.native_weights import read_native_weights
from open_lm.hf.tensor_map import TensorMap
from open_lm.model.params import Params, create_params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's names
_BASE_SHA256 = "open_lm_base_sha256"  # key of the metadata of the safetensors file
_PARAMETERS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module of a transformers model: `tensors` have the names of `model.adapters.Adapter`."""

    tensors: dict[str, Tensor]
    settings: LoraSettings  # with the rank of this module


def save_for_peft(folder: str, checkpoint: str, flags: Mapping[str, Any] | None = None) -> None:
    """Write the adapters of a checkpoint of a run with --lora to a local or remote folder in PEFT's format.

    flags: the settings of the run; None for those of its params.txt.

    Raises:
        CheckpointError: the checkpoint has no adapters.
        ConfigError: the run folder of the checkpoint has no params.txt.
    """
    adapters, record = read_adapters(checkpoint)
    is_native_base = True
    if record.is_hf:
        modules = {
            layer.removeprefix("model."): ModuleAdapter(tensors, record.settings)
            for layer, tensors in by_layer(adapters).items()
        }
    else:
        settings = read_run_settings(checkpoint) if flags is None else flags
        if "model" not in settings:
            raise ConfigError(
                f"{checkpoint}: its run folder has no params.txt, which states the model; restore the file"
            )
        section = ModelConfig.from_object(Namespace(**settings))
        folding = Folding(create_params(section))
        is_native_base = not folding.changes  # else the exported base has other weights than the recorded hash
        adapters = {  # lora_B and magnitudes have the rows of the layer's weight
            name: tensor if name.endswith("lora_A") else folding.scale_queries(name.partition(".adapter.")[0], tensor)
            for name, tensor in adapters.items()
        }
        modules = exported_modules(adapters, record.settings, _tensor_map(folding.params, section.model))
    write_peft_folder(folder, modules, record, record.base_sha256 if is_native_base else None)


def _tensor_map(params: Params, model: str) -> TensorMap:
    """Return the map from a native model to its exported form."""
    fields = config_of(params, read_family(model))
    return TensorMap(params, None if fields is None else full_config(fields))


def write_peft_folder(
    folder: str, modules: Mapping[str, ModuleAdapter], record: AdapterRecord, base_sha256: str | None
) -> None:
    """Write adapters by module to a local or remote folder; adapter_config.json is written last.

    base_sha256: the hash of the base's native weights; None to record none.
    """
    tensors = {
        f"{_PREFIX}{module}.{_PARAMETERS[name]}": tensor.contiguous()
        for module, adapter in modules.items()
        for name, tensor in adapter.tensors.items()
    }
    _write_weights(folder, tensors, base_sha256)
    config = _config_of(modules, record)
    storage.write_text(storage.join(folder, CONFIG), json.dumps(config, indent=2, allow_nan=False) + "\n")


def _write_weights(folder: str, tensors: dict[str, Tensor], base_sha256: str | None) -> None:
    from safetensors.torch import save

    recorded = {} if base_sha256 is None else {_BASE_SHA256: base_sha256}
    storage.write_bytes(storage.join(folder, WEIGHTS), save(tensors, {"format": "pt", **recorded}))


def record_base(folder: str, base_sha256: str) -> None:
    """Add the hash of the base to the adapters that PEFT has saved in a local folder."""
    from safetensors.torch import load

    _write_weights(folder, load(storage.read_bytes(storage.join(folder, WEIGHTS))), base_sha256)


def native_sha256(folder: str) -> str:
    """Return the hash of the native weights that a transformers folder becomes; runs with --lora record it as well."""
    return weights_sha256(read_native_weights(folder))


def _config_of(modules: Mapping[str, ModuleAdapter], record: AdapterRecord) -> dict[str, Any]:
    """Return the content of adapter_config.json; PEFT has defaults for all other keys."""
    common = record.settings
    other = {name: adapter.settings for name, adapter in modules.items() if adapter.settings.r != common.r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.base if record.is_hf else None,
        "inference_mode": True,
        "bias": "none",
        "r": common.r,
        "lora_alpha": common.alpha,
        "lora_dropout": common.dropout,
        "use_dora": common.dora,
        "use_rslora": common.rslora,
        "target_modules": list(modules),
        "rank_pattern": {name: settings.r for name, settings in other.items()},
        "alpha_pattern": {name: settings.alpha for name, settings in other.items()},
    }


# ---------------------------------------------------------------------------------------------- native to PEFT
def exported_modules(
    adapters: Mapping[str, Tensor], settings: LoraSettings, tensor_map: TensorMap
) -> dict[str, ModuleAdapter]:
    """Return the adapters of a native model by the modules of its exported form."""
    modules: dict[str, ModuleAdapter] = {}
    for layer, tensors in by_layer(adapters).items():
        if f"{layer}.weight" in tensor_map.shapes:  # else a second name of the layer
            modules |= dict(_split(tensor_map, layer, tensors, settings))
    return modules


def _split(
    tensor_map: TensorMap, layer: str, tensors: Mapping[str, Tensor], settings: LoraSettings
) -> Iterator[tuple[str, ModuleAdapter]]:
    """Yield the modules of the exported model that a native layer consists of."""
    name, r = f"{layer}.weight", settings.r
    lora_a = tensors["lora_A"].unflatten(0, (-1, r))  # (P, r, I)
    lora_b = tensors["lora_B"].unflatten(0, (len(lora_a), -1))  # (P, O/P, r)
    blocks = torch.block_diag(*lora_b)  # (O, P r)
    matrix_of_row = torch.arange(len(lora_a)).repeat_interleave(lora_b.shape[1])
    rows = [tensor_map.unpack(name, values) for values in (blocks, matrix_of_row)]
    magnitudes = tensor_map.unpack(name, tensors["lora_magnitude"]) if settings.dora else ()
    for i, info in enumerate(tensor_map.infos(name, torch.float32)):
        matrices = rows[1][i].unique().tolist()
        columns = [matrix * r + column for matrix in matrices for column in range(r)]
        parameters = {"lora_A": lora_a[matrices].flatten(0, 1), "lora_B": rows[0][i][:, columns]}
        if settings.dora:
            parameters["lora_magnitude"] = magnitudes[i]
        yield info.name.removesuffix(".weight"), ModuleAdapter(parameters, of_rank(settings, len(columns)))


def of_rank(settings: LoraSettings, rank: int) -> LoraSettings:
    """Return the settings of an adapter of another rank with the same scale."""
    factor = math.sqrt(rank / settings.r) if settings.rslora else rank / settings.r
    return LoraSettings(
        rank, settings.alpha * factor, settings.dropout, settings.targets, settings.dora, settings.rslora
    )


# ---------------------------------------------------------------------------------------------- PEFT to modules
def is_peft_folder(path: str) -> bool:
    return storage.info(storage.join(path, CONFIG)) is not None


def read_peft_folder(folder: str) -> tuple[dict[str, ModuleAdapter], str | None]:
    """Return the adapters of a folder in PEFT's format by module, and the hash of their base if it is recorded.

    Raises:
        CheckpointError: adapters of another kind than LoRA of linear layers, or files that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    config = _read_config(folder)
    settings = LoraSettings(
        config["r"],
        float(config["lora_alpha"]),
        dora=bool(config.get("use_dora")),
        rslora=bool(config.get("use_rslora")),
    )
    path = storage.join(folder, WEIGHTS)
    modules: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(storage.local_path(path), "pt") as file:
            sha256 = (file.metadata() or {}).get(_BASE_SHA256)
            for key in file.keys():  # noqa: SIM118 - not a mapping
                module, name = _parameter_of(key, path)
                modules.setdefault(module, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, StorageError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected a local file of PEFT") from error
    required = [name for name in _PARAMETERS if settings.dora or name != "lora_magnitude"]
    for module, tensors in modules.items():
        if missing := [_PARAMETERS[name] for name in required if name not in tensors]:
            raise CheckpointError(f"{path}: {module} has no {' and no '.join(missing)}; save the adapters again")
    try:
        adapters = {
            name: ModuleAdapter(tensors, _settings_of(name, tensors, settings, config))
            for name, tensors in modules.items()
        }
    except (re.error, AttributeError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{storage.join(folder, CONFIG)}: expected alpha_pattern to map regular expressions to numbers ({error})"
        ) from error
    return adapters, sha256


def _read_config(folder: str) -> dict[str, Any]:
    path = storage.join(folder, CONFIG)
    try:
        config = json.loads(storage.read_text(path))
        problems = [] if config["peft_type"] == "LORA" else [f"peft_type is {config['peft_type']}, expected LORA"]
        problems += [
            f"{key} is {config[key]!r}, which is not supported"
            for key in ("fan_in_fan_out", "modules_to_save", "layer_replication", "target_parameters", "lora_bias")
            if config.get(key)
        ]
        problems += [f"{key} is missing" for key in ("r", "lora_alpha") if key not in config]
        if config.get("bias", "none") != "none":
            problems.append(f"bias is {config['bias']}, expected none")
    except (ValueError, KeyError, TypeError, StorageError) as error:
        raise CheckpointError(f"{path}: expected the adapter_config.json of PEFT ({error})") from error
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return config


def _parameter_of(key: str, path: str) -> tuple[str, str]:
    """Return the module and the name of the parameter (of `_PARAMETERS`) for a tensor's name in PEFT's format."""
    for name, suffix in _PARAMETERS.items():
        if key.startswith(_PREFIX) and key.endswith(f".{suffix}"):
            return key.removeprefix(_PREFIX).removesuffix(f".{suffix}"), name
    raise CheckpointError(f"{path}: {key} is not a parameter of LoRA for a linear layer")


def _settings_of(
    module: str, tensors: Mapping[str, Tensor], settings: LoraSettings, config: Mapping[str, Any]
) -> LoraSettings:
    """Return the settings of a module, whose rank and alpha may differ from the common ones."""

    def find(pattern: str, default: float) -> float:
        entries: Mapping[str, float] = config.get(pattern) or {}
        matching = (value for key, value in entries.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, default)

    alpha = find("alpha_pattern", settings.alpha)
    return LoraSettings(len(tensors["lora_A"]), float(alpha), dora=settings.dora, rslora=settings.rslora)
