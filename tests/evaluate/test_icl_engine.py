"""The native engine for in-context learning: scores, packing, ranks, stored results, options and intervals."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import icl_worker
import numpy as np
import pytest
import torch
import yaml
from icl_worker import byte_tokenizer, new_model, write_tasks
from parity import on_ranks

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, Outcome, ResultStore, Task, read_settings
from open_lm.evaluate.icl.aggregates import aggregate_score, dclm_tasks
from open_lm.evaluate.icl.metrics import accuracy_interval, binomial_interval, normalize_answer
from open_lm.evaluate.icl.packing import form_batches, pack, pack_example
from open_lm.evaluate.icl.prompts import Choice, Example, Prompts, PromptTooLong, build_prompts, few_shot_indices
from open_lm.evaluate.icl.scoring import BatchLayout, score_units
from open_lm.evaluate.icl.store import stored_facts, weights_hash
from open_lm.evaluate.icl.task_types import TASK_TYPES, parse_options
from open_lm.kernels.native import evaluation
from open_lm.kernels.token_scores import token_scores
from open_lm.model.transformer import Transformer

CPU = torch.device("cpu")
CUSTOM = {"attn_name": "custom_attn", "attn_activation": "softmax", "attn_seq_scalar": "none"}
MODELS = {
    "plain": {},
    "position_none": {"positional_embedding_type": "none"},
    "grouped_heads": {"n_kv_heads": 2},
    "window": {"attn_window": 9},
    "custom_attention": {**CUSTOM, "attn_seq_scalar_alpha": 0.0},
    "soft_cap_and_padding": {"logit_soft_cap": 3.0, "unpadded_vocab_size": 280},
}


def ids(length: int, generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1, 257, size=length).astype(np.int32)


def examples() -> list[Example]:
    """Return examples with shared contexts of different lengths, equal choices, a prompt that continues another, and no
    shared token at all."""
    generator = np.random.default_rng(0)
    result = []
    for index, (context, lengths) in enumerate(
        [(3, (1, 1)), (70, (5, 1, 9)), (20, (4, 4)), (9, (2,)), (12, (3, 1, 3)), (8, (1, 4))]
    ):
        shared = ids(context, generator)
        choices = [Choice(shared, ids(length, generator)) for length in lengths]
        if index == 2:
            choices.append(choices[0])
        result.append(Example(index, "", tuple(choices)))
    beginning = result[1].choices[0].context[:40]  # shared with another example
    result.append(Example(6, "", (Choice(np.concatenate((beginning, ids(5, generator))), ids(3, generator)),)))
    result.append(
        Example(7, "", (Choice(ids(4, generator), ids(2, generator)), Choice(ids(6, generator), ids(3, generator))))
    )
    return result


def reference(model: Transformer, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of a continuation and whether its tokens are the most likely ones, from a separate
    prompt and in the dtype of the model."""
    tokens = torch.from_numpy(np.concatenate((choice.context, choice.continuation))).long()
    with torch.no_grad():
        logits = model(tokens[None, :-1])[0][0, len(choice.context) - 1 :]
    targets = tokens[len(choice.context) :]
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_packed_batches_give_the_scores_of_separate_prompts(
    name: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(**MODELS[name])
    exact = deepcopy(model).double()
    layout = BatchLayout.of_model(model, CPU)
    assert layout == BatchLayout(*{"custom_attention": (None, False), "window": (32, False)}.get(name, (32, True)))
    for is_flat, is_native in {(layout.is_flat, True), (layout.is_flat, False), (False, True)}:
        if not is_native:
            monkeypatch.setattr(evaluation, "_is_available", lambda: False)
        units = [pack_example(example, layout.width) for example in examples()]
        assert any(unit.is_packed for unit in units) is (layout.width is not None)
        batches = form_batches(units, max_tokens, padded=not is_flat)
        assert sorted(unit.example.index for batch in batches for unit in batch) == list(range(8))
        for batch in batches:
            with torch.no_grad():
                scores = list(score_units(model, batch, BatchLayout(layout.width, is_flat), CPU, torch.no_grad))
            for unit, score in zip(batch, scores, strict=True):
                assert len(score.log_probs) == len({c.continuation.tobytes() for c in unit.example.choices})
                for index in score.log_probs:
                    expected, is_greedy = reference(exact, unit.example.choices[index])
                    np.testing.assert_allclose(score.log_probs[index], expected.numpy(), atol=1e-4)
                    assert score.is_greedy[index].tolist() == is_greedy.tolist()
        monkeypatch.undo()


def test_shared_tokens_are_computed_once() -> None:
    shared = np.arange(1, 41, dtype=np.int32)
    choices = tuple(Choice(shared, np.array(tail, dtype=np.int32)) for tail in ([1, 2, 3], [1, 2, 4], [7], [7]))
    unit = pack_example(Example(0, "", choices), width=32)
    # The prefix, and [1, 2] of the first two choices: their last tokens and single tokens are only predicted.
    assert unit.num_tokens == 40 + 2
    assert pack_example(Example(0, "", choices[2:]), width=32).num_tokens == 40
    other = Example(1, "", (Choice(shared[:10], np.array([9, 9], dtype=np.int32)),))
    sequence = pack([*unit.prompts, *pack_example(other, width=32).prompts])
    assert len(sequence.ids) == 43
    seen = {piece.start: piece.keys for piece in sequence.pieces}
    assert sorted(seen.values()) == [11, 42]
    # [1, 2, 3] and [1, 2, 4] and [7] are predicted by three tokens; [9, 9] by two others.
    assert len(sequence.targets) == 9 and len(set(sequence.sources.tolist())) == 5


def test_units_with_equal_beginnings_are_in_one_batch() -> None:
    generator = np.random.default_rng(1)
    starts = [ids(30, generator) for _ in range(4)]
    members = [
        Example(index, "", (Choice(np.concatenate((starts[index % 4], ids(3, generator))), ids(2, generator)),))
        for index in range(16)
    ]
    units = [pack_example(example, 32) for example in members]
    batches = form_batches(units, 4 * 34, padded=False)
    assert [len({unit.example.index % 4 for unit in batch}) for batch in batches] == [1] * 4
    assert [len(pack(unit.prompts[0] for unit in batch).ids) for batch in batches] == [30 + 4 * 4] * 4


@pytest.mark.parametrize("is_native", [True, False])
def test_scores_of_tokens_do_not_underflow_and_resolve_ties(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(evaluation, "_is_available", lambda: False)
    hidden, weight = torch.eye(3, 4) * 200, torch.zeros(5, 4)
    weight[1, 0] = weight[2, 0] = 1  # tokens 1 and 2 are equally likely after the first state
    weight[0, 1] = -1
    scores = token_scores(hidden, weight, torch.tensor([2, 0, 3]))
    assert scores.is_greedy.tolist() == [False, False, False]
    assert scores.log_probs.tolist() == pytest.approx([-0.693147, -201.386294, -1.609438], rel=1e-5)
    assert token_scores(hidden, weight, torch.tensor([1, 1, 0])).is_greedy.tolist() == [True, True, True]
    several = token_scores(hidden, weight, torch.tensor([2, 1, 0, 3]), counts=[2, 0, 2])
    assert several.log_probs.tolist() == pytest.approx([-0.693147, -0.693147, -1.609438, -1.609438], rel=1e-5)
    assert several.is_greedy.tolist() == [False, True, True, False]


# ------------------------------------------------------------------------------------------------------ ranks
@pytest.mark.processes
def test_live_models_of_every_layout_get_the_scores_of_one_process(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    expected = icl_worker.evaluate_live_model({}, str(tmp_path))
    assert len({score for _, _, score, _, _ in expected}) > 3, "all scores are alike; the comparison would be weak"
    layouts: list[dict[str, Any]] = [{}, {"fsdp": True}, {"tensor_parallel": 2}, {"fsdp": True, "context_parallel": 2}]
    for result in on_ranks(2, [(icl_worker.evaluate_live_model, layout, str(tmp_path)) for layout in layouts]):
        for found, wanted in zip(result, expected, strict=True):
            assert found[:2] == wanted[:2] and found[4] == wanted[4]
            assert found[2] == pytest.approx(wanted[2]) and found[3] == pytest.approx(wanted[3])


# ------------------------------------------------------------------------------------------------------ store
class Killed(Exception):
    pass


class CountingStore(ResultStore):
    """A store whose process is killed when it has stored some batches."""

    def __init__(self, *args: Any, batches: int) -> None:
        super().__init__(*args)
        self.batches = batches

    def append(self, path: str, rank: int, records: Any) -> None:
        super().append(path, rank, records)
        self.batches -= 1
        if not self.batches:
            with open(f"{path}.rank{rank}", "a", encoding="utf-8") as file:
                file.write('{"index": 0, "corr')  # a line that was being written
            raise Killed


def test_a_killed_evaluation_continues_with_the_remaining_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_lm.evaluate.icl.evaluator._STORE_S", -1.0)  # store every batch
    task, model, folder = write_tasks(tmp_path, count=40)[0], new_model(), str(tmp_path / "results")
    facts = stored_facts(model, weights_hash(model), "fp32")
    options = EvaluatorOptions(batch_tokens=200)
    expected = IclEvaluator(byte_tokenizer(), options).evaluate_task(model, task, 0, 96)
    with pytest.raises(Killed):
        killed = IclEvaluator(byte_tokenizer(), options, CountingStore(folder, facts, batches=2))
        killed.evaluate_task(model, task, 0, 96)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[1]))
    num_calls = []
    for _ in range(2):
        found = IclEvaluator(byte_tokenizer(), options, ResultStore(folder, facts)).evaluate_task(model, task, 0, 96)
        assert found.metrics == expected.metrics and found.categories == expected.categories and found.n == 40
        num_calls.append(len(calls))
    assert 0 < num_calls[0] == num_calls[1], "the second evaluation finds all results"
    lines = [json.loads(line) for line in Path(found.examples_file).read_text().splitlines()]
    assert lines[0]["weights"] == weights_hash(model) and lines[0]["task"] == "multiple_choice"
    assert [line["index"] for line in lines[1:]] == list(range(40))
    assert [path.name for path in Path(folder).iterdir()] == [Path(found.examples_file).name]


def test_stored_results_belong_to_weights_prompts_and_precision(tmp_path: Path) -> None:
    model, other = new_model(), new_model()
    with torch.no_grad():
        other.norm.weight[0] += 1e-3
    task = write_tasks(tmp_path)[2]
    prompts = [build_prompts(task, shots, byte_tokenizer(), 96) for shots in (0, 1)]
    facts = [stored_facts(model, weights_hash(m), p) for m in (model, other) for p in ("fp32", "amp_bf16")]
    paths = {ResultStore("x", f).path("t", p.shots, p.digest()) for f in facts for p in prompts}
    assert len(paths) == 8
    assert stored_facts(new_model(), weights_hash(new_model()), "fp32") == facts[0]


# ------------------------------------------------------------------------------------------------ prompts, options
def prompts_of(tmp_path: Path, rows: list[Any], kind: str, seq_len: int = 96, **options: Any) -> Prompts:
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = Task("t", kind, [0], str(tmp_path / "data.jsonl"), {"label": "t", **options})
    return build_prompts(task, options.pop("shots", 0), byte_tokenizer(), seq_len)


def test_long_contexts_are_truncated_on_the_left_and_counted(tmp_path: Path) -> None:
    rows = [{"query": "abcdefghij" * 3, "choices": ["xyz", "w"], "gold": 0}]
    prompts = prompts_of(tmp_path, rows, "multiple_choice", seq_len=20)
    lengths = [(len(choice.context), len(choice.continuation)) for choice in prompts.examples[0].choices]
    assert lengths == [(17, 3), (19, 1)] and prompts.num_truncated == prompts.num_sequences == 2
    text = byte_tokenizer().decode(prompts.examples[0].choices[0].context.tolist())
    assert text == ("abcdefghij" * 3)[-17:]
    with pytest.raises(PromptTooLong, match="no context fits"):
        prompts_of(tmp_path, rows, "multiple_choice", seq_len=3)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("multiple_choice", {"query": "a", "choices": ["b", "c"], "gold": 2}, "gold is 2"),
        ("multiple_choice", {"query": "a", "choices": "b", "gold": 0}, "expected a list of texts"),
        ("language_modeling", {"context": 3, "continuation": "b"}, "context is 3"),
        ("language_modeling", {"context": "", "continuation": "b"}, "empty context"),
        ("generation_task_with_answers", {"context": "a", "answer": "b", "aliases": [1]}, "aliases"),
    ],
)
def test_unusable_lines_name_the_file_and_the_example(tmp_path: Path, kind: str, row: Any, words: str) -> None:
    options = {"continuation_delimiter": ""} if row.get("context") == "" else {}
    with pytest.raises(DataError, match=words) as error:
        prompts_of(tmp_path, [row], kind, **options)
    assert "data.jsonl" in str(error.value)


