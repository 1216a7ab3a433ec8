"""Test eval/eval_openlm_ckpt.py: compare the scores of a small trained checkpoint with an independent computation."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from eval_environment import EVAL_PYTHON, needs_eval_environment

from open_lm.evaluate import compare
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Transformer, create_model, create_params

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "eval"
EXAMPLES = 23  # odd, so that two processes get different numbers of examples
CONFIG = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 160, "vocab_size": 640}
CONFIG |= {"post_embed_norm": False, "weight_tying": False}
FULL_RESULT = '{"from": "an evaluation of all tasks and examples"}'

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Trained:
    """A checkpoint of a small model with its tokenizer."""

    folder: Path
    model: Transformer
    tokenizer: Any

    def arguments(self, *extra: str) -> list[str]:
        return [
            *("--model-config", str(self.folder / "small.json"), "--checkpoint", str(self.folder / "epoch_2.pt")),
            *("--tokenizer", str(self.folder / "tokenizer.json"), "--device", "cpu", *extra),
        ]


@dataclass
class Shape:
    model: str


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    with open(data / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(EXAMPLES), file, strict=False)]


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> Path:
    return shared_dir / "data" / "eval"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a model that memorizes its lambada passages, so that its scores differ from random guessing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("trained")
    texts = [f"{row['context']} {row['continuation']}" for row in rows(data, "lambada_openai")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "small.json").write_text(json.dumps(CONFIG))

    model = create_model(Shape(str(folder / "small.json")))
    model.reset_parameters(seed=0)
    length = 129
    batch = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[-length:]
        batch[row, : len(ids)] = torch.tensor(ids)
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    for _ in range(22):
        loss, tokens = token_loss(model(batch[:, :-1])[0], targets)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 2, "name": "small", "state_dict": state}, folder / "epoch_2.pt")
    return Trained(folder, model.eval(), tokenizer)


def evaluate(arguments: Sequence[str], processes: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would: in eval/, with the Python of this environment."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launcher if processes > 1 else []), "eval_openlm_ckpt.py", *arguments]
    env = {**ENV, **variables}
    return subprocess.run(command, cwd=EVAL, env=env, capture_output=True, text=True, timeout=500, check=False)


def log_probabilities(trained: Trained, context: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the answer's token ids (T,) and the model's log-probabilities (T,V) there, without padding."""
    ids = trained.tokenizer.encode(answer).ids
    prompt = trained.tokenizer.encode(context).ids[-(trained.model.seq_len - len(ids)) :]
    with torch.no_grad():
        logits = trained.model(torch.tensor([prompt + ids]))[0][0]
    return torch.tensor(ids), F.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


def choice_accuracy(trained: Trained, questions: list[tuple[list[tuple[str, str]], int]]) -> float:
    """Return the share of questions whose correct (context, answer) has the highest mean log-probability per token."""
    correct = 0
    for pairs, gold in questions:
        means = []
        for context, answer in pairs:
            ids, log_probs = log_probabilities(trained, context, answer)
            means.append(log_probs.gather(1, ids[:, None]).mean())
        correct += int(torch.stack(means).argmax()) == gold
    return correct / len(questions)


@dataclass
class Outputs:
    """The JSON files of a run with in_memory_hf_eval.yaml and of a run of two processes with other tasks.

    `native` and `native_two` are those of the native engine. `agreement` and `equal_ids` are outputs of
    check_icl_agreement.py, the second one of token ids only.
    """

    single: dict[str, Any]
    two: dict[str, Any]
    native: dict[str, Any]
    native_two: dict[str, Any]
    agreement: str
    equal_ids: str


