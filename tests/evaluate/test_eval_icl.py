"""Test eval/eval_openlm_ckpt.py: flags, errors, and the native engine on the checkpoints of a run.

test_eval_environment.py tests evaluations with llm-foundry.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from eval_environment import ROOT, needs_eval_environment
from icl_model import EXAMPLES, Shape, choice_accuracy, log_probabilities, rows, train_small_model

from open_lm.evaluate import compare
from open_lm.model.transformer import create_params

pytestmark = pytest.mark.processes

EVAL = ROOT / "eval"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def evaluate(
    python: str, arguments: Sequence[str], processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would: in eval/, with the Python of this environment."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [python, *(launcher if processes > 1 else []), "eval_openlm_ckpt.py", *arguments]
    env = {**ENV, **variables}
    return subprocess.run(command, cwd=EVAL, env=env, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "epoch_2_a_b.json"),
        (["--tasks", "copa"], "epoch_2_a_b_partial.json"),
        (["--max-examples", "3"], "epoch_2_a_b_partial.json"),
        (["--tasks", "copa", "--output", "given.json"], "given.json"),
    ],
)
def test_the_default_output_of_a_partial_evaluation_has_a_name_of_its_own(flags: list[str], name: str) -> None:
    program = importlib.import_module("open_lm.evaluate.command")
    yaml_files = ["--eval-yaml", "x/a.yaml", "b.yaml"]
    args = program.build_parser("llm-foundry").parse_args(
        ["--checkpoint", "epoch_2.pt", *yaml_files, "--model", "m", *flags]
    )
    program.check_arguments(args)
    assert args.output == name


@needs_eval_environment
def test_missing_data_is_reported_together_before_the_model_is_loaded(tmp_path: Path, forked_python: str) -> None:
    arguments = ["--eval-yaml", "in_memory_hf_eval.yaml", "mmlu.yaml", "--data-dir", str(tmp_path)]
    arguments += ["--model", "open_lm_11m", "--checkpoint", str(tmp_path / "none.pt")]
    for processes in (1, 2):  # the ranks of torchrun restart in the evaluation environment too
        result = evaluate(forked_python, arguments, processes)
        assert result.returncode == (2 if processes == 1 else 1)
        for name in ("copa", "winograd_wsc", "triviaqa_sm_sub", "mmlu"):
            assert str(tmp_path / f"{name}.jsonl") in result.stderr
        assert "open_lm.evaluate.icl.download" in result.stderr and "none.pt" not in result.stderr
        assert processes == 2 or "Traceback" not in result.stderr  # torchrun prints its own


@needs_eval_environment
def test_all_problems_of_the_yaml_files_are_reported_together(tmp_path: Path, forked_python: str) -> None:
    file = tmp_path / "wrong.yaml"
    task = {"label": "a", "dataset_uri": "a.jsonl", "icl_task_type": "chess", "num_fewshot": 3}
    file.write_text(yaml.safe_dump({"precision": "fp7", "device_eval_batch_size": "many", "icl_tasks": [task, {}]}))
    arguments = ["--eval-yaml", str(file), str(tmp_path / "absent.yaml"), "--tasks", "b"]
    result = evaluate(forked_python, [*arguments, "--model", "open_lm_11m", "--checkpoint", "none.pt"])
    assert result.returncode == 2
    for words in ("'chess'", "num_fewshot is 3", "no label", "fp7", "'many'", "absent.yaml: no such file", "--tasks b"):
        assert words in result.stderr


def test_missing_environment_is_reported_with_its_install_command(tmp_path: Path, forked_python: str) -> None:
    missing = str(tmp_path / "bin" / "python")
    result = evaluate(forked_python, ["--checkpoint", "x.pt"], OPEN_LM_EVAL_PYTHON=missing)
    assert result.returncode == 2
    assert "make install-eval" in result.stderr and missing in result.stderr


def test_yaml_files_cover_the_tasks_of_the_result_tables() -> None:
    tasks = {}
    for name in ("in_memory_hf_eval.yaml", "mmlu.yaml"):
        content = yaml.safe_load((EVAL / name).read_text())
        assert content["data_dir"]
        for task in content["icl_tasks"]:
            assert task["dataset_uri"].startswith("${data_dir}/")
            tasks[task["label"]] = task["num_fewshot"]
    eleven = "arc_challenge arc_easy boolq copa hellaswag lambada_openai piqa triviaqa winogrande winograd jeopardy"
    assert tasks == {**{name: [0] for name in eleven.split()}, "mmlu": [0, 5]}


def test_both_paths_of_the_model_configurations_are_equal() -> None:
    paths = [ROOT / "model_configs" / "open_lm_11m.json", ROOT / "open_lm" / "model_configs" / "open_lm_11m.json"]
    shapes = [create_params(Shape(str(path))) for path in paths]
    assert shapes[0].dim == shapes[1].dim == 96


def test_the_native_engine_evaluates_the_checkpoints_of_a_run_without_another_environment(
    shared_dir: Path, tmp_path: Path, forked_python: str
) -> None:
    """The architecture comes from the run's params.txt."""
    data = shared_dir / "data" / "eval"
    trained = train_small_model(tmp_path, data)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    content = torch.load(trained.folder / "epoch_2.pt", weights_only=True)
    for epoch in (1, 2, 3):
        scale = 1.0 if epoch == 3 else 0.5
        state = {name: value * scale for name, value in content["state_dict"].items()}
        progress = {"epoch": epoch, "step": 10 * epoch, "samples_seen": 40 * epoch}
        torch.save({**content, **progress, "state_dict": state}, checkpoints / f"epoch_{epoch}.pt")
    (tmp_path / "run" / "params.txt").write_text(f"model: {trained.folder / 'small.json'}\n")
    arguments = ["--engine", "native", "--checkpoint", str(tmp_path / "run"), "--every", "2", "--device", "cpu"]
    arguments += ["--tokenizer", str(trained.folder / "tokenizer.json"), "--data-dir", str(data)]
    arguments += ["--eval-yaml", "in_memory_hf_eval.yaml", "--max-examples", str(EXAMPLES), "--tasks", "copa"]
    result = evaluate(forked_python, [*arguments, "lambada_openai"], OPEN_LM_EVAL_PYTHON=str(tmp_path / "missing"))
    assert result.returncode == 0, result.stderr
    written = sorted(path.name for path in (checkpoints / "evals").glob("*.json"))
    assert written == [f"epoch_{epoch}_in_memory_hf_eval_partial.json" for epoch in (1, 3)]
    last = json.loads((checkpoints / "evals" / written[-1]).read_text())
    for item in last["task_data"]:
        assert item["sha256"] == hashlib.sha256(Path(item["data"]).read_bytes()).hexdigest()
    assert {item["task"] for item in last["task_data"]} == {item["task"] for item in last["tasks"]}
    scores = {task["task"]: task["score"] for task in last["tasks"]}
    exact = 0
    for row in rows(data, "lambada_openai"):
        ids, log_probs = log_probabilities(trained, row["context"], f" {row['continuation']}")
        exact += bool((log_probs.argmax(-1) == ids).all())
    copa = [([(row["query"], f" {choice}") for choice in row["choices"]], row["gold"]) for row in rows(data, "copa")]
    assert scores == pytest.approx({"copa": choice_accuracy(trained, copa), "lambada_openai": exact / EXAMPLES})
    assert last["tokenizer"] == f"{tmp_path.name}/tokenizer.json"  # without the folders of this machine
    assert last["schema"] == "open_lm.icl/1" and last["checkpoint"].endswith("epoch_3.pt")
    for task in last["tasks"]:
        lines = Path(task["examples_file"]).read_text().splitlines()
        assert len(lines) == EXAMPLES + 1 and json.loads(lines[0])["weights"] == last["weights_sha256"]
    assert (last["step"], last["tokens"]) == (30, 120 * 160)
    (report,) = compare.main([str(checkpoints / "evals" / name) for name in written])
    assert [(row.scores[1], row.difference.test) for row in report.tasks] == [(scores[t], "McNemar") for t in scores]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--every", "2"], "--every needs --engine native"),
        (["--checkpoint", "a.pt", "b.pt"], "found 2 checkpoints, expected one"),
        (["--engine", "native", "--checkpoint", "a", "b", "--output", "x.json"], "--output is one file"),
        (["--engine", "native", "--every", "0"], "expected at least 1"),
    ],
)
def test_contradicting_flags_are_reported(flags: list[str], words: str) -> None:
    program = importlib.import_module("open_lm.evaluate.command")
    args = program.build_parser("llm-foundry").parse_args(
        ["--checkpoint", "c.pt", "--eval-yaml", "a.yaml", "--model", "m", *flags]
    )
    with pytest.raises(ValueError, match=words):
        program.check_arguments(args)
