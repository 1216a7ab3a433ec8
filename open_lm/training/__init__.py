"""A training run: building its parts, the training loop, one optimizer step, and what to do when a step fails."""
