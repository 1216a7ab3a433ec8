"""Training and validation data: shards -> data order -> token ids -> batches.

The batch path is loader.py -> order.py, stream.py -> shards.py; device.py copies the batches to the GPU.
Nothing is imported before it is used: preprocessing imports `open_lm.data.shard_format` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.data.compat import DataInfo, get_data, get_wds_dataset
    from open_lm.data.masking import mask_sequence, sample_chunk

__all__ = ["DataInfo", "get_data", "get_wds_dataset", "mask_sequence", "sample_chunk"]

_MODULES = {
    "DataInfo": "compat",
    "get_data": "compat",
    "get_wds_dataset": "compat",
    "mask_sequence": "masking",
    "sample_chunk": "masking",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