@pytest.fixture(scope="module")
def outputs(trained: Trained, data: Path) -> Outputs:
    """Run the evaluations with both engines, and add to each JSON its printed output and its tasks by name."""
    tasks = ("--tasks", "copa", "lambada_openai", "winograd", "--max-examples", str(EXAMPLES))
    single = trained.arguments("--eval-yaml", "in_memory_hf_eval.yaml", "--data-dir", str(data), *tasks)
    (trained.folder / "two.yaml").write_text(yaml.safe_dump(tasks_of_two_processes(data)))
    two = trained.arguments("--eval-yaml", str(trained.folder / "two.yaml"), "--max-examples", str(EXAMPLES))
    (trained.folder / "epoch_2_in_memory_hf_eval.json").write_text(FULL_RESULT)
    tokenizers = [str(data.parent / "tokenizers" / name) for name in ("gpt-neox-20b.json", "llama2.model")]
    check = ["../scripts/checks/check_icl_agreement.py", "--data-dir", str(data)]
    agreement = [*check, "--max-examples", "2", "--max-generated", "1", "--shots", "0", "3", "--tokenizer", *tokenizers]
    equal_ids = [*check, "--max-examples", "100", "--ids-only", "--shots", "3", "--tokenizer", tokenizers[0]]
    program, native = "eval_openlm_ckpt.py", ["--engine", "native"]
    runs: list[tuple[int, list[str]]] = [
        (1, [program, *single]),
        (2, [program, *two, "--output", str(trained.folder / "two.json")]),
        (1, [program, *native, *single]),
        (2, [program, *native, *two]),
        (1, agreement),
        (1, equal_ids),
    ]
    command = [EVAL_PYTHON, str(ROOT / "tests/helpers/icl_runs.py"), json.dumps(runs)]
    result = subprocess.run(command, cwd=EVAL, env=ENV, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    contents = []
    *printed, comparison, ids = json.loads(result.stdout.splitlines()[-1])
    names = ("epoch_2_in_memory_hf_eval_partial.json", "two.json")
    names += ("evals/epoch_2_in_memory_hf_eval_partial.json", "evals/epoch_2_two_partial.json")
    for text, name in zip(printed, names, strict=True):
        content = json.loads((trained.folder / name).read_text())
        content["printed"] = text
        content["by_name"] = {task["task"]: task for task in content["tasks"]}
        contents.append(content)
    return Outputs(*contents, comparison, ids)


@pytest.fixture
def results(outputs: Outputs) -> dict[str, Any]:
    return outputs.single


def tasks_of_two_processes(data: Path) -> dict[str, Any]:
    """Return the content of a YAML file with every type of task that in_memory_hf_eval.yaml uses."""
    generation = {"icl_task_type": "generation_task_with_answers", "num_fewshot": [0]}
    choice = {"icl_task_type": "multiple_choice", "num_fewshot": [0]}
    tasks = [
        {"label": "copa", "dataset_uri": "${data_dir}/copa.jsonl", **choice},
        {"label": "winograd", "dataset_uri": "${data_dir}/winograd_wsc.jsonl", **choice, "icl_task_type": "schema"},
        {"label": "boolq", "dataset_uri": "${data_dir}/boolq.jsonl", **choice, "random_baseline": 0.62},
        {"label": "hellaswag", "dataset_uri": "${data_dir}/hellaswag.jsonl", **choice, "max_seq_len": 8},
        {"label": "triviaqa", "dataset_uri": "${data_dir}/triviaqa_sm_sub.jsonl", **generation},
    ]
    return {"data_dir": str(data), "device_eval_batch_size": 4, "icl_tasks": tasks}


@needs_eval_environment
def test_scores_match_an_independent_computation(results: dict[str, Any], trained: Trained, data: Path) -> None:
    copa = [([(row["query"], f" {choice}") for choice in row["choices"]], row["gold"]) for row in rows(data, "copa")]
    winograd = [
        ([(context, f" {row['continuation']}") for context in row["context_options"]], row["gold"])
        for row in rows(data, "winograd_wsc")
    ]
    exact = 0
    for row in rows(data, "lambada_openai"):
        ids, log_probs = log_probabilities(trained, row["context"], f" {row['continuation']}")
        exact += bool((log_probs.argmax(-1) == ids).all())
    assert exact > EXAMPLES / 3, "the model has not memorized its passages; the comparison would be weak"
    expected = {
        "copa": choice_accuracy(trained, copa),
        "winograd": choice_accuracy(trained, winograd),
        "lambada_openai": exact / EXAMPLES,
    }
    assert {name: task["score"] for name, task in results["by_name"].items()} == pytest.approx(expected, abs=1e-6)


@needs_eval_environment
def test_table_and_json_contain_baselines_counts_and_averages(results: dict[str, Any]) -> None:
    found = {name: (task["baseline"], task["n"], task["shots"]) for name, task in results["by_name"].items()}
    assert found == {"copa": (0.5, EXAMPLES, 0), "winograd": (0.5, EXAMPLES, 0), "lambada_openai": (0.0, EXAMPLES, 0)}
    scores = {name: task["score"] for name, task in results["by_name"].items()}
    assert results["average"] == pytest.approx(sum(scores.values()) / 3)
    centered = [2 * scores["copa"] - 1, 2 * scores["winograd"] - 1, scores["lambada_openai"]]
    assert results["centered_average"] == pytest.approx(sum(centered) / 3)
    lines = [line.split() for line in results["printed"].splitlines()]
    copa = next(line for line in lines if line[:2] == ["copa", "0"])
    lower, upper = results["by_name"]["copa"]["interval"]
    interval = [f"{lower:.4f}", "to", f"{upper:.4f}"]
    assert copa == ["copa", "0", "accuracy", f"{scores['copa']:.4f}", "0.5000", str(EXAMPLES), *interval]
    assert 0 <= lower < scores["copa"] < upper <= 1
    assert ["average", f"{results['average']:.4f}"] in lines


@needs_eval_environment
def test_a_partial_evaluation_keeps_the_file_of_the_full_result(outputs: Outputs, trained: Trained) -> None:
    assert "_partial.json" in outputs.single["printed"]
    assert (trained.folder / "epoch_2_in_memory_hf_eval.json").read_text() == FULL_RESULT


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
def test_two_processes_get_equal_scores_and_report_truncation(outputs: Outputs) -> None:
    found, printed = outputs.two["by_name"], outputs.two["printed"]
    assert outputs.two["processes"] == 2
    for name in ("copa", "winograd"):
        assert found[name]["n"] == EXAMPLES
        assert found[name]["score"] == pytest.approx(outputs.single["by_name"][name]["score"], abs=1e-6)
    assert found["boolq"]["baseline"] == 0.62
    assert 0 < found["boolq"]["truncated"] <= found["boolq"]["sequences"] == 2 * EXAMPLES
    assert found["hellaswag"]["score"] is None and "no context fits" in found["hellaswag"]["problem"]
    assert found["triviaqa"]["n"] == EXAMPLES and found["triviaqa"]["metric"].endswith("ExactMatchAccuracy")
    assert "boolq 0-shot" in printed and "truncated on the left" in printed
    assert printed.count("hellaswag 0-shot did not run") == 1


@needs_eval_environment
def test_both_engines_give_the_same_results(outputs: Outputs) -> None:
    for ours, theirs in ((outputs.native, outputs.single), (outputs.native_two, outputs.two)):
        assert ours["engine"] == "native" and theirs["engine"] == "llm-foundry"
        assert ours["by_name"].keys() == theirs["by_name"].keys()
        for name, task in theirs["by_name"].items():
            found = ours["by_name"][name]
            for key in ("metric", "baseline", "n", "truncated", "sequences", "problem", "interval", "shots", "kind"):
                assert found[key] == task[key], (name, key)
            for key in ("score", "centered"):
                assert found[key] == (None if task[key] is None else pytest.approx(task[key], abs=1e-6)), (name, key)
            assert found["metrics"] == pytest.approx(task["metrics"], abs=1e-6), name


@needs_eval_environment
def test_prompts_and_answers_agree_with_llm_foundry_in_all_task_files(outputs: Outputs, data: Path) -> None:
    lines = [line for line in outputs.agreement.splitlines() if "-shot " in line or line.startswith("total: ")]
    files = len(list(data.glob("*.jsonl")))
    assert len(lines) >= 4 * files + 1  # two tokenizers, zero- and few-shot; a file may have several tasks
    for line in lines:
        assert "0 with other ids, 0 other answers" in line and " 0 examples" not in line
    assert int(lines[-1].split()[1]) > 6 * files
    lines = [line for line in outputs.equal_ids.splitlines() if "-shot " in line or line.startswith("total: ")]
    assert len(lines) >= files + 1 and all(" 0 with other ids" in line for line in lines)
    assert int(lines[-1].split()[1]) > 80 * files  # some files have fewer than 100 examples


@needs_eval_environment
def test_missing_data_is_reported_together_before_the_model_is_loaded(tmp_path: Path) -> None:
    arguments = ["--eval-yaml", "in_memory_hf_eval.yaml", "mmlu.yaml", "--data-dir", str(tmp_path)]
    arguments += ["--model", "open_lm_11m", "--checkpoint", str(tmp_path / "none.pt")]
    result = evaluate(arguments)
    assert result.returncode == 2
    for name in ("copa", "winograd_wsc", "triviaqa_sm_sub", "mmlu"):
        assert str(tmp_path / f"{name}.jsonl") in result.stderr
    assert "open_lm.evaluate.icl.download" in result.stderr and "Traceback" not in result.stderr
    assert "none.pt" not in result.stderr


@needs_eval_environment
def test_all_problems_of_the_yaml_files_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    task = {"label": "a", "dataset_uri": "a.jsonl", "icl_task_type": "chess", "num_fewshot": 3}
    file.write_text(yaml.safe_dump({"precision": "fp7", "device_eval_batch_size": "many", "icl_tasks": [task, {}]}))
    arguments = ["--eval-yaml", str(file), str(tmp_path / "absent.yaml"), "--tasks", "b"]
    result = evaluate([*arguments, "--model", "open_lm_11m", "--checkpoint", "none.pt"])
    assert result.returncode == 2
    for words in ("'chess'", "num_fewshot is 3", "no label", "fp7", "'many'", "absent.yaml: no such file", "--tasks b"):
        assert words in result.stderr


@needs_eval_environment
def test_tokenizer_with_ids_outside_the_vocabulary_is_rejected(trained: Trained, data: Path, tmp_path: Path) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    arguments = trained.arguments("--eval-yaml", "in_memory_hf_eval.yaml", "--data-dir", str(data), "--tasks", "copa")
    arguments[1] = str(tmp_path / "narrow.json")
    for processes in (1, 2):  # the ranks of torchrun restart in the evaluation environment too
        result = evaluate(arguments, processes)
        assert result.returncode == (2 if processes == 1 else 1)
        assert "ids up to 599" in result.stderr and "below 300" in result.stderr


def test_missing_environment_is_reported_with_its_install_command(tmp_path: Path) -> None:
    missing = str(tmp_path / "bin" / "python")
    result = evaluate(["--checkpoint", "x.pt"], OPEN_LM_EVAL_PYTHON=missing)
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
    trained: Trained, data: Path, tmp_path: Path
) -> None:
    """The architecture comes from the run's params.txt."""
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
    result = evaluate([*arguments, "lambada_openai"], OPEN_LM_EVAL_PYTHON=str(tmp_path / "missing"))
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
