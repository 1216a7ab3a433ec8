"""Check files of weights by their headers, without reading the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_MAX_HEADER_BYTES = 100 * 2**20  # by the specification of safetensors
_INDEX = ".safetensors.index.json"


def weights_problem(folder: Path, files: Sequence[str]) -> str | None:
    """Return why files, relative to a folder, are no complete weights in the safetensors format; None if they are."""
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        return f"found no safetensors file among {', '.join(files[:5])}"
    for name in weights:
        try:
            problem = _file_problem(folder / name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"is not a safetensors file ({type(error).__name__}: {error})"
        if problem is not None:
            return f"{name} {problem}"
    return next(filter(None, (_index_problem(folder, name, weights) for name in files if name.endswith(_INDEX))), None)


def _file_problem(path: Path) -> str | None:
    """Return why the header of a file does not describe its bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, _MAX_HEADER_BYTES):
            return f"is cut or no safetensors file: its header would have {length:,} of {size:,} bytes"
        header = json.loads(file.read(length))
    tensors = {name: item for name, item in header.items() if name != "__metadata__"}
    if not tensors:
        return "has no tensors"
    end = 8 + length + max(int(item["data_offsets"][1]) for item in tensors.values())
    if end != size:
        return f"is cut or damaged: found {size:,} bytes, expected {end:,} by its header"
    return None if end > 8 + length else "has only empty tensors"


def _index_problem(folder: Path, index: str, weights: Sequence[str]) -> str | None:
    """Return which file of weights an index names that is not there."""
    parent = index.rpartition("/")[0]
    try:
        names = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{index} is not an index of weights ({type(error).__name__}: {error})"
    missing = sorted(str(name) for name in names if (f"{parent}/{name}" if parent else name) not in weights)
    return f"{index} names {missing[0]}, which is missing" if missing else None
