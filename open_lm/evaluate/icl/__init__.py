"""In-context learning: prompts, scores and metrics of llm-foundry's tasks on a fast engine.

Nothing is imported before it is used: commands show their help without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.evaluate.icl.evaluator import EvaluatorOptions, IclEvaluator, Ranks, evaluate_tasks
    from open_lm.evaluate.icl.metrics import Outcome
    from open_lm.evaluate.icl.store import ResultStore
    from open_lm.evaluate.icl.tasks import EvalSettings, Task, read_settings

__all__ = [
    "EvalSettings", "EvaluatorOptions", "IclEvaluator", "Outcome", "Ranks", "ResultStore", "Task", "evaluate_tasks",
    "read_settings",
]  # fmt: skip

_MODULES = {
    "evaluator": ("EvaluatorOptions", "IclEvaluator", "Ranks", "evaluate_tasks"),
    "metrics": ("Outcome",),
    "store": ("ResultStore",),
    "tasks": ("EvalSettings", "Task", "read_settings"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
