"""Read and write the weights of a folder in the format of transformers, one tensor at a time.

Weights are in safetensors files, or in .bin files of torch.save, in one file or in several with an index:

    model.safetensors                    or model-00001-of-00003.safetensors … and model.safetensors.index.json
    pytorch_model.bin                    or pytorch_model-00001-of-00003.bin … and pytorch_model.bin.index.json

A safetensors file starts with the length of its header (8 bytes, little-endian) and the header, JSON with the dtype,
the shape and the range of bytes of each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.files import read_file
from open_lm.errors import CheckpointError, join_problems
from open_lm.hf.output_folder import OutputFolder

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9  # of a file that is written
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The name, the dtype and the shape of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Location:
    file: str
    info: TensorInfo
    start: int = 0  # of a tensor in a safetensors file, in bytes


class WeightFiles:
    """The weights of a local or remote folder. One tensor is in memory at a time, or one mapped .bin file.

    Attributes:
        tensors: dtype and shape of each tensor, by name, in the order of the files.
        num_bytes: their total size.
    """

    def __init__(self, folder: str) -> None:
        """Read the headers.

        Raises:
            CheckpointError: no weights, or files that are missing or damaged, all at once.
        """
        self.folder = folder
        self._locations: dict[str, _Location] = {}
        self._mapped: tuple[str, dict[str, Tensor]] = "", {}
        problems = []
        for name in self._file_names():
            url = storage.join(folder, name)
            try:
                locations = _read_header(url) if name.endswith(".safetensors") else self._read_bin(url)
                self._locations.update(locations)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(join_problems(problems, f"{folder}: the weights cannot be read"))
        self.tensors = {name: location.info for name, location in self._locations.items()}
        self.num_bytes = sum(info.num_bytes for info in self.tensors.values())

    def versions(self) -> list[dict[str, Any]]:
        """Return the name, size, time and checksum of each file, as far as its store states them."""
        files = dict.fromkeys(location.file for location in self._locations.values())
        return [asdict(info) for file in files if (info := storage.info(file)) is not None]

    def _file_names(self) -> list[str]:
        names = {info.url.rpartition("/")[2] for info in storage.list_infos(self.folder)}
        for name in (SAFETENSORS, BIN):
            if f"{name}.index.json" in names:
                return _files_of_index(storage.join(self.folder, f"{name}.index.json"), names)
            if name in names:
                return [name]
        found = ", ".join(sorted(names)[:10]) or "nothing"
        raise CheckpointError(f"{self.folder}: expected {SAFETENSORS} or {BIN}, or their index; found {found}")

    def read(self, name: str) -> Tensor:
        """Return a tensor in host memory."""
        location = self._locations[name]
        if not location.file.endswith(".safetensors"):
            if self._mapped[0] != location.file:
                self._read_bin(location.file)
            return self._mapped[1][name]
        return _read_tensor(location)

    def _read_bin(self, url: str) -> dict[str, _Location]:
        self._mapped = "", {}  # free the previous file first
        content = read_file(url)
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if not tensors:
            raise CheckpointError(f"{url}: contains no weights")
        self._mapped = url, tensors
        return {
            name: _Location(url, TensorInfo(name, value.dtype, tuple(value.shape))) for name, value in tensors.items()
        }


def _files_of_index(url: str, existing: set[str]) -> list[str]:
    try:
        weight_map = json.loads(storage.read_text(url))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}: not an index of weights ({error!r})") from error
    missing = [str(name) for name in names if name not in existing]
    if missing:
        raise CheckpointError(f"{url}: these files are missing: {', '.join(missing)}; download them")
    return names


def _read_header(url: str) -> dict[str, _Location]:
    num_bytes = storage.size(url)
    advice = "download it again"
    if num_bytes < 8:
        raise CheckpointError(f"{url}: truncated: found {num_bytes} bytes; {advice}")
    length = int.from_bytes(storage.read_range(url, 0, 8), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise CheckpointError(f"{url}: not a safetensors file (its header would have {length} bytes); {advice}")
    if 8 + length > num_bytes:
        raise CheckpointError(f"{url}: truncated: the header has {length} bytes, the file {num_bytes}; {advice}")
    try:
        entries = json.loads(storage.read_range(url, 8, length))
        entries.pop("__metadata__", None)
        locations = {name: _location(url, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}: the header is damaged ({error!r}); {advice}") from error
    end = max((location.start + location.info.num_bytes for location in locations.values()), default=8 + length)
    if end != num_bytes:
        raise CheckpointError(f"{url}: truncated: expected {end} bytes, found {num_bytes}; {advice}")
    return locations


def _location(url: str, name: str, entry: dict[str, Any], data_start: int) -> _Location:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{url}: {name} has the dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    info = TensorInfo(name, _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
    start, end = entry["data_offsets"]
    if end - start != info.num_bytes or start < 0:
        raise ValueError(f"{name} has {end - start} bytes, expected {info.num_bytes}")
    return _Location(url, info, data_start + start)


def _read_tensor(location: _Location) -> Tensor:
    info, url = location.info, location.file
    data = torch.empty(info.num_bytes, dtype=torch.uint8)
    if storage.is_remote(url):
        data.numpy()[:] = np.frombuffer(storage.read_range(url, location.start, info.num_bytes), dtype=np.uint8)
    else:
        with storage.open_file(url) as file:
            file.seek(location.start)
            num_bytes = file.readinto(data.numpy())  # type: ignore[attr-defined]  # typing.IO does not declare it
        if num_bytes != info.num_bytes:
            raise CheckpointError(f"{url}: truncated: {info.name} has {num_bytes} of {info.num_bytes} bytes")
    return data.view(info.dtype).view(info.shape)


# ---------------------------------------------------------------------------------------------- writing
def write_weights(
    output: OutputFolder,
    infos: Sequence[TensorInfo],
    reads: Iterable[Callable[[], Tensor]],
    base_name: str = SAFETENSORS,
) -> None:
    """Write safetensors files of up to SHARD_BYTES (one tensor may be larger), and their index if there are several.

    `reads` yields functions that return the tensors of `infos`, in their order. Those of finished files are not called.
    The file is `base_name`; several have their numbers in it.
    """
    shards = _split(infos, SHARD_BYTES)
    stream = iter(reads)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = base_name
        if len(shards) > 1:
            name = base_name.replace(".", f"-{number:05d}-of-{len(shards):05d}.")
        weight_map.update({info.name: name for info in shard})
        tensors = list(islice(stream, len(shard)))
        if output.facts(name) is None:
            with output.write(name) as file:
                for part in _shard_content(shard, tensors):
                    file.write(part)
    if len(shards) > 1:
        metadata = {"total_size": sum(info.num_bytes for info in infos)}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, allow_nan=False)
        storage.write_text(storage.join(output.folder, f"{base_name}.index.json"), f"{text}\n")


def _split(infos: Sequence[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in infos:
        if shards[-1] and used + info.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.num_bytes
    return shards


def _shard_content(shard: Sequence[TensorInfo], reads: Sequence[Callable[[], Tensor]]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in shard:
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, start + info.num_bytes],
        }
        start += info.num_bytes
    header = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-len(header) % 8)  # the data of tensors is aligned
    yield len(header).to_bytes(8, "little") + header
    for info, read in zip(shard, reads, strict=True):
        tensor = read()
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(f"{info.name}: found {tensor.dtype} {tuple(tensor.shape)}, expected {info}")
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
