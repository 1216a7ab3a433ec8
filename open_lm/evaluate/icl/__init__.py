"""In-context learning: prompts, scores and metrics of llm-foundry's tasks on a fast engine."""

from open_lm.evaluate.icl.evaluator import EvaluatorOptions, IclEvaluator, Ranks, evaluate_tasks
from open_lm.evaluate.icl.metrics import Outcome
from open_lm.evaluate.icl.store import ResultStore
from open_lm.evaluate.icl.tasks import EvalSettings, Task, read_settings

__all__ = [
    "EvalSettings", "EvaluatorOptions", "IclEvaluator", "Outcome", "Ranks", "ResultStore", "Task", "evaluate_tasks",
    "read_settings",
]  # fmt: skip
