"""Save and load training state: sharded checkpoints (step_N/) and interchange files (epoch_N.pt and companions).

Nothing is imported before it is used: what only reads names of checkpoints does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.checkpoint.adapters import AdapterRecord, weights_sha256
    from open_lm.checkpoint.files import adapter_record, read_model_state
    from open_lm.checkpoint.finding import Candidate, candidates_at, find_candidates, saved_progress
    from open_lm.checkpoint.interchange import (
        load_adapters,
        load_average,
        load_averagers,
        load_model,
        load_optimizer,
        load_rng,
        load_weights,
    )
    from open_lm.checkpoint.manager import CheckpointManager
    from open_lm.checkpoint.parametrization import check_parametrization
    from open_lm.checkpoint.progress import Progress

__all__ = [
    "AdapterRecord", "Candidate", "CheckpointManager", "Progress", "adapter_record", "candidates_at",
    "check_parametrization", "find_candidates", "load_adapters", "load_average", "load_averagers", "load_model",
    "load_optimizer", "load_rng", "load_weights", "read_model_state", "saved_progress", "weights_sha256",
]  # fmt: skip

_MODULES = {
    "adapters": ("AdapterRecord", "weights_sha256"),
    "files": ("adapter_record", "read_model_state"),
    "finding": ("Candidate", "candidates_at", "find_candidates", "saved_progress"),
    "interchange": (
        *("load_adapters", "load_average", "load_averagers", "load_model", "load_optimizer", "load_rng"),
        "load_weights",
    ),
    "manager": ("CheckpointManager",),
    "parametrization": ("check_parametrization",),
    "progress": ("Progress",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