def test_options_that_would_change_results_are_rejected() -> None:
    entry = {"fewshot_random_seed": "x", "cot_delimiter": "#", "wrong": 1}
    with pytest.raises(ConfigError) as error:
        parse_options("t", "multiple_choice", entry)
    for words in ("fewshot_random_seed is 'x'", "cot_delimiter is not supported", "wrong"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="num_beams is 4, but only greedy search"):
        parse_options("t", "generation_task_with_answers", {"generation_kwargs": {"num_beams": 4}})
    options = parse_options("t", "schema", {"question_prelimiter": "Q: ", "prompt_string": None})
    assert options.prelimiter == "Q: " and options.prompt_string == ""


def test_columns_have_the_names_that_options_give(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "schema": {"opts": ["A", "B"], "continuation": "c", "gold": 1},
        "multiple_choice": {"question": "q", "opts": ["A", "B"], "gold": 0},
        "generation_task_with_answers": {"question": "q", "solution": "a"},
    }
    options = {"context_key": "question", "choices_key": "opts", "answer_key": "solution"}
    tasks: list[dict[str, Any]] = []
    for kind, row in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
        used = {key: name for key, name in options.items() if name in row}
        entry = {"label": kind, "dataset_uri": f"{tmp_path}/{kind}.jsonl", "icl_task_type": kind, "num_fewshot": [0]}
        tasks.append({**entry, **used})
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    for task in read_settings([str(tmp_path / "tasks.yaml")]).tasks:
        row = rows[task.kind]
        kind = TASK_TYPES.get(task.kind)(parse_options(task.label, task.kind, task.config), True)
        assert kind.check(row) is None
        question = kind.question(row, "")
        assert question.contexts == (("A", "B") if task.kind == "schema" else ("q",))
        assert question.answers == (("a",) if "solution" in row else ())
    wrong = {**tasks[0], "choices_key": ["opts"]}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": [wrong]}))
    with pytest.raises(ConfigError, match="lacks context_options"):
        read_settings([str(tmp_path / "tasks.yaml")])


