"""A training run: building its parts, the training loop, one optimizer step, and the handling of failed steps."""
