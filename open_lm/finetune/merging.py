"""Write folders with merged adapters, and undo the merge; see merge.py.

A merged folder contains RECORD, which names the base with its hash, and the adapters: adapters.pt next to native
weights, adapter/ next to those of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.adapters import KEY, AdapterRecord, by_layer, merged_weights, weights_sha256
from open_lm.checkpoint.files import read_adapters, read_base, read_file, read_meta, read_model_state, write_file
from open_lm.checkpoint.finding import candidates_at
from open_lm.config.adapters import LoraSettings
from open_lm.config.architecture import MODEL_FILE, read_architecture, read_family, read_run_settings
from open_lm.config.sections import ArchitectureConfig
from open_lm.data.tokenizers import copy_record
from open_lm.errors import CheckpointError, ConfigError, UserError
from open_lm.hf.folders import CONFIG, read_json, write_json
from open_lm.hf.output_folder import OutputFolder, output_folder
from open_lm.hf.peft_adapters import CONFIG as ADAPTER_CONFIG
from open_lm.hf.peft_adapters import WEIGHTS as ADAPTER_WEIGHTS
from open_lm.hf.peft_adapters import ModuleAdapter, native_sha256, read_peft_folder
from open_lm.hf.weight_files import WeightFiles, write_weights
from open_lm.model.adapters import low_rank_product, merged_weight

RECORD, ADAPTERS, ADAPTER_FOLDER = "merge.json", "adapters.pt", "adapter"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json")


# ---------------------------------------------------------------------------------------------- native weights
def merge_native(source: str, target: str, base: str | None = None) -> None:
    """Write the merged weights of a checkpoint of a run with --lora as a folder with epoch_N.pt and model.json.

    Raises:
        ConfigError: the target exists, or the run trains a model of --hf-model.
        CheckpointError: the checkpoint has no adapters, or the base has other weights.
    """
    checkpoint = candidates_at(source)[0].url
    adapters, record = read_adapters(checkpoint)
    if record.is_hf:
        raise ConfigError(
            f"{checkpoint}: its adapters belong to --hf-model {record.base}; give the folder adapter_N next to it"
        )
    weights = merged_weights(read_base(record, checkpoint, base), adapters, record)
    meta = {key: value for key, value in read_meta(checkpoint).items() if key != KEY}
    facts = {"base": record.base if base is None else base, "base_sha256": record.base_sha256}
    with output_folder(target, RECORD, {"merge": checkpoint, **facts}) as output:
        _write_native(output.folder, weights, meta, checkpoint)
        write_file(storage.join(output.folder, ADAPTERS), {KEY: record.to_json(), "adapters": adapters, "meta": meta})
        write_json(storage.join(output.folder, RECORD), facts)


def _write_native(folder: str, weights: Mapping[str, Tensor], meta: Mapping[str, Any], checkpoint: str) -> None:
    write_file(storage.join(folder, f"epoch_{meta.get('epoch', 0)}.pt"), {**meta, "state_dict": dict(weights)})
    settings = read_run_settings(checkpoint)
    model = settings.get("model")
    if model is not None:
        flags = {spec.name: settings.get(spec.name, spec.default) for spec in ArchitectureConfig.specs()}
        given = {spec.name: flags[spec.name] for spec in ArchitectureConfig.specs() if flags[spec.name] != spec.default}
        architecture, family = given | read_architecture(model), read_family(model)
        write_json(storage.join(folder, MODEL_FILE), architecture | ({"family": family} if family else {}))
    copy_record(checkpoint, folder)


# ---------------------------------------------------------------------------------------------- transformers
def recorded_base(folder: str) -> str | None:
    """Return the base that a folder in PEFT's format names."""
    base = read_json(storage.join(folder, ADAPTER_CONFIG)).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def merge_transformers(source: str, target: str, base: str) -> None:
    """Write the transformers model in the folder `base`, merged with the adapters of a folder in PEFT's format.

    Raises:
        ConfigError: the target exists, or the base is not a folder.
        CheckpointError: adapters of another base or for modules that it does not have.
    """
    modules, sha256 = read_peft_folder(source)
    weights = _open_base(base)
    _check_modules(modules, weights, source)
    if sha256 is None:
        logging.warning(f"{source}: does not record the hash of its base; taking {base} as the base")
    else:
        _check_base(weights, sha256, source)
    facts = {"base": base, "base_sha256": sha256 or _hf_sha256(weights), "transformers": True}
    with output_folder(target, RECORD, {"merge": source, **facts}) as output:
        _copy_other_files(base, output.folder)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            storage.copy(storage.join(source, name), storage.join(output.folder, ADAPTER_FOLDER, name))
        _write_transformers(output, weights, modules, merged_weight)
        write_json(storage.join(output.folder, RECORD), facts)


def _open_base(base: str) -> WeightFiles:
    if storage.info(storage.join(base, CONFIG)) is None:
        raise ConfigError(f"--base {base}: expected a folder of transformers with {CONFIG} and weights")
    return WeightFiles(base)


def _check_modules(modules: Mapping[str, ModuleAdapter], weights: WeightFiles, source: str) -> None:
    problems = []
    for module, adapter in modules.items():
        info, expected = weights.tensors.get(f"{module}.weight"), _widths(adapter)
        if info is None or info.shape != expected:
            found = "no such module" if info is None else f"a weight of shape {info.shape}"
            problems.append(f"{module} {expected}: the base has {found}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{source}: the adapters do not fit {weights.folder}: {'; '.join(problems[:4])}{more}")


