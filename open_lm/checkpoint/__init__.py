"""Save and load training state: sharded checkpoints (step_N/) and interchange files (epoch_N.pt and companions)."""

from open_lm.checkpoint.files import read_model_state
from open_lm.checkpoint.finding import Candidate, candidates_at, find_candidates, saved_progress
from open_lm.checkpoint.interchange import (
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
    "Candidate", "CheckpointManager", "Progress", "candidates_at", "find_candidates", "load_average", "load_averagers",
    "load_model", "load_optimizer", "load_rng", "load_weights", "read_model_state", "saved_progress",
]  # fmt: skip
