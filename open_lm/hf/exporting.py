"""Export a checkpoint to a folder that transformers loads without this package.

A model that computes the same as one of the families becomes a model of that class. Any other becomes one of
model_type openlm, with its source files in the folder (`trust_remote_code`).
"""

from __future__ import annotations

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.files import adapter_record, read_model_state
from open_lm.checkpoint.finding import candidates_at, saved_progress
from open_lm.checkpoint.folders import INDEX, step_number
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.config.architecture import read_family, read_run_settings
from open_lm.config.key_effects import keys_without_effect
from open_lm.config.sections import ModelConfig
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import CheckpointError, ConfigError, DataError, join_problems
from open_lm.hf import weight_files
from open_lm.hf.configuration import FIELDS
from open_lm.hf.families import architecture
from open_lm.hf.family_configs import SPECIAL_IDS, config_of, full_config
from open_lm.hf.folders import CONFIG, GENERATION_CONFIG, MODEL, ProgressReport, write_json
from open_lm.hf.folding import EMBEDDINGS, OUTPUT, Folding
from open_lm.hf.model_card import model_card
from open_lm.hf.output_folder import output_folder
from open_lm.hf.tensor_map import TensorMap
from open_lm.hf.tokenizer_files import export_tokenizer
from open_lm.hf.weight_files import TensorInfo, write_weights
from open_lm.model.params import Params, create_params

_CODE_FILES = sorted((Path(__file__).resolve().parent / "standalone").glob("*_openlm.py"))
_AUTO_MAP = {
    "AutoConfig": "configuration_openlm.OpenLMConfig",
    "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
}
_KEY_NAMES = {"dim": "hidden_dim", "apply_qk_norm": "qk_norm"}


