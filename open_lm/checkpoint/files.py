"""Name, read, write and check single interchange files. Nothing here uses a process group.

The interchange files of epoch N in a run's `checkpoints` folder are

    optimizer_N.pt <averager>_N.pt stats_N.pt    written first
    epoch_N.pt                                   written last: if it exists, the checkpoint is complete
    epoch_latest.pt                              with --save-most-recent: one file with model and optimizer
    adapter_N/                                   with --lora: the adapters in the format of PEFT
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from open_lm import storage
from open_lm.checkpoint.adapters import AdapterRecord, merged_weights, weights_sha256
from open_lm.checkpoint.folders import is_transformers_folder, step_number
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.distributed.param_names import clean_name
from open_lm.errors import BrokenCheckpoint, CheckpointError, StorageError, UserError, join_problems
from open_lm.system.names import printable

LATEST = "latest"
_MAX_LISTED = 6
_FORMATS, _SHOWN_BYTES = (b"PK\x03\x04", b"\x80"), 32  # a zip archive, or a pickle in the older format
_NUMBERED = re.compile(r"^epoch_(\d+)\.pt$")
_COMPANION = re.compile(r"^(optimizer|stats|(poly|ema|none)(_[^_]+){0,2})_(\d+)\.pt$")  # averagers: by their names
# Keys of a checkpoint file that hold model weights.
_WEIGHT_KEYS = ("state_dict", "av_model_sd")
_LARGE_KEYS = ("optimizer", "averagers", "rng")


def file_name(kind: str, epoch: int | str) -> str:
    """Return a file name; kind: "epoch", "optimizer", "stats" or an averager's name; epoch: a number or "latest"."""
    return f"{kind}_{epoch}.pt"


def adapter_folder(epoch: int) -> str:
    """Return the name of the folder with the adapters of an epoch in the format of PEFT (runs with --lora)."""
    return f"adapter_{epoch}"


def companion_path(path: str, kind: str) -> str:
    """Return the path of another kind of file of the same checkpoint as .../epoch_N.pt."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"^epoch_", f"{kind}_", name)


# ---------------------------------------------------------------------------------------------- reading
def read_file(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Return the content of a local or remote torch.save file; only tensors and plain values are unpickled.

    The file (or its local copy) is memory-mapped, so that only the data in use is read. Raise CheckpointError if the
    file is missing, broken or contains other kinds of objects.
    """
    url = os.fspath(path)
    if not storage.is_remote(url):
        local = storage.local_path(url)
        if not os.path.isfile(local):
            raise CheckpointError(f"{url}: no such checkpoint{existing_hint(url)}")
        return _load(local, url, map_location, mmap=zipfile.is_zipfile(local))
    with tempfile.TemporaryDirectory(prefix="open_lm-checkpoint-") as folder:
        local = os.path.join(folder, "checkpoint.pt")
        try:
            storage.download(url, local)
        except StorageError as error:
            raise CheckpointError(f"the checkpoint cannot be downloaded: {error}") from error
        # The memory mapping keeps the data accessible after the file is removed.
        return _load(local, url, map_location, mmap=zipfile.is_zipfile(local))


def _load(source: str | IO[bytes], url: str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), _named_in_utf8(source) as file:
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        _check_format(source, url)
        match = re.search(r"(?:GLOBAL|class) '?([A-Za-z_][\w.]*\.\w+)", str(error))
        found = f"an object of type {match.group(1)}" if match else "another object"
        raise CheckpointError(f"{url}: expected only tensors and plain values, found {found}") from error
    except StorageError:
        raise
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        _check_format(source, url)
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise BrokenCheckpoint(
            f"{url}: the file is broken or not a checkpoint ({reason}); copy it again, or use an earlier checkpoint"
        ) from error


