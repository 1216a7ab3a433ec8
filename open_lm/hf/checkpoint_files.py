"""Write imported weights as a sharded checkpoint, one tensor of the source at a time.

Its chunks are small enough that each rank of any layout reads little more than its local shards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm import storage
from open_lm.checkpoint.folders import INDEX, step_folder
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import Index, StoredChunk, StoredTensor, checksum_of
from open_lm.checkpoint.tensor_store import FILE_BYTES
from open_lm.config.registry import FEED_FORWARDS
from open_lm.hf.folders import ProgressReport
from open_lm.hf.output_folder import OutputFolder
from open_lm.hf.tensor_map import Part, TensorMap
from open_lm.hf.weight_files import WeightFiles

CHUNK_BYTES = 512 << 10
_COLUMN_BLOCKS = 8  # of matrices that tensor parallelism splits along their columns
_OUTPUTS = "|".join(re.escape(name) for entry in FEED_FORWARDS.entries().values() for name in entry.facts["outputs"])
_SPLIT_BY_COLUMNS = re.compile(rf"\.(attention\.out_proj|feed_forward\.({_OUTPUTS}))\.weight$|\.experts\.mlp\.w[13]$")


def layout() -> dict[str, Any]:
    """Return the settings that, together with the tensors, determine the chunks of each file."""
    columns = {"column_blocks": _COLUMN_BLOCKS, "split_by_columns": _SPLIT_BY_COLUMNS.pattern}
    return {"chunk_bytes": CHUNK_BYTES, "file_bytes": FILE_BYTES, **columns}


@dataclass(frozen=True)
class _Chunk:
    """A box of a native tensor: `sizes` values from `offsets` in `part`, whose first row is `first_row`."""

    name: str
    part: Part
    first_row: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def stored(self, file: str, start: int, length: int, checksum: int) -> StoredChunk:
        offsets = (self.first_row + self.offsets[0], *self.offsets[1:])
        return StoredChunk(offsets, self.sizes, file, start, length, checksum)


def write_checkpoint(
    output: OutputFolder, weights: WeightFiles, tensor_map: TensorMap, dtype: torch.dtype | None, name: str
) -> None:
    """Write the sharded checkpoint of step 0. Files that an interrupted conversion has finished are kept.

    Args:
        output: the folder of the import.
        weights: of the source.
        tensor_map: the native tensors.
        dtype: of all tensors; None keeps that of the source.
        name: recorded as the name of the run.
    """
    dtypes = {
        native: dtype or _common_dtype(weights, [part.source for part in tensor_map.parts(native)])
        for native in tensor_map.shapes
    }
    chunks = [chunk for native in tensor_map.shapes for chunk in _chunks(native, tensor_map, dtypes[native])]
    report = ProgressReport("import", sum(math.prod(chunk.sizes) * dtypes[chunk.name].itemsize for chunk in chunks))
    reader = _Reader(weights, tensor_map)
    folder = step_folder(0)
    stored: dict[str, list[StoredChunk]] = {native: [] for native in tensor_map.shapes}
    files: dict[str, int] = {}
    for number, group in enumerate(_by_file(chunks, dtypes)):
        file = f"rank_00000_{number:03d}.bin"
        path = storage.join(folder, file)
        checksums = (output.facts(path) or {}).get("checksums") or _write_file(output, path, group, dtypes, reader)
        start = 0
        for chunk, checksum in zip(group, checksums, strict=True):
            length = math.prod(chunk.sizes) * dtypes[chunk.name].itemsize
            stored[chunk.name].append(chunk.stored(file, start, length, checksum))
            start += length
        files[file] = start
        report.add(start)
    tensors = {
        f"model/{native}": StoredTensor(dtypes[native], tensor_map.shapes[native], tuple(stored[native]))
        for native in tensor_map.shapes
    }
    aliases = {f"model/{alias}": f"model/{native}" for alias, native in tensor_map.aliases.items()}
    tensors |= {alias: tensors[native] for alias, native in aliases.items()}
    extra = {"progress": Progress(epoch=0, step=0).to_json(), "name": name, "world_size": 1}
    index = Index(0, files, tensors, aliases, extra)
    storage.write_bytes(storage.join(output.folder, folder, INDEX), index.to_bytes())


def _write_file(
    output: OutputFolder,
    path: str,
    chunks: Sequence[_Chunk],
    dtypes: Mapping[str, torch.dtype],
    reader: _Reader,
) -> list[int]:
    """Write chunks to a file, and return their checksums, which are recorded with the file."""
    checksums = []
    with output.write(path) as file:
        for chunk in chunks:
            values = reader.read(chunk).to(dtypes[chunk.name]).contiguous()
            data: Any = values.reshape(-1).view(torch.uint8).numpy()
            checksums.append(checksum_of(data))
            file.write(data)
        file.facts["checksums"] = checksums
    return checksums


class _Reader:
    """A reader of chunks that holds the source tensor of the latest one."""

    def __init__(self, weights: WeightFiles, tensor_map: TensorMap) -> None:
        self._weights, self._map = weights, tensor_map
        self._current: tuple[object, Tensor] = None, torch.empty(0)

    def read(self, chunk: _Chunk) -> Tensor:
        """Return the values of a chunk, in the dtype of the source."""
        name, part = chunk.name, chunk.part
        if part.source is None:
            return torch.zeros(chunk.sizes)
        if self._current[0] != (name, part):
            self._current = None, torch.empty(0)  # free it before the next one is read
            self._current = (name, part), self._map.to_native(name, part, self._weights.read(part.source))
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return self._current[1][box]


def _chunks(name: str, tensor_map: TensorMap, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Yield the chunks of a native tensor by the parts of the source that it consists of."""
    shape, first_row = tensor_map.shapes[name], 0
    blocks = _COLUMN_BLOCKS if _SPLIT_BY_COLUMNS.search(name) and shape[-1] % _COLUMN_BLOCKS == 0 else 1
    for part in tensor_map.parts(name):
        for offsets, sizes in _boxes((part.rows, *shape[1:]), CHUNK_BYTES // dtype.itemsize, blocks):
            yield _Chunk(name, part, first_row, offsets, sizes)
        first_row += part.rows


def _boxes(
    shape: tuple[int, ...], num_values: int, column_blocks: int = 1
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of boxes of about `num_values` values that cover a tensor of up to three dimensions.

    A box consists of full rows, or of `column_blocks` blocks of columns. Matrices that are larger, of a stack of
    matrices, are cut separately.
    """
    row_values = math.prod(shape[1:])
    if len(shape) > 2 and row_values > num_values:
        for row in range(shape[0]):
            for offsets, sizes in _boxes(shape[1:], num_values, column_blocks):
                yield (row, *offsets), (1, *sizes)
    elif column_blocks > 1 and len(shape) == 2 and math.prod(shape) > num_values:
        width = shape[1] // column_blocks
        rows = max(1, min(num_values // width, -(-shape[0] // column_blocks)))  # for ranks that split the rows too
        for start in range(0, shape[0], rows):
            for column in range(0, shape[1], width):
                yield (start, column), (min(rows, shape[0] - start), width)
    else:
        rows = max(1, num_values // max(1, row_values))
        for start in range(0, shape[0], rows):
            yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def _by_file(chunks: Sequence[_Chunk], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[_Chunk]]:
    """Distribute chunks to files of at most FILE_BYTES, in order."""
    group: list[_Chunk] = []
    used = 0
    for chunk in chunks:
        length = math.prod(chunk.sizes) * dtypes[chunk.name].itemsize
        if group and used + length > FILE_BYTES:
            yield group
            group, used = [], 0
        group.append(chunk)
        used += length
    if group:
        yield group


def _common_dtype(weights: WeightFiles, sources: Sequence[str | None]) -> torch.dtype:
    """Return the widest dtype of the tensors that make up a native tensor."""
    dtypes = [weights.tensors[source].dtype for source in sources if source is not None]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
