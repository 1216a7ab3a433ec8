"""Write the weights of a run's checkpoints, and its optimizer state, as safetensors files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.hf.output_folder import output_folder
from open_lm.storage.strict_json import to_json

if TYPE_CHECKING:
    from torch import Tensor

    from open_lm.hf.weight_files import TensorInfo

OPTIMIZER_FILE, OPTIMIZER_RECORD = "optimizer.safetensors", "optimizer.json"
_READ_BYTES = 1 << 20


def export_weights(checkpoint: str, target: Path, tokenizer: str | None = None) -> None:
    """Export a checkpoint in the Hugging Face layout. Do nothing if `target` exists, since it appears when complete.

    `tokenizer` is the value of --tokenizer for a run that has no copy of its tokenizer.

    The export's own model card is left out: the card of the bundle describes all weights.

    Raises:
        ConfigError, CheckpointError: see hf.exporting.export_model.
    """
    from open_lm.hf.exporting import export_model

    if not target.exists():
        export_model(checkpoint, str(target), tokenizer=tokenizer)
    (target / "README.md").unlink(missing_ok=True)


def write_optimizer_state(checkpoint: str, target: Path) -> bool:
    """Write the optimizer state of a checkpoint, one tensor at a time; return whether the checkpoint has one.

    {parameter}/{moment} names a tensor. optimizer.json has the groups of parameters with their hyper-parameters.
    """
    from open_lm.hf.weight_files import write_weights

    if target.exists():
        return True
    infos, reads, record = _optimizer_tensors(checkpoint)
    if not infos:
        return False
    with output_folder(str(target), OPTIMIZER_RECORD, {"tensors": [str(info) for info in infos]}) as folder:
        write_weights(folder, infos, reads, OPTIMIZER_FILE)
        storage.write_text(storage.join(folder.folder, OPTIMIZER_RECORD), to_json(record, indent=2) + "\n")
    return True


def _optimizer_tensors(checkpoint: str) -> tuple[list[TensorInfo], Iterable[Callable[[], Tensor]], dict[str, Any]]:
    from open_lm.checkpoint.folders import step_number

    return _sharded_state(checkpoint) if step_number(checkpoint) is not None else _interchange_state(checkpoint)


def _sharded_state(folder: str) -> tuple[list[TensorInfo], Iterable[Callable[[], Tensor]], dict[str, Any]]:
    from open_lm.checkpoint.tensor_index import StoredTensors
    from open_lm.hf.weight_files import TensorInfo

    prefix, stored = "optimizer/", StoredTensors(folder)
    names = stored.names(prefix)
    infos = [TensorInfo(name.removeprefix(prefix), stored.dtype(name), stored.shape(name)) for name in names]
    record = {"step": stored.step, "param_groups": stored.extra.get("param_groups", [])}
    return infos, [partial(stored.read, name) for name in names], record


def _interchange_state(file: str) -> tuple[list[TensorInfo], Iterable[Callable[[], Tensor]], dict[str, Any]]:
    import torch

    from open_lm.checkpoint.files import companion_path, has_optimizer, read_file
    from open_lm.hf.weight_files import TensorInfo

    if not has_optimizer(file):
        return [], [], {}
    content = read_file(companion_path(file, "optimizer"))
    optimizer = content["optimizer"]
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, state in optimizer["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"{name}/{key}"] = value
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    record = {"epoch": content["epoch"], "param_groups": optimizer["param_groups"], "scalars": scalars}
    return infos, [partial(tensors.__getitem__, name) for name in tensors], record


# ------------------------------------------------------------------------------------------------------------- hashes
def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files of a folder, sorted."""
    yield from sorted(folder.glob("*.safetensors"))


def count_parameters(folder: Path) -> int:
    """Return the number of stored parameters of exported weights."""
    import math

    from open_lm.hf.weight_files import WeightFiles

    return sum(math.prod(info.shape) for info in WeightFiles(str(folder)).tensors.values())