@contextlib.contextmanager
def _named_in_utf8(source: str | IO[bytes]) -> Iterator[str | IO[bytes]]:
    """Yield the file, under the name of its descriptor if its own name is not UTF-8, which torch's reader requires."""
    if not isinstance(source, str) or printable(source) == source:
        yield source
        return
    with open(source, "rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def _check_format(source: str | IO[bytes], url: str) -> None:
    """Raise BrokenCheckpoint if the file does not start like one of torch.save."""
    try:
        with open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as file:
            file.seek(0)
            start = file.read(_SHOWN_BYTES)
    except OSError:  # the caller reports it
        return
    if not start.startswith(_FORMATS):
        found = f"one that starts with {start!r}" if start else "an empty file"
        raise BrokenCheckpoint(
            f"{url}: not a checkpoint; expected a file of torch.save such as epoch_N.pt, found {found}"
        )


def _numpy_scalars() -> list[Any]:
    """Return the numpy types in older optimizer files, whose learning rates are numpy scalars."""
    import numpy as np

    scalar = np.float64(0.0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u8", "u4", "b1")]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def existing_hint(url: str) -> str:
    """Return the end of an error message about a missing file: the checkpoints that its folder contains."""
    existing = [
        os.path.basename(name) for name in storage.glob(os.path.join(os.path.dirname(url) or ".", "epoch_*.pt"))
    ]
    return f"; the folder contains {', '.join(existing[:8])}" if existing else ""


def read_model_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model's weights by clean name, and the checkpoint's other small values (epoch, step, …).

    Accepts a checkpoint of a run (epoch_N.pt or a step_N folder), an averager's file, a file of weights only or a
    folder in the format of transformers (the second result is then empty). The adapters of a run with --lora are merged
    into the weights of their base.
    """
    url = os.fspath(path)
    weights, meta, record = _read_stored(url)
    return weights if record is None else merged_weights(read_base(record, url), weights, record), meta


def read_adapters(path: str) -> tuple[dict[str, Tensor], AdapterRecord]:
    """Return the adapters of a checkpoint of a run with --lora by clean name, and their record.

    Raises:
        CheckpointError: the checkpoint has no adapters.
    """
    adapters, _, record = _read_stored(path)
    if record is None:
        raise CheckpointError(f"{path}: is a checkpoint of a full model, expected one of a run with --lora")
    return adapters, record


def read_base(record: AdapterRecord, path: str, base: str | None = None) -> dict[str, Tensor]:
    """Return the weights of the base of the adapters in `path`, from `base` if their base is no longer in its place.

    Raises:
        CheckpointError: the base is missing, or has other weights than in training.
    """
    url = record.base if base is None else base
    try:
        if record.is_hf:
            from open_lm.hf.trainable import read_hf_weights

            weights = read_hf_weights(url)
        else:
            weights = read_model_state(url)[0]
    except UserError as error:
        raise CheckpointError(
            f"{path}: contains adapters for the base {url}, which cannot be read: {error}. Restore it, or merge a copy "
            f"of it with the adapters: python -m open_lm.finetune.merge {path} DEST --base COPY"
        ) from error
    record.check_base(weights_sha256(weights), url, path)
    return weights


def adapter_record(path: str) -> AdapterRecord | None:
    """Return the record of a checkpoint with adapters, without reading tensors; None for any other checkpoint."""
    if step_number(path) is not None:
        return AdapterRecord.find(StoredTensors(path).extra)
    return AdapterRecord.find(read_meta(path, with_stats=False))


def _read_stored(url: str) -> tuple[dict[str, Tensor], dict[str, Any], AdapterRecord | None]:
    """Return the tensors that a checkpoint contains, its other small values, and the record of its adapters if any."""
    if is_transformers_folder(url):
        from open_lm.hf.native_weights import read_native_weights

        return read_native_weights(url), {}, None
    if step_number(url) is not None:
        stored = StoredTensors(url)
        return stored_weights(stored), _stored_meta(stored), AdapterRecord.find(stored.extra)
    content = read_file(url)
    weights = _weights_of(content, url)
    state = {clean_name(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f"{url}: contains no weights, only {', '.join(map(str, list(content)[:8])) or 'nothing'}; "
            "expected an epoch_N.pt or a file of weights"
        )
    return state, _meta_of(content, weights), None if weights is content else AdapterRecord.find(content)


def read_meta(url: str, with_stats: bool = True) -> dict[str, Any]:
    """Return the second result of `read_model_state`, without reading or downloading the weights.

    with_stats: read the smaller file stats_N.pt in place of epoch_N.pt if it exists.
    """
    if step_number(url) is not None:
        return _stored_meta(StoredTensors(url))
    if is_transformers_folder(url):
        return {}
    stats = companion_path(url, "stats")
    if with_stats and stats != url and storage.info(stats) is not None:
        with contextlib.suppress(CheckpointError):  # epoch_N.pt has the same values
            content = read_file(stats)
            if "step" in content:
                return dict(content)
    with storage.open_file(url) as file:
        if not zipfile.is_zipfile(file):
            return _read_stored(url)[1]  # an old format that must be read completely
        file.seek(0)
        with FakeTensorMode():  # do not load the tensors' data
            content = _load(file, url)
    return _meta_of(content, _weights_of(content, url))


def _weights_of(content: Any, url: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{url}: expected a checkpoint, found a {type(content).__name__}")
    return next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), Mapping)), content)


def _meta_of(content: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    if weights is content:
        return {}
    return {name: value for name, value in content.items() if name not in (*_WEIGHT_KEYS, *_LARGE_KEYS)}


def stored_weights(stored: StoredTensors) -> dict[str, Tensor]:
    """Return the full weights of a sharded checkpoint; all names of a tied weight share one tensor."""
    tensors: dict[str, Tensor] = {}
    state = {}
    for name in stored.names("model/"):
        first = stored.stored_name(name)
        if first not in tensors:
            tensors[first] = stored.read(first)
        state[name.removeprefix("model/")] = tensors[first]
    return state


def _stored_meta(stored: StoredTensors) -> dict[str, Any]:
    progress = Progress.from_json(stored.extra["progress"])
    return {**progress.common_entries(str(stored.extra.get("name", ""))), **progress.shared_entries()}


def average_states(paths: list[str], coefficients: list[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted sum of several checkpoints' weights; the default coefficients are 1/n.

    The sum is computed in float32 (or wider). Integer tensors are taken from the first checkpoint.
    """
    if len(paths) < 2:
        raise CheckpointError("--average: found one checkpoint, expected two or more; use --pretrained for one")
    factors = coefficients if coefficients is not None else [1.0 / len(paths)] * len(paths)
    if len(factors) != len(paths):
        raise CheckpointError(
            f"--average-coefficients: found {len(factors)} coefficients, but --average has {len(paths)} checkpoints; "
            "give one coefficient per checkpoint"
        )
    total: dict[str, Tensor] = {}
    for path, factor in zip(paths, factors, strict=True):
        state, _ = read_model_state(path)
        if not total:
            total = {name: _scaled(value, factor) for name, value in state.items()}
            shapes = {name: value.shape for name, value in total.items()}
            continue
        problems = shape_problems(state, shapes)
        if problems:
            raise CheckpointError(join_problems(problems, f"{path} cannot be averaged with {paths[0]}"))
        for name, value in total.items():
            if value.is_floating_point():
                value.add_(state[name].to(value.dtype), alpha=factor)
    return total


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)) * factor if value.is_floating_point() else value


