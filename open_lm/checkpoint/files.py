"""The files of a checkpoint, one by one: names, safe reading and whole writing, completeness. No process group here.

A checkpoint of epoch N in a run's folder `checkpoints` is

    optimizer_N.pt <averager>_N.pt stats_N.pt    written first
    epoch_N.pt                                   written last: where it is, the checkpoint is complete
    epoch_latest.pt                              with --save-most-recent: one file that holds model and optimizer
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from open_lm import storage
from open_lm.checkpoint.folders import step_number
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.distributed.param_names import clean_name
from open_lm.errors import BrokenCheckpoint, CheckpointError, StorageError, join_problems

LATEST = "latest"
_NUMBERED = re.compile(r"^epoch_(\d+)\.pt$")
_COMPANION = re.compile(r"^(optimizer|stats|(poly|ema|none)(_[^_]+){0,2})_(\d+)\.pt$")  # averagers go by their names
# Keys of a checkpoint under which a model's weights are found.
_WEIGHT_KEYS = ("state_dict", "av_model_sd")
_LARGE_KEYS = ("optimizer", "averagers", "rng")


def file_name(kind: str, epoch: int | str) -> str:
    """The name of one file: kind "epoch", "optimizer", "stats" or an averager's name; epoch a number or "latest"."""
    return f"{kind}_{epoch}.pt"


def sibling(path: str, kind: str) -> str:
    """The file of another kind beside .../epoch_N.pt."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"^epoch_", f"{kind}_", name)


# ---------------------------------------------------------------------------------------------- reading
def read_file(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """What torch.save wrote to a local or remote file; only tensors and plain values are ever unpickled.

    Local and downloaded files are mapped into memory, so that only what is used is read. CheckpointError where the
    file is missing, broken or holds other kinds of objects.
    """
    url = os.fspath(path)
    if not storage.is_remote(url):
        local = storage.local_path(url)
        if not os.path.isfile(local):
            raise CheckpointError(f"{url}: there is no such checkpoint{neighbours(url)}")
        return _load(local, url, map_location, mmap=zipfile.is_zipfile(local))
    with tempfile.TemporaryDirectory(prefix="open_lm-checkpoint-") as folder:
        local = os.path.join(folder, "checkpoint.pt")
        try:
            storage.download(url, local)
        except StorageError as error:
            raise CheckpointError(f"the checkpoint cannot be fetched: {error}") from error
        # The mapping keeps the file's data alive after its removal.
        return _load(local, url, map_location, mmap=zipfile.is_zipfile(local))


def _load(source: str | IO[bytes], url: str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(source, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) '?([A-Za-z_][\w.]*\.\w+)", str(error))
        what = f"an object of type {found.group(1)}" if found else "something else"
        raise CheckpointError(f"{url}: expected tensors and plain values only, found {what}") from error
    except StorageError:
        raise
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise BrokenCheckpoint(
            f"{url}: the file is broken or no checkpoint ({reason}); fetch it again, or use an earlier one"
        ) from error


def _numpy_scalars() -> list[Any]:
    """What older optimizer files need beside tensors: numbers such as the learning rate as numpy scalars."""
    import numpy as np

    scalar = np.float64(0.0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u8", "u4", "b1")]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def neighbours(url: str) -> str:
    """The end of a message about a file that is not there: which checkpoints are beside it."""
    present = [os.path.basename(name) for name in storage.glob(os.path.join(os.path.dirname(url) or ".", "epoch_*.pt"))]
    return f"; beside it are {', '.join(present[:8])}" if present else ""


def read_model_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's weights by their clean names, and everything else small that the checkpoint says (epoch, step, …).

    Takes a checkpoint of a run (epoch_N.pt or a step_N folder), an averager's file, or bare weights (then the second
    result is empty).
    """
    url = os.fspath(path)
    if step_number(url) is not None:
        stored = StoredTensors(url)
        return stored_weights(stored), _stored_meta(stored)
    content = read_file(url)
    weights = _weights_of(content, url)
    state = {clean_name(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f"{url}: holds no weights, only {', '.join(map(str, list(content)[:8])) or 'nothing'}; "
            "expected an epoch_N.pt or bare weights"
        )
    return state, _meta_of(content, weights)


def read_meta(url: str) -> dict[str, Any]:
    """What `read_model_state` returns beside the weights, of which nothing is read, and nothing downloaded."""
    if step_number(url) is not None:
        return _stored_meta(StoredTensors(url))
    beside = sibling(url, "stats")
    if beside != url and storage.info(beside) is not None:
        with contextlib.suppress(CheckpointError):  # the file itself says the same
            content = read_file(beside)
            if "step" in content:
                return dict(content)
    with storage.open_file(url) as file:
        if not zipfile.is_zipfile(file):
            return read_model_state(url)[1]  # an old format, in which all has to be read
        file.seek(0)
        with FakeTensorMode():  # tensors without their data
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
    """The whole weights of a sharded checkpoint; all names of a tied weight share one tensor."""
    read: dict[str, Tensor] = {}
    state = {}
    for name in stored.names("model/"):
        first = stored.stored_name(name)
        if first not in read:
            read[first] = stored.read(first)
        state[name.removeprefix("model/")] = read[first]
    return state


def _stored_meta(stored: StoredTensors) -> dict[str, Any]:
    progress = Progress.from_json(stored.extra["progress"])
    return {**progress.common_entries(str(stored.extra.get("name", ""))), **progress.shared_entries()}


def average_states(paths: list[str], coefficients: list[float] | None = None) -> dict[str, Tensor]:
    """The weighted sum of several checkpoints' weights; equal weights of 1/n by default.

    Summed in float32 (or wider); a tensor of integers is taken from the first checkpoint.
    """
    if len(paths) < 2:
        raise CheckpointError("--average: expected two or more checkpoints; use --pretrained for one")
    weights = coefficients if coefficients is not None else [1.0 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise CheckpointError(f"--average-coefficients: found {len(weights)} for {len(paths)} checkpoints of --average")
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        state, _ = read_model_state(path)
        if not total:
            total = {name: _scaled(value, weight) for name, value in state.items()}
            shapes = {name: value.shape for name, value in total.items()}
            continue
        problems = shape_problems(state, shapes)
        if problems:
            raise CheckpointError(join_problems(problems, f"{path} cannot be averaged with {paths[0]}"))
        for name, value in total.items():
            if value.is_floating_point():
                value.add_(state[name].to(value.dtype), alpha=weight)
    return total


def _scaled(value: Tensor, weight: float) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)) * weight if value.is_floating_point() else value


