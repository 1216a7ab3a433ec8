"""Scores over several tasks: llm-foundry's Gauntlet, compared with its own callback, and OpenLM's average."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from gauntlet_cases import ACCURACY, AVERAGES, CATEGORIES, OUTCOMES

from open_lm.errors import ConfigError
from open_lm.evaluate.icl import Outcome, read_settings
from open_lm.evaluate.icl.aggregates import aggregate_members, aggregate_score
from open_lm.evaluate.icl.download import task_files
from open_lm.evaluate.icl.gauntlet import gauntlet_scores
from open_lm.evaluate.icl.report import format_table, read_json, write_json
from open_lm.evaluate.icl.task_types import parse_options


def test_gauntlet_of_a_yaml_file(tmp_path: Path) -> None:
    block = {"eval_gauntlet": {"weighting": "LOG_SAMPLE_SZ", "averages": AVERAGES, "categories": CATEGORIES}}
    (tmp_path / "gauntlet.yaml").write_text(yaml.safe_dump(block))
    (tmp_path / "inside.yaml").write_text(yaml.safe_dump({"icl_tasks": [], **block}))
    (tmp_path / "by_path.yaml").write_text(yaml.safe_dump({"icl_tasks": [], "eval_gauntlet": "gauntlet.yaml"}))
    inside, by_path = (read_settings([str(tmp_path / f"{name}.yaml")]).gauntlet for name in ("inside", "by_path"))
    assert inside == by_path and inside is not None and inside.weighting == "LOG_SAMPLE_SZ"
    scores = gauntlet_scores(inside, OUTCOMES)
    write_json(str(tmp_path / "results.json"), OUTCOMES, {}, [], scores)
    content, _ = read_json(str(tmp_path / "results.json"))
    assert content["gauntlet"]["averages"] == scores.averages


def test_problems_of_a_gauntlet_are_reported_together(tmp_path: Path) -> None:
    benchmark = {"name": "a", "num_fewshot": 0, "random_baseline": 1.0}
    block = {
        "weighting": "SIZE",
        "subtract_random_baseline": False,
        "averages": {"x": ["y"]},
        "categories": [{"name": "x", "benchmarks": [benchmark, {"name": "b"}]}, {"name": "z"}],
    }
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"icl_tasks": [], "eval_gauntlet": block}))
    with pytest.raises(ConfigError) as error:
        read_settings([str(tmp_path / "f.yaml")])
    words = ("weighting is SIZE", "needs subtract_random_baseline", "y do not exist", "found 0 and 1.0")
    for text in (*words, "expected a benchmark with", "expected a category with"):
        assert text in str(error.value)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"icl_tasks": [], "eval_gauntlet": "missing.yaml"}))
    with pytest.raises(ConfigError, match="expected settings or the path"):
        read_settings([str(tmp_path / "f.yaml")])


def test_openlm_average_is_that_of_the_published_table() -> None:
    """The column "1T tokens" of the published results of OpenLM-1B."""
    labels = [
        "arc_challenge",
        "arc_easy",
        "boolq",
        "copa",
        "hellaswag",
        "lambada_openai",
        "piqa",
        "winogrande",
        "mmlu",
        "jeopardy",
        "winograd",
    ]
    values = (0.28, 0.53, 0.62, 0.78, 0.57, 0.59, 0.72, 0.59, 0.23, 0.01, 0.79)
    outcomes = [Outcome(label, 0, "", score=value) for label, value in zip(labels, values, strict=True)]
    found = aggregate_score([*outcomes, Outcome("triviaqa", 0, "", score=0.5)], "openlm")
    assert found.score == pytest.approx(sum(values) / 11) and str(found) == "OpenLM average (11 tasks): 0.5191"
    partial = aggregate_score([replace(outcomes[0], shots=5), *outcomes[1:]], "openlm")
    assert partial.score is None and partial.missing == ["arc_challenge"]


def test_the_table_has_macro_and_micro_scores_of_categories() -> None:
    outcome = replace(OUTCOMES[2], micro_score=0.5333)
    assert "c 3-shot: 0.5500 is the mean over 2 categories (macro)" in format_table([outcome])
    assert "over all examples it is 0.5333 (micro)" in format_table([outcome])


# -------------------------------------------------------------------------------------------------- task lists
EVAL = Path(__file__).resolve().parents[2] / "eval"
ROWS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 0},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b"},
    "generation_task_with_answers": {"context": "a", "answer": "b", "chain_of_thought": "c"},
}


@pytest.mark.parametrize("file", sorted(EVAL.glob("*.yaml")), ids=lambda file: file.stem)
def test_task_lists_name_known_tasks(file: Path, tmp_path: Path) -> None:
    entries = yaml.safe_load(file.read_text())["icl_tasks"]
    for entry in entries:
        name = entry["dataset_uri"].rpartition("/")[2]
        assert name in task_files(), "the download command knows the file"
        (tmp_path / name).write_text(json.dumps({**ROWS[entry["icl_task_type"]], "category": "x"}))
    settings = read_settings([str(file)], str(tmp_path))
    for task in settings.tasks:
        parse_options(task.label, task.kind, task.config)
    available = {(task.label, shots) for task in settings.tasks for shots in task.shots}
    own = {"in_memory_hf_eval": {("mmlu", 0)}}.get(file.stem, set())  # in mmlu.yaml
    for name in settings.aggregates:
        assert set(aggregate_members(name)) - available == own
    outcomes = [Outcome(label, shots, "", ACCURACY, 0.5, n=10, metrics={ACCURACY: 0.5}) for label, shots in available]
    if settings.gauntlet is not None:
        assert None not in gauntlet_scores(settings.gauntlet, outcomes).categories.values()
    assert not settings.ignored


def test_task_lists_have_the_options_and_baselines_of_dclm(shared_dir: Path) -> None:
    listed = json.loads((shared_dir / "data" / "eval" / "dclm_tasks.json").read_text())
    expected = {entry["label"]: entry for entry in listed}
    sizes = {"core": 22, "medium": 38, "heavy": 53, "light": 9}
    for name, size in sizes.items():
        entries = yaml.safe_load((EVAL / f"{name}.yaml").read_text())["icl_tasks"]
        assert len(entries) == size
        for entry in entries:
            task = expected[entry["label"]]
            assert (entry["icl_task_type"], entry["dataset_uri"]) == (task["type"], f"${{data_dir}}/{task['file']}")
            assert {key: entry.get(key) for key in task["options"]} == task["options"]
            assert entry.get("random_baseline", 0) * 100 == pytest.approx(task["random_baseline_percent"]["v2"])
            assert entry["num_fewshot"] == (task["shots"] if name != "light" else [0])
