"""Save and load training state: sharded checkpoints (step_N/) and interchange files (epoch_N.pt and companions)."""

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
from open_lm.checkpoint.progress import Progress

__all__ = [
    "AdapterRecord", "Candidate", "CheckpointManager", "Progress", "adapter_record", "candidates_at", "find_candidates",
    "load_adapters", "load_average", "load_averagers", "load_model", "load_optimizer", "load_rng", "load_weights",
    "read_model_state", "saved_progress", "weights_sha256",
]  # fmt: skip