def shape_problems(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """What keeps `state` from fitting `expected` names and shapes: missing, unexpected, other shapes (shortened)."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    different = [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    named = (("missing from the checkpoint", missing), ("not in the model", unexpected), ("other shapes", different))
    return [f"{title} ({len(names)}): {_shortened(names)}" for title, names in named if names]


def _shortened(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … and {len(names) - limit} more"


# ---------------------------------------------------------------------------------------------- writing
def write_file(path: str, content: Any) -> None:
    """Write with torch.save so that the file appears whole or not at all."""
    try:
        with storage.atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: the checkpoint could not be written ({error}); is the disk full?") from error


# ---------------------------------------------------------------------------------------------- finding
def epoch_number(url: str) -> int | None:
    """N of .../epoch_N.pt, None for any other name."""
    match = _NUMBERED.match(url.rpartition("/")[2])
    return int(match.group(1)) if match else None


def numbered(folder: str) -> dict[int, str]:
    """The epoch_N.pt files of a folder by their number, ascending."""
    found = [(epoch_number(url), url) for url in storage.list_files(folder)]
    return dict(sorted((number, url) for number, url in found if number is not None))


def has_optimizer(url: str) -> bool:
    """Whether the optimizer's file beside an epoch_N.pt is there and whole."""
    beside = sibling(url, "optimizer")
    return storage.info(beside) is not None and incompleteness(beside) is None


def incompleteness(url: str) -> str | None:
    """Why a file cannot be a whole checkpoint, or None; reads its table of contents only (which stands at its end)."""
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
    """Remove the files of one checkpoint, epoch_N.pt first: what remains of it never looks complete."""
    first = storage.join(folder, file_name("epoch", epoch))
    beside = [url for url in storage.list_files(folder) if _COMPANION.match(url.rpartition("/")[2])]
    for url in [first, *(url for url in beside if url.endswith(f"_{epoch}.pt"))]:
        with contextlib.suppress(StorageError):
            storage.remove(url)
