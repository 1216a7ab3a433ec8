"""A run's state on disk: sharded checkpoints (step_N/) and the interchange files (epoch_N.pt and its companions)."""

from open_lm.checkpoint.files import read_model_state
from open_lm.checkpoint.finding import Candidate, candidates, named, saved_progress
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
    "Candidate", "CheckpointManager", "Progress", "candidates", "load_average", "load_averagers", "load_model",
    "load_optimizer", "load_rng", "load_weights", "named", "read_model_state", "saved_progress",
]  # fmt: skip