def export_model(
    source: str,
    target: str,
    dtype: torch.dtype | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """Export the model of a checkpoint, and return the checkpoint.

    Args:
        source: run folder (its newest checkpoint), step_N folder, epoch_N.pt or another file of weights.
        target: folder or URL to write, which must not exist.
        dtype: of the weights; None keeps each tensor's.
        model: name or path of the model configuration; None for that of the run.
        tokenizer: value of --tokenizer; None for the tokenizer of the run.

    Raises:
        ConfigError: an unknown model, or an unusable tokenizer.
        CheckpointError: a checkpoint that is missing, damaged or does not fit the model.
    """
    checkpoint = candidates_at(source)[0].url
    if storage.info(storage.join(checkpoint, CONFIG)) is not None:
        raise CheckpointError(f"{checkpoint}: is in the format of transformers already")
    native, model_name = _params_of(checkpoint, model)
    folding = Folding(native)
    params = folding.params
    fields = config_of(params, read_family(model_name))
    config = None if fields is None else full_config(fields)
    weights = _NativeWeights(checkpoint, TensorMap(params, config), folding)
    num_ids = params.unpadded_vocab_size or params.vocab_size
    params = dataclasses.replace(params, vocab_size=num_ids, unpadded_vocab_size=None)
    loaded = None if tokenizer is None else choose_tokenizer(checkpoint, tokenizer)
    if loaded is not None and loaded.vocab_size > num_ids:
        raise ConfigError(f"--tokenizer {tokenizer}: has {loaded.vocab_size} ids, but the model only {num_ids} rows")
    infos = weights.infos(dtype)
    layout = {"tensors": [str(info) for info in infos], "file_bytes": weight_files.SHARD_BYTES}
    identity = {"weights": weights.versions(), "model": str(fields), **layout}
    if folding.changes:
        identity["parametrization"] = str(native.parametrization)
    with output_folder(target, CONFIG, identity) as folder:
        output = folder.folder
        settings = export_tokenizer(checkpoint, loaded, output, params.seq_len)
        write_json(storage.join(output, MODEL), keys_of(params) if config is None else architecture(config))
        if fields is None:
            fields = _openlm_fields(params)
            for file in _CODE_FILES:
                storage.write_text(storage.join(output, file.name), file.read_text(encoding="utf-8"))
        ids = {name: settings.get(name) for name in SPECIAL_IDS}
        fields = {**fields, **ids, "architectures": [_class_name(fields)], **weights.dtype_fields(dtype)}
        write_json(storage.join(output, GENERATION_CONFIG), {**settings, "_from_model_config": not settings})
        progress = saved_progress(checkpoint, step_number(checkpoint) is not None)
        card = _with_evaluations(model_card(params, fields, infos, progress), checkpoint, target)
        storage.write_text(storage.join(output, "README.md"), card)
        write_weights(folder, infos, weights.reads(dtype))
        folder.check_owner()
        write_json(storage.join(output, CONFIG), fields)
    logging.info(f"exported {checkpoint} as {fields['model_type']}")
    return checkpoint


def _with_evaluations(card: str, checkpoint: str, target: str) -> str:
    """Return a model card with the scores of the checkpoint's complete evaluations, which are in evals/ next to it."""
    from open_lm.evaluate.result_formats import full_results, model_index, with_model_index

    files = full_results(checkpoint)
    try:
        index = model_index(files, target.rstrip("/").rpartition("/")[2])
    except DataError as error:
        logging.warning(f"the model card has no evaluation results: {error}")
        return card
    if not index:
        return card
    logging.info(f"the model card has the results of {', '.join(files)}")
    return with_model_index(card, index, "README.md")


def _params_of(checkpoint: str, model: str | None) -> tuple[Params, str]:
    """Return the architecture of a checkpoint, and the name or path of its model configuration."""
    settings = read_run_settings(checkpoint)
    if model is not None:
        settings["model"] = model
    if "model" not in settings:
        raise ConfigError(
            f"--model is missing, and the run folder of {checkpoint} has no params.txt; "
            "set --model to a model name or a .json file"
        )
    section = ModelConfig.from_object(Namespace(**settings))
    return create_params(section), section.model


def keys_of(params: Params) -> dict[str, Any]:
    """Return the keys of a model's JSON file that differ from the defaults and have an effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(Params)}
    required = ("dim", "n_layers", "n_heads", "seq_len", "vocab_size")
    keys = {_KEY_NAMES.get(name, name): getattr(params, name) for name in FIELDS}
    unused = keys_without_effect(keys)
    return {
        key: keys[key]
        for name in FIELDS
        if (key := _KEY_NAMES.get(name, name)) not in unused
        and (name in required or getattr(params, name) != defaults[name])
    }


def _openlm_fields(params: Params) -> dict[str, Any]:
    """Return the content of config.json for model_type openlm, which OpenLMConfig reads too."""
    return {
        "model_type": "openlm",
        "auto_map": _AUTO_MAP,
        **{name: getattr(params, name) for name in FIELDS},
        "attn_name": params.attn_name if params.attn_name == "custom_attn" else "auto",
        "tie_word_embeddings": params.weight_tying,
    }


def _class_name(fields: Mapping[str, Any]) -> str:
    if fields["model_type"] == "openlm":
        return "OpenLMForCausalLM"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[fields["model_type"]])


class _NativeWeights:
    """The weights of a checkpoint as tensors of transformers; one native tensor is in memory at a time."""

    def __init__(self, checkpoint: str, tensor_map: TensorMap, folding: Folding) -> None:
        self._checkpoint, self._map, self._folding = checkpoint, tensor_map, folding
        self._current: tuple[str, list[Tensor]] = "", []
        is_streamed = step_number(checkpoint) is not None and adapter_record(checkpoint) is None
        self._stored = StoredTensors(checkpoint) if is_streamed else None
        self._state = {} if self._stored is not None else read_model_state(checkpoint)[0]
        existing = self._shapes()
        # Checkpoints may have only one of the names of a tied weight.
        names = {stored: [stored] for stored in tensor_map.shapes}
        for alias, stored in tensor_map.aliases.items():
            names[stored].append(alias)
        if folding.unties:
            names[OUTPUT].append(EMBEDDINGS)
            names[EMBEDDINGS].append(OUTPUT)
        self._names = {name: next((alias for alias in all_ if alias in existing), name) for name, all_ in names.items()}
        self._check(existing, checkpoint)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self._stored is None:
            return {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        prefix = "model/"
        return {name.removeprefix(prefix): self._stored.shape(name) for name in self._stored.names(prefix)}

    def _check(self, existing: Mapping[str, tuple[int, ...]], checkpoint: str) -> None:
        expected = {self._names[name]: shape for name, shape in self._map.shapes.items()}
        problems = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in existing]
        problems += [
            f"{name}: found {existing[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in existing and existing[name] != shape
        ]
        known = {*expected, *self._map.shapes, *self._map.aliases}
        problems += [
            f"{name} {shape} is not part of the model"
            for name, shape in existing.items()
            if name not in known and not name.endswith(("inv_freq", "experts.bias"))
        ]
        if problems:
            raise CheckpointError(join_problems(problems, f"{checkpoint}: does not fit the model (check --model)"))

    def _dtype(self, name: str) -> torch.dtype:
        name = self._names[name]
        return self._state[name].dtype if self._stored is None else self._stored.dtype(f"model/{name}")

    def dtype_fields(self, dtype: torch.dtype | None) -> dict[str, str]:
        """Return the dtype of the weights under its names in versions 4 and 5 of transformers."""
        dtypes = {dtype or self._dtype(name) for name in self._map.shapes}
        widest = max(dtypes, key=lambda each: each.itemsize)
        name = str(widest).removeprefix("torch.")
        return {"dtype": name, "torch_dtype": name}

    def infos(self, dtype: torch.dtype | None) -> list[TensorInfo]:
        """Return the tensors to write, in order."""
        return [info for name in self._map.shapes for info in self._map.infos(name, dtype or self._dtype(name))]

    def versions(self) -> list[dict[str, Any]]:
        """Return the name, size and time of the file that changes with each content of the checkpoint."""
        url = self._checkpoint if self._stored is None else storage.join(self._checkpoint, INDEX)
        info = storage.info(url)
        return [] if info is None else [dataclasses.asdict(info)]

    def reads(self, dtype: torch.dtype | None) -> Iterator[Callable[[], Tensor]]:
        """Yield functions that return the tensors of `infos`, in the same order.

        The native tensor of the latest one is in memory.
        """
        self._report = ProgressReport("export", sum(info.num_bytes for info in self.infos(dtype)))
        for name in self._map.shapes:
            for number, info in enumerate(self._map.infos(name, dtype or self._dtype(name))):
                yield partial(self._read, name, number, info)

    def _read(self, name: str, number: int, info: TensorInfo) -> Tensor:
        if self._current[0] != name:
            self._current = "", []  # free it before the next one is read
            alias = self._names[name]
            tensor = self._state[alias] if self._stored is None else self._stored.read(f"model/{alias}")
            self._current = name, self._map.unpack(name, self._folding.apply(name, tensor))
        self._report.add(info.num_bytes)
        return self._current[1][number].to(info.dtype)
