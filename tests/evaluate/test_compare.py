"""The comparison of in-context results: tests against direct computations, pairing, what is not compared, and plots."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from icl_worker import byte_tokenizer, new_model, write_tasks

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate import compare
from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, Outcome, ResultStore, evaluate_tasks
from open_lm.evaluate.icl.aggregates import aggregate_score, dclm_tasks
from open_lm.evaluate.icl.report import training_position, write_json
from open_lm.evaluate.icl.significance import Paired, Unpaired, Untested, bootstrap
from open_lm.evaluate.icl.store import stored_facts, weights_hash

Evaluate = Callable[..., str]


# --------------------------------------------------------------------------------------------------- statistics
def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the results of two evaluations with these numbers of examples."""
    pairs = [(True, True)] * both + [(False, True)] * gained + [(True, False)] * lost + [(False, False)] * neither
    first, second = zip(*pairs, strict=True)
    return np.array(first), np.array(second)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (3, 11), (12, 2), (40, 20), (0, 9)], ids=str)
def test_mcnemar_is_the_exact_sign_test_of_the_discordant_pairs(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(gained, lost) + 1))
    found = Paired([outcomes(30, gained, lost, 20)]).difference()
    assert found.test == "McNemar" and found.interval is not None
    assert found.p_value == pytest.approx(min(1.0, float(2 * tail)), abs=1e-12)
    assert found.value == pytest.approx((gained - lost) / (n + 50))
    assert found.interval[0] < found.value < found.interval[1] or not n
    assert found.interval[0] < 0 < found.interval[1] or (n and found.p_value < 0.1)
    assert found.interval[1] > found.interval[0], "without discordant pairs, a difference is still possible"


def test_intervals_of_differences_contain_the_truth_in_95_percent_of_samples() -> None:
    generator = np.random.default_rng(1)
    paired = unpaired = 0
    for _ in range(400):
        counts = generator.multinomial(60, [0.3, 0.2, 0.1, 0.4])
        first, second = outcomes(*map(int, counts))
        interval = Paired([(first, second)]).difference().interval
        assert interval is not None
        paired += interval[0] <= 0.1 <= interval[1]
        scores = generator.binomial(60, 0.4) / 60, generator.binomial(40, 0.5) / 40
        interval = Unpaired(scores, (60, 40)).difference().interval
        assert interval is not None
        unpaired += interval[0] <= 0.1 <= interval[1]
    assert 0.92 * 400 <= paired <= 0.985 * 400 and 0.92 * 400 <= unpaired <= 0.985 * 400


def test_test_of_two_proportions() -> None:
    found = Unpaired((0.4, 0.6), (50, 100)).difference()
    z = 0.2 / math.sqrt(80 / 150 * 70 / 150 * (1 / 50 + 1 / 100))
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert Unpaired((1.0, 1.0), (50, 100)).difference().p_value == 1
    by_interval = Unpaired((0.4, 0.6), (5, 5), ((0.3, 0.5), (0.5, 0.7))).difference()
    error = math.hypot(0.2, 0.2) / (2 * 1.959964)
    assert by_interval.p_value == pytest.approx(math.erfc(0.2 / error / math.sqrt(2)), rel=1e-5)


def test_bootstrap_equals_the_enumeration_of_all_resamples() -> None:
    """Four and three examples in two categories, weighted: all 4^4 x 3^3 resamples have the same probability."""
    first = np.array([True, False, False, True]), np.array([False, True, False])
    second = np.array([True, True, True, False]), np.array([True, True, False])
    weights = 0.25, 0.75
    parts = [b.astype(int) - a.astype(int) for a, b in zip(first, second, strict=True)]
    means = [[np.mean(draw) for draw in itertools.product(part, repeat=len(part))] for part in parts]
    exact = np.add.outer(weights[0] * np.array(means[0]), weights[1] * np.array(means[1])).ravel()
    value = sum(w * part.mean() for w, part in zip(weights, parts, strict=True))
    comparisons = [Paired([pair]) for pair in zip(first, second, strict=True)]
    found = bootstrap(comparisons, weights)
    assert found.value == pytest.approx(value) and found.test == "paired bootstrap"
    assert found.p_value == pytest.approx(np.mean(np.abs(exact - value) >= abs(value) - 1e-12), abs=0.015)
    draws = sum(w * c.draws(np.random.default_rng(3)) for w, c in zip(weights, comparisons, strict=True))
    assert [draws.mean(), draws.std()] == pytest.approx([exact.mean(), exact.std()], abs=0.01)
    assert found == bootstrap(comparisons, weights), "resamples have a fixed seed"
    groups = Paired(list(zip(first, second, strict=True)))
    assert groups.difference() == bootstrap([groups], [1.0])
    assert groups.difference().value == pytest.approx(np.mean([part.mean() for part in parts]))


