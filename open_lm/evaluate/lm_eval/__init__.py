"""Evaluation with lm-eval (EleutherAI's harness): its tasks and metrics on the package's own engine.

    python -m open_lm.evaluate.lm_eval run --model open_lm --model_args checkpoint=logs/ex --tasks hellaswag

lm-eval 0.4.13 has a registry of models, but does not search other packages for them. `register` adds the model; a
program that calls lm-eval itself calls it first.
"""

from __future__ import annotations

MODEL_NAME = "open_lm"


def register() -> None:
    """Add the model "open_lm" to the registry of lm-eval. It is imported when lm-eval creates it.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    import lm_eval.models  # noqa: F401 (adds the models of lm-eval, if none is registered yet)
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="open_lm.evaluate.lm_eval.model:OpenLM")
