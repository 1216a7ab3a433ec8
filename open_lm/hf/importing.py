"""Import a model of transformers: its folder becomes one that the trainer starts from.

model.json                architecture, for --model; its key "family" has the model_type
step_00000000/            weights as a sharded checkpoint, of which each rank reads its part
epoch_0.pt, stats_0.pt    the same weights in one file
tokenizer/, data.json     the tokenizer and its record, as in the folder of a run
generation_config.json    special token ids and settings of generation
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from open_lm import storage
from open_lm.checkpoint.folders import step_folder
from open_lm.checkpoint.interchange import write_interchange
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import CHUNK_BYTES, StoredTensors
from open_lm.checkpoint.tensor_store import TensorWriter
from open_lm.config.architecture import FAMILY_KEY, read_architecture
from open_lm.data import provenance
from open_lm.errors import ConfigError, join_problems
from open_lm.hf.families import FAMILIES, architecture
from open_lm.hf.family_configs import SPECIAL_IDS, differences, full_config, params_from_keys, unimplemented
from open_lm.hf.folders import (
    CONFIG,
    GENERATION_CONFIG,
    MODEL,
    ProgressReport,
    find_source,
    read_json,
    whole_folder,
    write_json,
)
from open_lm.hf.tensor_map import Part, TensorMap
from open_lm.hf.tokenizer_files import import_tokenizer
from open_lm.hf.weight_files import WeightFiles

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
    params = params_from_keys(keys)
    weights = WeightFiles(folder)
    tensor_map = TensorMap(params, config)
    tensor_map.check(weights.tensors, f"{folder}: the weights do not fit {CONFIG}")
    with whole_folder(target, MODEL) as output:
        if import_tokenizer(folder, output, params.unpadded_vocab_size or params.vocab_size):
            provenance.write(storage.join(output, provenance.FILE_NAME), provenance.describe([]))
        write_json(storage.join(output, GENERATION_CONFIG), _generation_settings(folder, fields))
        name = str(fields.get("_name_or_path") or source)
        stored = _write_weights(output, weights, tensor_map, dtype, name)
        write_interchange(stored, output, name, keep_optimizer=False)
        write_json(storage.join(output, MODEL), {**keys, FAMILY_KEY: fields["model_type"]})
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


# ---------------------------------------------------------------------------------------------- weights
class _StreamingPlanner(DefaultSavePlanner):
    """A save planner that reads a tensor of the source when the first of its chunks is written."""

    def __init__(
        self, weights: WeightFiles, tensor_map: TensorMap, dtypes: Mapping[str, torch.dtype], report: ProgressReport
    ) -> None:
        self._weights, self._map, self._dtypes, self._report = weights, tensor_map, dtypes, report
        self._chunks: dict[MetadataIndex, tuple[str, Part, int, int]] = {}
        self._current: tuple[object, Tensor] = None, torch.empty(0)
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._items()))
        return self.plan

    def _items(self) -> Iterator[WriteItem]:
        for name, shape in self._map.shapes.items():
            row_bytes = self._dtypes[name].itemsize * torch.Size(shape[1:]).numel()
            offset = 0
            for part in self._map.parts(name):
                step = max(1, CHUNK_BYTES // max(1, row_bytes))
                for start in range(0, part.rows, step):
                    rows = min(step, part.rows - start)
                    offsets = torch.Size([offset + start, *(0 for _ in shape[1:])])
                    box = ChunkStorageMetadata(offsets, torch.Size([rows, *shape[1:]]))
                    index = MetadataIndex(f"model/{name}", offsets)
                    data = TensorWriteData(box, TensorProperties(dtype=self._dtypes[name]), torch.Size(shape))
                    self._chunks[index] = (name, part, start, rows)
                    yield WriteItem(index, WriteItemType.SHARD, tensor_data=data)
                offset += part.rows

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, part, start, rows = self._chunks[write_item.index]
        dtype = self._dtypes[name]
        if part.source is None:
            data = torch.zeros(rows, *self._map.shapes[name][1:], dtype=dtype)
        else:
            if self._current[0] != (name, part):
                self._current = None, torch.empty(0)  # free it before the next one is read
                self._current = (name, part), self._map.to_native(name, part, self._weights.read(part.source))
            data = self._current[1][start : start + rows].to(dtype)
        self._report.add(data.numel() * dtype.itemsize)
        return data


def _write_weights(
    output: str, weights: WeightFiles, tensor_map: TensorMap, dtype: torch.dtype | None, name: str
) -> StoredTensors:
    """Write the sharded checkpoint of step 0."""
    dtypes = {
        native: dtype or _common_dtype(weights, [part.source for part in tensor_map.parts(native)])
        for native in tensor_map.shapes
    }
    num_bytes = sum(torch.Size(shape).numel() * dtypes[native].itemsize for native, shape in tensor_map.shapes.items())
    planner = _StreamingPlanner(weights, tensor_map, dtypes, ProgressReport("import", num_bytes))
    folder = storage.join(output, step_folder(0))
    names = {native: native for native in tensor_map.shapes} | tensor_map.aliases
    extra = {"progress": Progress(epoch=0, step=0).to_json(), "name": name, "world_size": 1}
    writer = TensorWriter(folder, 0, extra, {f"model/{alias}": f"model/{stored}" for alias, stored in names.items()})
    planner.set_up_planner({}, None, True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    try:
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        writer.finish(metadata, [results])
    except BaseException:
        writer.abandon()
        raise
    logging.info(f"wrote {folder}")
    return StoredTensors(folder)


def _common_dtype(weights: WeightFiles, sources: list[str | None]) -> torch.dtype:
    """Return the widest dtype of the tensors that make up a native tensor."""
    dtypes = [weights.tensors[source].dtype for source in sources if source is not None]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