def shape_problems(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """Compare the names and shapes of `state` with the expected ones; return shortened error messages."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    different = [
        f"{name}: found {tuple(state[name].shape)}, the model has {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    problems = (
        ("missing in the checkpoint", missing),
        ("not in the model", unexpected),
        ("different shapes", different),
    )
    return [f"{title} ({len(names)}): {_shortened(names)}" for title, names in problems if names]


def _shortened(names: list[str]) -> str:
    hidden = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", … and {hidden} more" if hidden > 0 else "")


# ---------------------------------------------------------------------------------------------- writing
def write_file(path: str, content: Any) -> None:
    """Write a file with torch.save, atomically."""
    try:
        with storage.atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: the checkpoint could not be written ({error}); check the disk space") from error


# ---------------------------------------------------------------------------------------------- finding
def epoch_number(url: str) -> int | None:
    """Return N for .../epoch_N.pt, and None for any other name."""
    match = _NUMBERED.match(url.rpartition("/")[2])
    return int(match.group(1)) if match else None


def epoch_files(folder: str) -> dict[int, str]:
    """Return the epoch_N.pt files of a folder by N, ascending."""
    numbers = [(epoch_number(url), url) for url in storage.list_files(folder)]
    return dict(sorted((number, url) for number, url in numbers if number is not None))


def has_optimizer(url: str) -> bool:
    """Return whether the optimizer file of an epoch_N.pt exists and is complete."""
    optimizer = companion_path(url, "optimizer")
    return storage.info(optimizer) is not None and incomplete_reason(optimizer) is None


def incomplete_reason(url: str) -> str | None:
    """Return why a file is not a complete checkpoint, or None. Only its directory (at the end) is read."""
    try:
        with storage.open_file(url) as file:
            start = file.read(2)
            if start == b"PK":
                with zipfile.ZipFile(file) as archive:
                    names = archive.namelist()
                return None if any(name.endswith("/data.pkl") for name in names) else "it is not a checkpoint"
            return None if start == b"\x80\x02" else "it is empty or not a checkpoint"
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"it is truncated or unreadable ({error})"


def remove_checkpoint(folder: str, epoch: int) -> None:
    """Remove the files of one checkpoint, epoch_N.pt first, so that a partly removed one never looks complete."""
    first = storage.join(folder, file_name("epoch", epoch))
    companions = [url for url in storage.list_files(folder) if _COMPANION.match(url.rpartition("/")[2])]
    adapters = storage.list_files(storage.join(folder, adapter_folder(epoch)))
    for url in [first, *(url for url in companions if url.endswith(f"_{epoch}.pt")), *adapters]:
        with contextlib.suppress(StorageError):
            storage.remove(url)