def test_values_of_wrong_types_are_reported_together(tmp_path: Path) -> None:
    entry = {"dataset_uri": "a", "icl_task_type": "schema", "num_fewshot": [0]}
    tasks: list[dict[str, Any]] = [
        {**entry, "label": "a", "metric_names": 5, "max_seq_len": "2048"},
        {**entry, "label": "b", "icl_task_type": ["schema"], "metric_names": [["x"]]},
    ]
    category = {"name": "a", "benchmarks": [{"name": "a", "num_fewshot": 0, "random_baseline": 0}]}
    for averages, words in (
        (["a"], "eval_gauntlet.averages is ['a'], expected a list of categories"),
        ({"mean": "a"}, "eval_gauntlet.averages is {'mean': 'a'}, expected"),
        ({"mean": [["a"]]}, "average mean: the categories ['a'] do not exist"),
    ):
        gauntlet = {"categories": [category], "averages": averages}
        content = {"icl_tasks": tasks, "aggregates": "core", "eval_gauntlet": gauntlet}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
        (tmp_path / "two.yaml").write_text(yaml.safe_dump({"icl_tasks": [], "aggregates": 3}))
        with pytest.raises(ConfigError) as error:
            read_settings([str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")])
        for expected in (
            "task a: metric_names is 5, expected a list with", "task a: max_seq_len is '2048', expected an integer",
            "task b: icl_task_type is ['schema'], expected one of", "task b: metric_names has ['x'], expected some of",
            "one.yaml: aggregates is 'core', expected a list", "two.yaml: aggregates is 3, expected a list", words,
        ):  # fmt: skip
            assert expected in str(error.value)
    for pattern in ("(", 5):
        with pytest.raises(ConfigError, match=r"early_stopping_criteria has .*, expected a regular expression"):
            parse_options("t", "generation_task_with_answers", {"early_stopping_criteria": [pattern]})


def test_few_shot_examples_exclude_the_example() -> None:
    generator = random.Random(1)
    for index in range(6):
        for shots in (0, 1, 3, 5, 9):
            drawn = few_shot_indices(6, shots, index, generator)
            assert index not in drawn and drawn <= set(range(6))
            assert len(drawn) == min(shots, 5) or (len(drawn) == 4 and shots >= 5)  # as llm-foundry draws


def test_settings_refer_to_each_other_and_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICL_NAME", "t")
    write_tasks(tmp_path)
    task = {"label": "${oc.env:ICL_NAME}", "icl_task_type": "schema", "num_fewshot": [1]}
    content = {"names": {"file": "schema"}, "icl_tasks": [{**task, "dataset_uri": "${data_dir}/${names.file}.jsonl"}]}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({**content, "data_dir": "."}))
    (found,) = read_settings([str(tmp_path / "tasks.yaml")]).tasks
    assert found.label == "t" and Path(found.data).samefile(tmp_path / "schema.jsonl")
    for reference_to, words in (("missing", "not a setting"), ("oc.env:NO_SUCH", "not set"), ("data_dir", "itself")):
        content["data_dir"] = f"${{{reference_to}}}/x"
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=words):
            read_settings([str(tmp_path / "tasks.yaml")])


