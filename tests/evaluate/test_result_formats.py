"""Test results in the formats of DCLM and of Hugging Face's model cards."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_helpers import small_model

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.export import main
from open_lm.evaluate.icl.aggregates import aggregate_members
from open_lm.evaluate.icl.metrics import Outcome
from open_lm.evaluate.icl.report import write_json
from open_lm.evaluate.result_formats import full_results
from open_lm.hf.exporting import export_model, keys_of

ACCURACY = "InContextLearningMultipleChoiceAccuracy"
OTHER = [
    Outcome("own_task", 3, "multiple_choice", ACCURACY, 0.75, n=4),
    Outcome("arc_easy", 0, "multiple_choice", ACCURACY, 0.9, n=4),
    Outcome("failed", 0, "multiple_choice", problem="the answers are too long"),
    Outcome("piqa", 10, "lm-eval/multiple_choice", "acc", 0.9, n=4),
]


def write(path: Path, outcomes: Sequence[Outcome], weights: str = "abc") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"engine": "native", "checkpoint": "c.pt", "model": "open_lm_1b", "weights_sha256": weights}
    write_json(str(path), outcomes, facts)
    return str(path)


def dclm_outcomes() -> list[Outcome]:
    """Return an outcome with the score 0.6 for each task of DCLM."""
    return [Outcome(label, shots, "", ACCURACY, 0.6) for label, shots in aggregate_members("extended")]


def test_dclm_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores are under the labels, and the aggregates under DCLM's names; other tasks are listed."""
    complete = write(tmp_path / "core.json", dclm_outcomes())
    other = write(tmp_path / "other.json", OTHER)
    main([complete, other, "--dclm", str(tmp_path / "form.json"), "--name", "heavy", "--model-uuid", "u-1"])
    form: dict[str, Any] = json.loads((tmp_path / "form.json").read_text())
    assert (form["name"], form["model"], form["model_uuid"]) == ("heavy", "open_lm_1b", "u-1")
    assert re.fullmatch(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d", form["creation_date"])
    icl = form["eval_metrics"]["icl"]
    assert len(icl) == 54 and icl["arc_easy"] == 0.6 and icl["own_task"] == 0.75
    core = [(0.6 - base) / (1 - base) for base in aggregate_members("core").values()]
    extended = [(0.6 - base) / (1 - base) for base in aggregate_members("extended").values()]
    assert form["Core"] == form["Core_v2"] == form["low_variance_datasets_centered"]
    assert form["Core"] == pytest.approx(sum(core) / 22)
    assert form["Extended"] == form["aggregated_centered_results"] == pytest.approx(sum(extended) / 53)
    assert form["aggregated_results"] == pytest.approx(0.6) and form["eval_version"] == "v2"
    assert form["Core_v1"] != form["Core_v2"] and form["missing tasks"] == "[]"
    output = capsys.readouterr().out
    assert "54 tasks, 3 left out" in output and "arc_easy 0-shot: DCLM's task has 10 shots" in output
    assert "piqa 10-shot: it is a task of lm-eval" in output and "failed 0-shot: it has no score" in output


def test_dclm_form_with_missing_tasks(tmp_path: Path) -> None:
    some = write(tmp_path / "some.json", dclm_outcomes()[:3])
    main([some, "--dclm", str(tmp_path / "form.json")])
    form = json.loads((tmp_path / "form.json").read_text())
    assert len(ast.literal_eval(form["missing tasks"])) == 50
    assert form["Extended"].startswith("N/A due to missing tasks: ['") and form["Core"].startswith("N/A")


def test_model_card(tmp_path: Path) -> None:
    """The front matter keeps its fields and gets the scores in the form that the hub reads."""
    from huggingface_hub import ModelCard

    results = write(tmp_path / "other.json", OTHER)
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: transformers\n---\n\n# A model\n\n---\n", encoding="utf-8")
    for _ in range(2):  # the second one replaces the first
        main([results, "--model-card", str(card), "--name", "mine"])
        loaded = ModelCard.load(card)
        assert (loaded.data.library_name, loaded.data.model_name) == ("transformers", "mine")
        entries = loaded.data.eval_results or []
        assert [(entry.dataset_type, entry.metric_value) for entry in entries] == [
            ("own_task", 0.75), ("arc_easy", 0.9), ("piqa", 0.9),
        ]  # fmt: skip
        assert entries[0].metric_name == "accuracy, 3-shot (native)"
        assert loaded.text.strip() == "# A model\n\n---"


def test_an_export_has_the_scores_of_complete_evaluations(tmp_path: Path) -> None:
    import torch

    model = small_model()
    (tmp_path / "model.json").write_text(json.dumps(keys_of(model.params)))
    torch.save({"epoch": 1, "name": "small", "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
    write(tmp_path / "evals" / "epoch_1_core.json", OTHER[:1])
    write(tmp_path / "evals" / "epoch_1_core_partial.json", OTHER[1:2])
    write(tmp_path / "evals" / "epoch_10_core.json", OTHER[1:2])
    assert full_results(str(tmp_path / "epoch_1.pt")) == [str(tmp_path / "evals" / "epoch_1_core.json")]
    export_model(str(tmp_path / "epoch_1.pt"), str(tmp_path / "exported"), model=str(tmp_path / "model.json"))
    _, front, _ = (tmp_path / "exported" / "README.md").read_text().split("---\n", 2)
    (index,) = yaml.safe_load(front)["model-index"]
    assert index["name"] == "exported" and [r["dataset"]["name"] for r in index["results"]] == ["own_task"]


def test_unusable_results_are_errors(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", OTHER), write(tmp_path / "b.json", OTHER, weights="def")
    with pytest.raises(DataError, match=r"results of different weights(.|\n)*a.json: weights abc"):
        main([first, second, "--dclm", str(tmp_path / "form.json")])
    with pytest.raises(ConfigError, match="no output: pass --dclm FILE or --model-card README"):
        main([first])
    with pytest.raises(ConfigError, match="--model-uuid has no effect without --dclm"):
        main([first, "--model-card", "x", "--model-uuid", "u"])
