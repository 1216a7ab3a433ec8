"""Evaluation: the validation loss on held-out shards."""

from open_lm.evaluate.validation import evaluate_loop

__all__ = ["evaluate_loop"]
