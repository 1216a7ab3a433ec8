"""Test programs in the environment of llm-foundry: evaluations, and the interface that its users import.

One process imports llm-foundry for all tests of this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from eval_environment import ROOT, EvalServer, needs_eval_environment
from gauntlet_cases import CATEGORIES, OUTCOMES, VARIANTS
from hf_golden_check import VARIANTS as GOLDEN_VARIANTS
from hf_golden_check import assert_equivalent
from icl_model import CONFIG, EXAMPLES, Trained, choice_accuracy, log_probabilities, rows, train_small_model
from public_signatures import SIGNATURES

from open_lm.evaluate.icl.gauntlet import gauntlet_scores, parse_gauntlet

pytestmark = [pytest.mark.processes, needs_eval_environment]

EVAL, HELPERS = ROOT / "eval", ROOT / "tests" / "helpers"
FULL_RESULT = '{"from": "an evaluation of all tasks and examples"}'


@pytest.fixture(scope="module")
def server() -> Iterator[EvalServer]:
    server = EvalServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> Path:
    return shared_dir / "data" / "eval"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small_model(tmp_path_factory.mktemp("trained"), data)


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
def outputs(server: EvalServer, trained: Trained, data: Path) -> Outputs:
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
    *printed, comparison, ids = (server.run(words, processes, folder=EVAL).output for processes, words in runs)
    contents = []
    contents = []
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


def test_a_partial_evaluation_keeps_the_file_of_the_full_result(outputs: Outputs, trained: Trained) -> None:
    assert "_partial.json" in outputs.single["printed"]
    assert (trained.folder / "epoch_2_in_memory_hf_eval.json").read_text() == FULL_RESULT


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


def test_ids_outside_the_vocabulary_are_rejected_on_every_process(
    server: EvalServer, trained: Trained, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "narrow.json").write_text(json.dumps({**CONFIG, "vocab_size": 300}))
    arguments = trained.arguments("--eval-yaml", "in_memory_hf_eval.yaml", "--data-dir", str(data), "--tasks", "copa")
    arguments[1] = str(tmp_path / "narrow.json")
    for processes in (1, 2):
        result = server.run(["eval_openlm_ckpt.py", *arguments], processes, folder=EVAL, check=False)
        assert 2 in result.codes and set(result.codes) <= {2, -9}  # the first process that fails ends the other
        assert "ids up to 599" in result.errors and "below 300" in result.errors


def test_gauntlet_equals_the_callback_of_llm_foundry(server: EvalServer) -> None:
    settings = [{"categories": CATEGORIES, **variant} for variant in VARIANTS]
    tasks = [(o.task, o.shots, o.categories or {"": o.score}, o.n) for o in OUTCOMES]
    data = json.dumps({"settings": settings, "tasks": tasks})
    result = server.run([str(HELPERS / "gauntlet_callback.py")], stdin=data)
    found = json.loads(result.output.rpartition("RESULTS")[2])
    for variant, expected in zip(settings, found, strict=True):
        problems: list[str] = []
        gauntlet = parse_gauntlet(variant, "f.yaml", problems)
        assert gauntlet is not None and not problems
        scores = gauntlet_scores(gauntlet, OUTCOMES)
        ours = {**scores.categories, **scores.averages}
        assert ours.pop("incomplete") is None and scores.missing == {"incomplete": ["b 0-shot"]}
        assert ours == pytest.approx(expected) and len(expected) >= 3
        assert "incomplete: not available, missing: b 0-shot" in str(scores) and "without incomplete" in str(scores)


def test_perplexity_sets_of_dclm(server: EvalServer, shared_dir: Path) -> None:
    """get_data and evaluate_loop, as DCLM's script calls them, give the losses of the original code."""
    run = shared_dir / "compat" / "run"
    result = server.run([str(HELPERS / "dclm_perplexity.py"), str(run)])
    results = json.loads(result.output.splitlines()[-1])
    lines = (run / "logs/upstream/checkpoints/results.jsonl").read_text().splitlines()
    for actual, golden in zip(results, json.loads(lines[-1]), strict=True):
        assert actual["loss"] == pytest.approx(golden["loss"], abs=1e-4)
        assert (actual["sequences"], actual["tokens"]) == (golden["sequences"], golden["tokens"])
        assert actual["loss_tokens_lower_95"] < actual["loss"] < actual["loss_tokens_upper_95"]
        assert actual["loss_sequences_lower_95"] < actual["loss"] < actual["loss_sequences_upper_95"]


def test_golden_models_with_transformers_of_this_environment(server: EvalServer, shared_dir: Path) -> None:
    result = server.run([str(HELPERS / "hf_golden_check.py"), str(shared_dir / "compat" / "models")])
    found = json.loads(result.output.splitlines()[-1])
    assert sorted(found) == sorted(GOLDEN_VARIANTS)
    for variant in GOLDEN_VARIANTS:
        assert_equivalent(found[variant])


def test_public_names(server: EvalServer) -> None:
    names = [*SIGNATURES, "open_lm.attention.ATTN_ACTIVATIONS", "open_lm.attention.ATTN_SEQ_SCALARS"]
    names += ["open_lm.model.Params", "open_lm.utils.llm_foundry_wrapper.SimpleComposerOpenLMCausalLM"]
    names += ["open_lm.utils.make_wds_manifest.main"]
    result = server.run([str(HELPERS / "resolve_names.py"), *names])
    assert int(result.output.splitlines()[-1]) == len(names)
