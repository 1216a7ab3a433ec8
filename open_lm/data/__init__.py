"""Shards to batches: plan.py (who reads what), stream.py (bytes to ids), loader.py (batches and state).

Nothing is imported until it is used: preprocessing takes `open_lm.data.shard_format` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.data.callers import DataInfo, get_data, get_wds_dataset
    from open_lm.data.masking import mask_sequence, sample_chunk

__all__ = ["DataInfo", "get_data", "get_wds_dataset", "mask_sequence", "sample_chunk"]

_HOMES = {
    "DataInfo": "callers",
    "get_data": "callers",
    "get_wds_dataset": "callers",
    "mask_sequence": "masking",
    "sample_chunk": "masking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
