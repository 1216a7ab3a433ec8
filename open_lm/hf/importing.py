"""Import a model of transformers: its folder becomes one that the trainer starts from.

model.json                architecture, for --model; its key "family" has the model_type
step_00000000/            weights as a sharded checkpoint, of which each rank reads its part
epoch_0.pt, stats_0.pt    the same weights in one file
tokenizer/, data.json     the tokenizer and its record, as in the folder of a run
generation_config.json    special token ids and settings of generation
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from open_lm import storage
from open_lm.checkpoint.folders import step_folder
from open_lm.checkpoint.interchange import write_interchange
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.config.architecture import FAMILY_KEY, read_architecture
from open_lm.config.key_effects import keys_without_effect
from open_lm.data import provenance
from open_lm.errors import ConfigError, join_problems
from open_lm.hf.checkpoint_files import layout, write_checkpoint
from open_lm.hf.families import FAMILIES, architecture
from open_lm.hf.family_configs import SPECIAL_IDS, differences, full_config, unimplemented
from open_lm.hf.folders import CONFIG, GENERATION_CONFIG, MODEL, find_source, read_json, write_json
from open_lm.hf.output_folder import output_folder
from open_lm.hf.tensor_map import TensorMap
from open_lm.hf.tokenizer_files import import_tokenizer
from open_lm.hf.weight_files import WeightFiles
from open_lm.model.params import params_from_keys

OPENLM = "openlm"
# Keys that a --model may have otherwise than the imported model: they change no result, or only the rows' order.
_FREE_KEYS = ("seq_len", "positional_embedding_type", "ffn_type")


def import_model(
    source: str, target: str, dtype: torch.dtype | None = None, model: str | None = None, vocab_multiple: int = 1
) -> str:
    """Import the model of a folder, a URL or a hub name, and return the folder that was read.

    Args:
        source: folder with config.json and weights.
        target: folder or URL to write, which must not exist.
        dtype: of the weights; None keeps each tensor's.
        model: name or path of a model configuration that the result must have; see `_named_keys`.
        vocab_multiple: pad the vocabulary to a multiple of this.

    Raises:
        ConfigError: an unsupported model, or a tokenizer that does not fit.
        CheckpointError: weights that are missing, damaged or do not fit.
    """
    folder = find_source(source)
    fields = read_json(storage.join(folder, CONFIG))
    keys, config = read_model(fields, folder)
    if model is not None:
        keys = _named_keys(keys, model)
    keys = _padded(keys, vocab_multiple)
    unused = keys_without_effect(keys)
    keys = {name: value for name, value in keys.items() if name not in unused}
    params = params_from_keys(keys)
    weights = WeightFiles(folder)
    tensor_map = TensorMap(params, config)
    tensor_map.check(weights.tensors, f"{folder}: the weights do not fit {CONFIG}")
    settings = {"model": keys, "dtype": str(dtype), "layout": layout()}
    identity = {"weights": weights.versions(), "config": fields, **settings}
    with output_folder(target, MODEL, identity) as output:
        path = output.folder
        if import_tokenizer(folder, path, params.unpadded_vocab_size or params.vocab_size):
            provenance.write(storage.join(path, provenance.FILE_NAME), provenance.describe([]))
        write_json(storage.join(path, GENERATION_CONFIG), _generation_settings(folder, fields))
        name = str(fields.get("_name_or_path") or source)
        write_checkpoint(output, weights, tensor_map, dtype, name)
        write_interchange(StoredTensors(storage.join(path, step_folder(0))), path, name, keep_optimizer=False)
        output.check_owner()
        write_json(storage.join(path, MODEL), {**keys, FAMILY_KEY: fields["model_type"]})
    return folder


def read_model(fields: Mapping[str, Any], label: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the keys of a model's JSON file for the content of a config.json, and the full configuration of a family.

    The configuration is None for model_type openlm.

    Raises:
        ConfigError: an unsupported model_type or values that the native model does not implement.
    """
    model_type = fields.get("model_type")
    if model_type == OPENLM:
        return _openlm_keys(fields), None
    if model_type not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, OPENLM]))
        raise ConfigError(f"{label}: model_type {model_type!r} is not supported, expected one of {supported}")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"{label}: the weights are quantized ({method}); import the model with floating-point weights"
        )
    try:
        config = full_config(fields)
        keys = architecture(config)
        problems = unimplemented(config)
        if fields.get("auto_map"):
            problems.append("auto_map names own code of the model, which may compute something else; remove it if not")
        if problems:
            raise ConfigError(join_problems(problems, CONFIG))
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    return keys, config


def _openlm_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    from open_lm.hf.configuration import FIELDS, OpenLMConfig

    params = OpenLMConfig(**{name: value for name, value in fields.items() if name != "model_type"}).to_params()
    names = {"dim": "hidden_dim", "apply_qk_norm": "qk_norm"}
    keys = {names.get(name, name): getattr(params, name) for name in FIELDS}
    return {name: value for name, value in keys.items() if value is not None}


def _named_keys(keys: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the keys with those of the configuration `model` that are free to differ.

    Raises:
        ConfigError: `model` is another architecture.
    """
    named = read_architecture(model)
    combined = {**keys, **{name: named[name] for name in _FREE_KEYS if name in named}}
    problems = differences(params_from_keys(named), params_from_keys(combined))
    if problems:
        raise ConfigError(join_problems(problems, f"--model {model} is not the model of the folder (in this order)"))
    return combined


def _padded(keys: dict[str, Any], multiple: int) -> dict[str, Any]:
    if multiple < 1:
        raise ConfigError(f"--vocab-multiple is {multiple}, expected at least 1")
    num_ids = keys["vocab_size"]
    rows = -(-num_ids // multiple) * multiple
    return keys if rows == num_ids else {**keys, "vocab_size": rows, "unpadded_vocab_size": num_ids}


def _generation_settings(folder: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json, with the special ids of config.json that it lacks."""
    url = storage.join(folder, GENERATION_CONFIG)
    settings = read_json(url) if storage.info(url) is not None else {}
    return {**{name: fields[name] for name in SPECIAL_IDS if name in fields}, **settings}
