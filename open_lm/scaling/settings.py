"""Settings of fits. Imports neither numpy nor scipy."""

from __future__ import annotations

from dataclasses import dataclass

COMBINED = "combined"  # value of --law: the average of all candidates
DEFAULT_LOSS = "c4_val"  # of --loss, if the runs have several validation sets
POINTS = ("all", "paper")
COMPUTE_OPTIMAL = 20  # tokens per parameter, as in Hoffmann et al. 2022
# Tasks on which the 154M model of Gadre et al. 2024 is 10 percentage points above chance.
PAPER_TASKS = (
    "bigbench_operators", "pubmed_qa_labeled", "hellaswag_zeroshot", "boolq", "arc_easy", "coqa",
    "bigbench_dyck_languages", "lambada_openai", "bigbench_novel_concepts", "winograd", "bigbench_cs_algorithms",
    "commonsense_qa", "bigbench_qa_wikidata", "hellaswag", "copa", "squad", "piqa",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of a fit; names as those of the flags."""

    loss: str
    train: str | None = None
    law: str = COMBINED
    points: str = "all"
    max_flops: float | None = None
    error_tasks: tuple[str, ...] = PAPER_TASKS
    resamples: int = 1000
    level: float = 0.9
    seed: int = 0
