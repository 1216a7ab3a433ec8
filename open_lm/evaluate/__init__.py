"""Evaluation: the validation loss on held-out shards. Commands of the package show their help without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.evaluate.validation import evaluate_loop

__all__ = ["evaluate_loop"]


def __getattr__(name: str) -> Any:
    if name != "evaluate_loop":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from open_lm.evaluate.validation import evaluate_loop

    return evaluate_loop