def test_bootstrap_of_unpaired_scores_and_without_a_test() -> None:
    unpaired = Unpaired((0.4, 0.6), (500, 400))
    found, exact = bootstrap([unpaired], [1.0]), unpaired.difference()
    assert found.test == "unpaired bootstrap" and found.interval == pytest.approx(exact.interval, abs=0.01)
    mixed = bootstrap([unpaired, Paired([outcomes(3, 2, 1, 4)])], [0.5, 0.5])
    assert mixed.test == "partly paired bootstrap" and mixed.value == pytest.approx(0.15)
    untested = bootstrap([unpaired, Untested((0.1, 0.3))], [0.5, 0.5])
    assert untested.p_value is None and untested.interval is None and untested.value == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------------ results
@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with results of the native engine: steps 10 and 20 of a run, with the stored examples."""
    folder = tmp_path_factory.mktemp("compare")
    tasks = write_tasks(folder)
    for step in (10, 20):
        model = new_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 if step == 10 else 0.4).add_(0 if step == 10 else 0.01)
        facts = stored_facts(model, weights_hash(model), "fp32")
        store = ResultStore(str(folder / "evals" / "examples"), facts)
        evaluator = IclEvaluator(byte_tokenizer(), EvaluatorOptions(), store)
        found = evaluate_tasks(evaluator, model, tasks, model.seq_len)
        write_json(str(folder / "evals" / f"step_{step}.json"), found, metadata(step, str(facts["weights"])))
    return folder


def metadata(step: int, weights: str = "") -> dict[str, Any]:
    return {
        "engine": "native", "checkpoint": f"run/checkpoints/step_{step:08d}", "step": step, "tokens": step * 96,
        "weights_sha256": weights, "seq_len": 96, "precision": "fp32", "max_examples": None,
    }  # fmt: skip


def paths(folder: Path) -> list[str]:
    return [str(folder / "evals" / f"step_{step}.json") for step in (10, 20)]


def stored(folder: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    file = folder / "evals" / "examples" / Path(task["examples_file"]).name
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def test_results_of_the_same_examples_are_paired(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = compare.main(paths(evaluated))
    first, second = (json.loads(Path(path).read_text()) for path in paths(evaluated))
    assert [(row.task, row.shots) for row in report.tasks] == [(t["task"], t["shots"]) for t in first["tasks"]]
    assert report.notes == []
    for row, a, b in zip(report.tasks, first["tasks"], second["tasks"], strict=True):
        assert row.scores == (a["score"], b["score"])
        assert row.difference.value == pytest.approx(b["score"] - a["score"], abs=1e-12)
        assert row.difference.test == ("paired bootstrap" if a["categories"] else "McNemar")
        if not a["categories"]:
            pairs = [
                (x["correct"], y["correct"]) for x, y in zip(stored(evaluated, a), stored(evaluated, b), strict=True)
            ]
            expected = Paired([(np.array([x for x, _ in pairs]), np.array([y for _, y in pairs]))]).difference()
            assert row.difference == expected
    assert any(row.difference.p_value != 1 for row in report.tasks), "all results are alike; the test would be weak"
    average = report.aggregates[0]
    assert average.scores == pytest.approx((first["average"], second["average"]))
    assert average.difference.value == pytest.approx(second["average"] - first["average"])
    assert report.aggregates[1].scores == pytest.approx((first["centered_average"], second["centered_average"]))
    assert average.difference.test == "paired bootstrap"
    output = capsys.readouterr().out
    assert "McNemar" in output and "95 % interval" in output and "average of 8 tasks" in output


def test_json_has_the_values_of_the_table(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = compare.main([*paths(evaluated), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == "open_lm.icl_comparison/1" and [f["step"] for f in content["files"]] == [10, 20]
    found = content["comparisons"][0]
    assert found["file"] == paths(evaluated)[1] and found["notes"] == []
    for row, expected in zip(found["tasks"] + found["aggregates"], report.tasks + report.aggregates, strict=True):
        assert row["difference"]["p_value"] == expected.difference.p_value
        assert row["scores"] == list(expected.scores) and row["task"] == expected.task


def test_moved_results_stay_paired_and_missing_examples_are_unpaired(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "evals", tmp_path / "evals")
    contents = [json.loads(Path(path).read_text()) for path in paths(tmp_path)]
    for path, content in zip(paths(tmp_path), contents, strict=True):
        for task in content["tasks"]:
            task["examples_file"] = f"gone/examples/{Path(task['examples_file']).name}"
        Path(path).write_text(json.dumps(content))
    assert compare.main(paths(tmp_path))[0].notes == []
    for file in (tmp_path / "evals" / "examples").glob("multiple_choice_*"):
        lines = [{**json.loads(line), "category": None} for line in file.read_text().splitlines()]
        for line in lines:
            del line["category"]  # as an earlier version has stored them
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    schema = [t for t in contents[0]["tasks"] if t["task"] == "schema"]
    (tmp_path / "evals" / "examples" / Path(schema[0]["examples_file"]).name).unlink()
    damaged = tmp_path / "evals" / "examples" / Path(schema[1]["examples_file"]).name
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    report = compare.main(paths(tmp_path))[0]
    tests = {(row.task, row.shots): row.difference.test for row in report.tasks}
    assert tests["multiple_choice", 0] == "unpaired z"
    assert tests["schema", 0] == tests["schema", 2] == "two proportions"
    assert tests["language_modeling", 0] == "McNemar"
    notes = "\n".join(report.notes)
    for words in ("does not name the categories", "are missing", "does not have the results of these prompts"):
        assert words in notes
    assert report.aggregates[0].difference.test == "partly paired bootstrap"


def write(path: Path, found: list[Outcome], **changes: Any) -> str:
    aggregates = changes.pop("aggregates", ())
    write_json(str(path), found, {**metadata(10), **changes}, aggregates)
    return str(path)


def plain(task: str, score: float | None = 0.5, **changes: Any) -> Outcome:
    metric = "InContextLearningMultipleChoiceAccuracy"
    return replace(Outcome(task, 0, "multiple_choice", metric, score, 0.25, 100), **changes)


def test_what_cannot_be_compared_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [plain("same", digest="a"), plain("only_first"), plain("shots"), plain("other_kind"), plain("failed")]
    second = [plain("same", 0.7, digest="b"), plain("only_second"), plain("shots", shots=5)]
    second += [plain("other_kind", kind="schema"), plain("failed", None, problem="too long"), plain("same", 0.1)]
    second.append(plain("error", metric="InContextLearningECE"))
    first.append(plain("error", metric="InContextLearningECE"))
    a = write(tmp_path / "a.json", first)
    b = write(tmp_path / "b.json", second, precision="amp_bf16", engine="llm-foundry")
    (report,) = compare.main([a, b])
    rows = {row.task: row.difference for row in report.tasks}
    assert set(rows) == {"same", "error"}
    assert rows["same"].test == "two proportions" and rows["same"].value == pytest.approx(0.2)
    assert rows["error"].p_value is None and report.aggregates[0].difference.p_value is None
    notes, output = "\n".join(report.notes), capsys.readouterr().out
    for words in (
        "only_first 0-shot is not compared: " + b, "only_second 0-shot is not compared: " + a,
        "shots 0-shot is not compared", "shots 5-shot is not compared", "its kind is multiple_choice", "too long",
        "precision: fp32 and amp_bf16", "engine: native and llm-foundry", "the prompts differ", "repeated tasks (1)",
    ):  # fmt: skip
        assert words in notes, words
    assert all(f"note: {note}" in output for note in report.notes)
    with pytest.raises(DataError, match="no comparable task in common"):
        compare.main([a, write(tmp_path / "c.json", [plain("third")])])


def test_aggregates_of_dclm(tmp_path: Path) -> None:
    core = {label: facts for label, facts in dclm_tasks().items() if facts[1]}
    found = [[plain(label, score, shots=shots) for label, (shots, *_) in core.items()] for score in (0.5, 0.6)]
    files = [
        write(tmp_path / f"{i}.json", tasks, aggregates=[aggregate_score(tasks, "core")])
        for i, tasks in enumerate(found)
    ]
    (report,) = compare.main(files)
    row = report.aggregates[-1]
    assert row.task == "DCLM CORE (baselines v2)"
    assert row.scores == pytest.approx(tuple(aggregate_score(tasks, "core").score for tasks in found))
    assert row.difference.value == pytest.approx(row.scores[1] - row.scores[0])
    assert row.difference.test == "unpaired bootstrap" and (row.difference.p_value or 1) < 0.001
    short = found[1][1:]
    other = write(tmp_path / "short.json", short, aggregates=[aggregate_score(short, "core")])
    notes = "\n".join(compare.main([files[0], other])[0].notes)
    assert f"DCLM CORE (baselines v2) is not compared; missing: {found[0][0].task}" in notes


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "found no JSON"), ('{"schema": "x/1"}', "found x/1"), ("[]", "found none"),
     ('{"schema": "open_lm.icl/1"}', "damaged"), ('{"schema": "open_lm.icl/1", "tasks": [{}]}', "damaged")],
)  # fmt: skip
def test_unusable_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        compare.main([str(path), str(path)])
    assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------------------------- plot
@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_plot_has_the_checkpoints_in_the_order_of_their_tokens(evaluated: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"curve{suffix}"
    compare.main([*reversed(paths(evaluated)), "--plot", str(target)])
    text = target.read_text()
    if suffix == ".svg":
        ET.fromstring(text)
    titles = re.findall(r"<title>([^<]*tokens[^<]*)</title>", text)
    assert len(titles) == 2 * (8 + 1), "two checkpoints in the panels of 8 tasks and the average"
    assert all(f"tokens {96 * step:,}" in title for title, step in zip(titles, [10, 20] * 9, strict=True))
    first = json.loads(Path(paths(evaluated)[0]).read_text())
    assert f"step_00000010: {first['average']:.4f}, tokens 960" in titles[0]
    for line in re.findall(r'polyline points="([^"]*)"', text):
        (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.split())
        assert 0 < x0 < x1 < 320 and 0 < y0 < 200 and 0 < y1 < 200


def test_plot_needs_a_common_axis_and_a_known_format(tmp_path: Path) -> None:
    epochs = [
        write(tmp_path / f"{n}.json", [plain("a<b")], step=None, tokens=None, checkpoint=f"run/epoch_{n}.pt")
        for n in (1, 2)
    ]
    compare.main([*epochs, "--plot", str(tmp_path / "curve.svg")])
    assert "epoch 2" in (tmp_path / "curve.svg").read_text() and "a&lt;b" in (tmp_path / "curve.svg").read_text()
    other = write(tmp_path / "model.json", [plain("a<b")], step=None, tokens=None, checkpoint="exported")
    with pytest.raises(DataError, match="neither tokens nor steps nor epochs") as error:
        compare.main([*epochs, other, "--plot", str(tmp_path / "none.svg")])
    assert other in str(error.value) and not (tmp_path / "none.svg").exists()
    with pytest.raises(ConfigError, match=r"--plot x\.bmp: expected"):
        compare.main([*epochs, "--plot", "x.bmp"])
    with pytest.raises(ConfigError, match="at least two files"):
        compare.main(epochs[:1])


def test_position_of_a_checkpoint_in_its_training(tmp_path: Path) -> None:
    content = {"epoch": 2, "name": "run", "state_dict": {"module.w": torch.zeros(2)}}
    torch.save({**content, "step": 30, "samples_seen": 120}, tmp_path / "epoch_2.pt")
    torch.save(content, tmp_path / "epoch_1.pt")  # without counters
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pt")
    assert training_position(str(tmp_path / "epoch_2.pt"), 64) == {"step": 30, "tokens": 120 * 64}
    assert training_position(str(tmp_path / "epoch_1.pt"), 64) == {"step": None, "tokens": None}
    assert training_position(str(tmp_path / "weights.pt"), 64) == {"step": None, "tokens": None}
