"""Scores of tasks, and settings of Gauntlets over them."""

from __future__ import annotations

from typing import Any

from open_lm.evaluate.icl import Outcome
from open_lm.evaluate.icl.gauntlet import WEIGHTINGS

ACCURACY = "InContextLearningMultipleChoiceAccuracy"
OUTCOMES = [
    Outcome("a", 0, "multiple_choice", ACCURACY, 0.4, n=100, metrics={ACCURACY: 0.4}),
    Outcome("b", 3, "multiple_choice", ACCURACY, 0.9, n=1000, metrics={ACCURACY: 0.9, "SomeCalibrationError": 0.1}),
    Outcome("c", 3, "multiple_choice", ACCURACY, 0.55, n=3, metrics={ACCURACY: 0.55}, categories={"x": 0.5, "y": 0.6}),
    Outcome("d", 1, "multiple_choice", ACCURACY, 0.1, n=1, metrics={ACCURACY: 0.1}),
]
CATEGORIES = [
    {"name": "first", "benchmarks": [{"name": "a", "num_fewshot": 0, "random_baseline": 0.25},
                                     {"name": "b", "num_fewshot": 3, "random_baseline": 0.5}]},
    {"name": "second", "benchmarks": [{"name": "c", "num_fewshot": 3, "random_baseline": 0.0},
                                      {"name": "d", "num_fewshot": 1, "random_baseline": 0.2}]},
    {"name": "incomplete", "benchmarks": [{"name": "b", "num_fewshot": 3, "random_baseline": 0.5},
                                          {"name": "b", "num_fewshot": 0, "random_baseline": 0.5}]},
]  # fmt: skip
AVERAGES = {"core_average": ["first", "second", "incomplete"], "other": ["second"]}
VARIANTS: list[dict[str, Any]] = [
    *({"weighting": weighting, "averages": AVERAGES} for weighting in WEIGHTINGS),
    {"weighting": "EQUAL", "rescale_accuracy": False},
    {"weighting": "SAMPLE_SZ", "rescale_accuracy": False, "subtract_random_baseline": False, "averages": AVERAGES},
]
