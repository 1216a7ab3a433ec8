"""The settings of distillation: the teacher, and the loss that the student minimizes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from open_lm.config import registry
from open_lm.config.data_section import DataConfig
from open_lm.config.fields import Section, flag
from open_lm.system.names import user_path, weights_path

TEACHER_PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class DistillConfig(Section):
    title: ClassVar[str] = "distillation"

    distill_model: str | None = flag(
        None,
        "teacher to distill from: name or .json file of its configuration, with its weights in --distill-pretrained; "
        "or a folder or hub name of a model in the format of transformers",
        path=user_path,
    )
    distill_pretrained: str | None = flag(
        None,
        "weights of the teacher: checkpoint, run folder or exported folder; without --distill-model, the architecture "
        "is that of its run",
        path=weights_path,
    )
    distill_weight: float = flag(
        0.5, "weight of the divergence from the teacher, from 0 to 1; the cross entropy has the rest"
    )
    distill_temperature: float = flag(
        1.0, "temperature by which the logits of both models are divided for the divergence"
    )
    distill_loss: str = flag("forward-kl", "divergence from the teacher", choices=registry.DISTILL_LOSSES)
    distill_precision: str = flag("bf16", "dtype of the teacher's weights and computation", choices=TEACHER_PRECISIONS)
    distill_cache: list[str] | None = flag(
        None,
        "folders that open_lm.finetune.cache_teacher wrote, in place of a teacher in memory; with --distill-model or "
        "--distill-pretrained, check that this teacher made them",
        path=user_path,
    )

    @property
    def distills(self) -> bool:
        """Whether the run learns from a teacher."""
        return bool(self.distill_model or self.distill_pretrained or self.distill_cache)

    @property
    def loads_teacher(self) -> bool:
        """Whether the teacher runs next to the student."""
        return self.distills and not self.distill_cache

    def cache_problems(self, data: DataConfig) -> list[str]:
        """Return the settings that contradict --distill-cache, for a run on these data."""
        if not self.distill_cache:
            return []
        problems, losses = [], registry.DISTILL_LOSSES
        usable = [name for name in losses if losses.fact(name, "cached", False)]
        if self.distill_loss not in usable:
            problems.append(
                f"--distill-loss {self.distill_loss} needs all of the teacher's probabilities, but --distill-cache has "
                f"those of a few ids: use {' or '.join(usable)}, or a teacher in memory"
            )
        if data.dataset_type == "synthetic":
            problems.append("--distill-cache belongs to stored data: remove it, or --dataset-type synthetic")
        if data.train_text:
            problems.append("--distill-cache belongs to shards, not to --train-text: preprocess the text first")
        return problems
