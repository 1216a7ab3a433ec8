"""The evaluation data of a bundle: copied if all of them are known and unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from open_lm import storage
from open_lm.errors import DataError
from open_lm.evaluate.icl.tasks import read_settings
from open_lm.release.datasets import write_evaluation_data
from open_lm.release.privacy import Redactor
from open_lm.release.run_facts import Checkpoint, RunFacts

ROW = {"query": "A list", "gold": 0, "choices": ["of names", "meant"]}


def write_tasks(folder: Path, query: str) -> Path:
    """Write a task file and the YAML file that names it."""
    folder.mkdir()
    (folder / "lists.jsonl").write_text(json.dumps({**ROW, "query": query}) + "\n")
    path = folder / f"{folder.name}.yaml"
    path.write_text(
        f"icl_tasks:\n- {{label: lists, dataset_uri: {folder}/lists.jsonl, num_fewshot: [0], "
        "icl_task_type: multiple_choice}\n"
    )
    return path


def write_result(folder: Path, name: str, **content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"schema": "open_lm.icl/1", **content}))
    return path


def test_data_of_separate_evaluations_are_copied_or_reported(tmp_path: Path) -> None:
    facts = RunFacts(tmp_path, {"name": "run"}, (Checkpoint("epoch_1.pt", 1, 1, 1, True),))
    yamls = [write_tasks(tmp_path / name, f"{name} list") for name in ("first", "second")]
    results = []
    for path in yamls:
        (task,) = read_settings([str(path)]).tasks
        content = {"eval_yaml": [str(path)], "task_data": [task.data_record()]}
        results.append(write_result(tmp_path, f"{path.stem}.json", **content))

    def write(bundle: str, *files: Path) -> list[str]:
        return write_evaluation_data(facts, files, tmp_path / bundle, Redactor(tmp_path), storage.copy)

    assert write("complete", *results) == []
    tasks = tmp_path / "complete/evaluation/data/tasks"
    index = json.loads((tasks / "tasks.json").read_text())
    assert [item["evaluation"] for item in index] == ["evals/first.json", "evals/second.json"]
    for item, name in zip(index, ("first", "second"), strict=True):
        content = (tasks / item["file"]).read_bytes()
        assert json.loads(content)["query"] == f"{name} list"
        assert item["sha256"] == hashlib.sha256(content).hexdigest()
    assert {path.name for path in tasks.glob("*.yaml")} == {"first.yaml", "second.yaml"}

    old = write_result(tmp_path, "old.json", eval_yaml=[])
    hub = write_result(tmp_path, "hub.json", task_data=[{"task": "a", "data": "hf://a/b", "sha256": None}])
    (tmp_path / "first/lists.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "second/lists.jsonl").unlink()
    problems = write("incomplete", *results, old, hub)
    reasons = ("is not the file that was evaluated", "lists.jsonl", "does not record them", "on the hub")
    assert len(problems) == len(reasons)
    assert all(reason in problem for reason, problem in zip(reasons, problems, strict=True))
    old.write_text("{")
    with pytest.raises(DataError, match=r"old\.json: not JSON"):
        write("damaged", old)