def _widths(adapter: ModuleAdapter) -> tuple[int, int]:
    return adapter.tensors["lora_B"].shape[0], adapter.tensors["lora_A"].shape[1]


def _check_base(weights: WeightFiles, sha256: str, source: str) -> None:
    """Raise CheckpointError unless a hash of the base, as native weights or as those of --hf-model, is `sha256`."""
    found = []
    for compute in (partial(native_sha256, weights.folder), partial(_hf_sha256, weights)):
        try:
            found.append(compute())
        except UserError:  # not a model that can be native
            continue
        if found[-1] == sha256:
            return
    raise CheckpointError(
        f"{source}: its adapters belong to another base: {weights.folder} has the weights with sha256 "
        f"{' or '.join(found)}, but the adapters were trained on weights with sha256 {sha256}; give that base as --base"
    )


def _hf_sha256(weights: WeightFiles) -> str:
    """Return the hash of the weights in float32, as --hf-model loads them."""
    return weights_sha256({name: weights.read(name).float() for name in weights.tensors})


def _copy_other_files(folder: str, target: str) -> None:
    for url in storage.list_files(folder):
        name = url.rpartition("/")[2]
        if not name.endswith(_WEIGHT_SUFFIXES) and name != RECORD:
            storage.copy(url, storage.join(target, name))


def _write_transformers(
    output: OutputFolder,
    weights: WeightFiles,
    modules: Mapping[str, ModuleAdapter],
    change: Callable[[Tensor, dict[str, Tensor], LoraSettings], Tensor],
) -> None:
    """Write weights, those of modules with adapters changed; one tensor is in memory at a time."""

    def reads() -> Iterator[Callable[[], Tensor]]:
        for name in weights.tensors:
            adapter = modules.get(name.removesuffix(".weight"))
            yield partial(_changed, weights, name, adapter, change)

    write_weights(output, list(weights.tensors.values()), reads())


def _changed(weights: WeightFiles, name: str, adapter: ModuleAdapter | None, change: Any) -> Tensor:
    tensor = weights.read(name)
    return tensor if adapter is None else change(tensor, adapter.tensors, adapter.settings)


# ---------------------------------------------------------------------------------------------- undo
def undo(source: str, target: str, base: str | None = None) -> bool:
    """Write the weights of the base of a merged folder; return whether they equal the base bit for bit.

    Raises:
        CheckpointError: not a merged folder, a base with other weights, or DoRA without its base.
    """
    if storage.info(storage.join(source, RECORD)) is None:
        raise CheckpointError(f"{source}: has no {RECORD}; expected a folder that open_lm.finetune.merge has written")
    facts = read_json(storage.join(source, RECORD))
    return (_undo_transformers if facts.get("transformers") else _undo_native)(source, target, base, facts)


def _undo_native(source: str, target: str, base: str | None, facts: Mapping[str, Any]) -> bool:
    content = read_file(storage.join(source, ADAPTERS))
    record, adapters, meta = AdapterRecord.find(content), content["adapters"], content["meta"]
    assert record is not None
    merged = storage.join(source, f"epoch_{meta.get('epoch', 0)}.pt")
    url = base or str(facts["base"])
    try:
        weights, is_exact = read_base(record, source, url), True
    except UserError as error:
        if base is not None:
            raise
        _check_can_subtract(record.settings, source, error)
        weights = dict(read_model_state(merged)[0])
        for layer, tensors in by_layer(adapters).items():
            weight = weights[f"{layer}.weight"]
            result = unmerged_weight(weight, tensors, record.settings)
            weights |= {name: result for name, value in weights.items() if value is weight}
        is_exact = weights_sha256(weights) == record.base_sha256
    with output_folder(target, MODEL_FILE, {"undo": source}) as output:
        _write_native(output.folder, weights, {}, merged)
    return is_exact


def _undo_transformers(source: str, target: str, base: str | None, facts: Mapping[str, Any]) -> bool:
    modules, _ = read_peft_folder(storage.join(source, ADAPTER_FOLDER))
    change: Any = unmerged_weight
    try:
        weights = _open_base(base or str(facts["base"]))
        _check_base(weights, facts["base_sha256"], source)
        modules, is_copy = {}, True
    except UserError as error:
        if base is not None:
            raise
        _check_can_subtract(next(iter(modules.values())).settings, source, error)
        weights, is_copy = WeightFiles(source), False
    with output_folder(target, CONFIG, {"undo": source}) as output:
        _copy_other_files(source, output.folder)
        _write_transformers(output, weights, modules, change)
    if is_copy:
        return True
    try:
        _check_base(WeightFiles(target), facts["base_sha256"], target)
    except CheckpointError:
        return False
    return True


def _check_can_subtract(settings: LoraSettings, source: str, error: UserError) -> None:
    logging.warning(f"{source}: the base cannot be copied, subtracting the adapters ({error})")
    if settings.dora:
        raise CheckpointError(
            f"{source}: the adapters are DoRA, which cannot be subtracted, because the norms of the rows of the base "
            "are lost; give the base as --base"
        )


def unmerged_weight(weight: Tensor, adapter: Mapping[str, Tensor], settings: LoraSettings) -> Tensor:
    """Undo `merged_weight` for LoRA up to rounding: subtract the update in float32 (or float64) from a weight (O,I)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_a, lora_b = adapter["lora_A"].to(dtype), adapter["lora_B"].to(dtype)
    update = low_rank_product(lora_a, lora_b, len(lora_a) // settings.r) * settings.scale
    return (weight.to(dtype) - update).to(weight.dtype)