def test_answers_are_normalized() -> None:
    assert normalize_answer(" The  Quick_brown, fox's a\u2019 tail.") == "quick brown fox s tail"


# -------------------------------------------------------------------------------------------------- intervals
def test_intervals() -> None:
    assert binomial_interval(5, 10) == pytest.approx((0.187086, 0.812914), abs=1e-6)
    assert binomial_interval(0, 20) == pytest.approx((0.0, 0.168433), abs=1e-6)
    assert binomial_interval(58_000, 58_492) == pytest.approx((0.990815012, 0.992312785), abs=1e-8)
    (lower, upper), method = accuracy_interval([(30, 60), (45, 60)])
    assert method.startswith("bootstrap") and 0.53 < lower < 0.56 and 0.69 < upper < 0.72
    assert accuracy_interval([(0, 5), (0, 5)])[0] == pytest.approx(binomial_interval(0, 10))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- aggregates
def test_core_is_the_mean_centered_accuracy_of_its_tasks() -> None:
    members = {label: facts for label, facts in dclm_tasks().items() if facts[1]}
    assert len(members) == 22 and len(dclm_tasks()) == 53
    outcomes = [Outcome(label, facts[0], "multiple_choice", score=0.7) for label, facts in members.items()]
    outcomes.append(Outcome("boolq", 0, "multiple_choice", score=0.0))  # another number of shots
    for version, column in (("v1", 2), ("v2", 3)):
        baselines = [facts[column] / 100 for facts in members.values()]
        expected = np.mean([(0.7 - baseline) / (1 - baseline) for baseline in baselines])
        found = aggregate_score(outcomes, "core", version)
        assert found.score == pytest.approx(expected) and f"baselines {version}" in str(found)
    incomplete = aggregate_score([o for o in outcomes if o.task not in ("squad", "coqa")], "core")
    assert incomplete.score is None and str(incomplete).endswith("not available, 2 tasks are missing: squad, coqa")
    assert len(aggregate_score(outcomes, "extended").missing) == 31


def test_core_yaml_has_the_tasks_of_core(shared_dir: Path) -> None:
    content = yaml.safe_load((Path(__file__).resolve().parents[2] / "eval" / "core.yaml").read_text())
    shots = {task["label"]: task["num_fewshot"] for task in content["icl_tasks"]}
    assert shots == {label: [facts[0]] for label, facts in dclm_tasks().items() if facts[1]}
    for entry in json.loads((shared_dir / "data" / "eval" / "dclm_tasks.json").read_text()):
        baselines = entry["random_baseline_percent"]
        expected = (entry["shots"][0], entry["core"], baselines["v1"], baselines["v2"])
        assert dclm_tasks()[entry["label"]] == expected
        for task in content["icl_tasks"]:
            if task["label"] == entry["label"]:
                assert task["icl_task_type"] == entry["type"] and Path(task["dataset_uri"]).name == entry["file"]
                assert {key: task.get(key) for key in entry["options"]} == entry["options"]
