"""Read torch's flight recorder: the last collective operations of this process, and which of them are not complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch._C import _distributed_c10d

# Functions of this build of torch that return the record of a backend as JSON and pickled, by backend.
_FUNCTIONS = {
    "gloo": ("_dump_fr_trace_json", "_dump_fr_trace"),
    "nccl": ("_dump_nccl_trace_json", "_dump_nccl_trace"),
}


def read_records() -> dict[str, Any]:
    """Return the record of each backend with operations, as torch describes them in JSON."""
    records = {}
    for backend, (name, _) in _FUNCTIONS.items():
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            record = json.loads(dump(True, False))
            if record.get("entries"):
                records[backend] = record
    return records


def nccl_record() -> bytes | None:
    """Return the record of NCCL in the format that `torchfrtrace` reads; None without NCCL.

    Without stacks, because finding their symbols may take longer than the process has left.
    """
    dump = getattr(_distributed_c10d, _FUNCTIONS["nccl"][1], None)
    return None if dump is None else dump(True, False, False)


def describe_pending(records: Mapping[str, Any]) -> list[str]:
    """Return one line per operation that is not complete, and the last complete one of each backend."""
    lines = []
    for record in records.values():
        entries = record["entries"]
        pending = [entry for entry in entries if not entry["retired"]]
        complete = [entry for entry in entries if entry["retired"]]
        lines += [f"not complete: {_describe(entry)}" for entry in pending]
        lines += [f"last complete: {_describe(entry)}" for entry in complete[-1:]]
    return lines


def _describe(entry: Mapping[str, Any]) -> str:
    """Describe an operation; those of a group have equal numbers on all ranks."""
    tensors = zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    shapes = ", ".join(f"{dtype}{list(size)}" for dtype, size in tensors)
    group = "/".join(map(str, entry["process_group"]))
    return f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group} ({shapes})"
