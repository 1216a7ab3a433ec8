"""Wrap the model for Composer and llm-foundry. Needs the environment of `make install-eval`.

Legend: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity
from composer.models import HuggingFaceModel
from llmfoundry.eval.metrics import (
    InContextLearningGenerationExactMatchAccuracy,
    InContextLearningLMAccuracy,
    InContextLearningLMExpectedCalibrationError,
    InContextLearningMCExpectedCalibrationError,
    InContextLearningMultipleChoiceAccuracy,
)
from torch import Tensor


class SimpleComposerOpenLMCausalLM(HuggingFaceModel):
    """A Composer model for an `open_lm.hf.OpenLMForCausalLM` and its tokenizer.

    llm-foundry pads every sequence to the maximum sequence length. Columns that are padding in all sequences of a batch
    are removed before the forward pass. This changes no score and saves most of the work on short tasks.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(
            model=model,
            tokenizer=tokenizer,
            use_logits=True,
            metrics=[LanguageCrossEntropy(), LanguagePerplexity()],
            eval_metrics=[
                LanguageCrossEntropy(),
                LanguagePerplexity(),
                InContextLearningLMAccuracy(),
                InContextLearningMultipleChoiceAccuracy(),
                InContextLearningGenerationExactMatchAccuracy(),
                InContextLearningLMExpectedCalibrationError(),
                InContextLearningMCExpectedCalibrationError(),
            ],
            shift_labels=True,
        )

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the model's output for a batch; for in-context-learning tasks, logits (B,T',V) without end padding."""
        if batch.get("mode") == "icl_task":
            batch = without_right_padding(batch)
        return super().forward(batch)

    def eval_forward(self, batch: dict[str, Any], outputs: Any = None) -> Any:
        """Return logits (B,T',V), or the generated texts for a batch of a generation task."""
        if batch.get("mode") == "generate":
            batch = without_left_padding(batch)
        return super().eval_forward(batch, outputs)

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Return generated token ids (B,T). Every process has the full model, so processes need no synchronization."""
        kwargs["synced_gpus"] = False
        return super().generate(input_ids, **kwargs)


def without_right_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch truncated after its last real token, without a mask if all padding is on the right.

    In a causal model, later tokens do not affect earlier ones, so padding on the right needs no mask.
    """
    mask = batch["attention_mask"].bool()
    ends = [int(span[-1]) + 1 for span in batch.get("continuation_indices", [])]
    length = max([_last_true(mask) + 1, *ends])
    mask = mask[:, :length]
    trimmed = {**batch, "input_ids": batch["input_ids"][:, :length], "attention_mask": mask}
    if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        del trimmed["attention_mask"]
    return trimmed


def without_left_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch from its first real token on, with at least one column."""
    mask = batch["attention_mask"].bool()
    real = mask.any(dim=0)
    start = int(real.float().argmax()) if bool(real.any()) else mask.shape[1] - 1
    return {**batch, "input_ids": batch["input_ids"][:, start:], "attention_mask": batch["attention_mask"][:, start:]}


def _last_true(mask: Tensor) -> int:
    columns = torch.nonzero(mask.any(dim=0))
    return int(columns[-1]) if len(columns) else 0
