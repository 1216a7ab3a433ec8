"""Tasks and text samples of the live model: their effect on training, layouts, resuming, time limit, messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data_helpers import write_shard
from evaluation_helpers import SHAPE, STEPS, evaluating, losses, rows, train, write_inputs
from rank_processes import on_ranks
from run_helpers import before_step

from open_lm import storage
from open_lm.errors import ConfigError, DataError
from open_lm.main import main
from open_lm.tokenizer import load_tokenizer
from open_lm.training.control import Decision, RunControl
from open_lm.training.evaluations.budget import FIRST_EXAMPLES, Budget
from open_lm.training.trainer import Trainer

LAYOUTS = {
    "ddp": ["--accum-freq", "2"],
    "experts": ["--fsdp", "--expert-parallel", "2", "--moe-freq", "2", "--moe-num-experts", "2", "--moe-top-k", "1"],
    "tensor": ["--tensor-parallel", "2"],
    "context": ["--context-parallel", "2"],
}


@pytest.fixture
def folder(tmp_path: Path, small_tokenizer: str) -> Path:
    """Return a folder with the inputs of the runs and a tokenizer."""
    write_inputs(tmp_path)
    shutil.copy(small_tokenizer, tmp_path / "tokenizer.json")
    return tmp_path


def flags(folder: Path, every: int = 2) -> list[str]:
    return evaluating(folder, str(folder / "tokenizer.json"), every)


def scores(run: Path) -> list[list[tuple[Any, ...]]]:
    """Return step, task, shots, score and number of examples of the lines of icl.jsonl."""
    fields = ("task", "shots", "score", "n", "digest")
    return [
        [(row["step"], *(task[field] for field in fields)) for task in row["tasks"]] for row in rows(run / "icl.jsonl")
    ]


def test_evaluations_leave_training_unchanged_and_reach_all_logs(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(folder, "plain", "--averagers", "ema_0.9")
    run = train(folder, "run", *flags(folder), "--report-to", "tensorboard", "--averagers", "ema_0.9")
    assert losses(run) == losses(plain), "bit-identical, with dropout"
    for name in ("epoch_1.pt", "ema_0.9_1.pt"):
        ours, theirs = (torch.load(r / "checkpoints" / name, weights_only=True) for r in (run, plain))
        for key in ("state_dict", "av_model_sd"):
            assert all(torch.equal(value, theirs[key][weight]) for weight, value in ours.get(key, {}).items())
    steps = [0, 2, 4, STEPS]
    icl = [row for row in rows(run / "metrics.jsonl") if "icl/choose_0shot" in row]
    assert [row["step"] for row in icl] == [row["step"] for row in rows(run / "icl.jsonl")] == steps
    assert all(row["icl/examples"] == 20 + 20 + 7 + 5 for row in icl)
    assert [0 < row["icl/time_share"] < 1 for row in icl if row["step"]] == [True] * 3
    recorded = rows(run / "icl.jsonl")[-1]
    assert recorded["tokens"] == STEPS * 128 and recorded["average"] == icl[-1]["icl/average"]
    assert {task["task"] for task in recorded["tasks"]} == {"choose", "continue", "answer"}
    samples = rows(run / "samples.jsonl")
    assert [(s["step"], s["temperature"], s["number"]) for s in samples] == [
        (step, temperature, number) for step in steps for temperature in (0.0, 0.9) for number in (1, 2)
    ]
    assert samples[0]["prompt"] == "the first\u2028line" and samples[1]["prompt"] == "and another"
    assert (
        "Tasks at step 4: average " in caplog.text
        and 'Sample at step 6, temperature 0.9: "and another" -> ' in caplog.text
    )
    assert "evaluations took: icl " in caplog.text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("icl/average")] == steps
    texts = events.Tensors("samples/2 (greedy)/text_summary")
    assert [event.step for event in texts] == steps
    assert b"    and another" in texts[0].tensor_proto.string_val[0]


def _train_in_all_layouts(rank: int, folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        train(folder, f"{name}_plain", *layout, steps=3)
        train(folder, name, *layout, *flags(folder), "--icl-max-examples", "8", steps=3)
    dist.barrier()


@pytest.mark.processes
def test_evaluations_in_all_layouts(folder: Path) -> None:
    """With dropout, losses stay bit-identical, and each layout computes the scores and texts of one process."""
    on_ranks(_train_in_all_layouts, folder)
    one = train(folder, "one", *flags(folder), "--icl-max-examples", "8", steps=3)
    for name in LAYOUTS:
        assert losses(folder / name) == losses(folder / f"{name}_plain"), name
        assert len(rows(folder / name / "icl.jsonl")) == 3
        if name != "experts":  # with experts, so another model
            assert scores(folder / name)[0] == scores(one)[0], name
            assert rows(folder / name / "samples.jsonl")[:4] == rows(one / "samples.jsonl")[:4], name


def test_resumed_run_repeats_and_misses_no_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before its first checkpoint and after it, and one that is stopped where it must evaluate."""
    expected = train(folder, "expected", *flags(folder), steps=8)

    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    for step, resume in ((1, ()), (5, ("--resume", "latest"))):
        with monkeypatch.context() as patches, pytest.raises(Killed):
            before_step(step, kill, patches)
            train(folder, "run", *flags(folder), "--save-every-n-steps", "3", *resume, steps=8)
    assert [row["step"] for row in rows(folder / "run/icl.jsonl")] == [0, 2, 4]
    run = train(folder, "run", *flags(folder), "--resume", "latest", steps=8)
    _assert_equal_runs(run, expected)

    with monkeypatch.context() as patches:
        calls = iter([0, 0, 0, 1])
        patches.setattr(RunControl, "requests", lambda control: (next(calls), 0))
        stopped = train(folder, "stopped", *flags(folder), steps=8)
    assert [row["step"] for row in rows(stopped / "icl.jsonl")] == [0, 2], "a stop does not wait for an evaluation"
    _assert_equal_runs(train(folder, "stopped", *flags(folder), "--resume", "latest", steps=8), expected)
    before = (stopped / "samples.jsonl").read_bytes()
    train(folder, "stopped", *flags(folder), "--resume", "latest", steps=8)
    assert (stopped / "samples.jsonl").read_bytes() == before, "a finished run does nothing"


def test_rollback_removes_later_evaluations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, pending = Trainer._decide, [5]

    def decide(trainer: Trainer, wait: bool) -> Decision:
        decision = original(trainer, wait)
        return Decision(rollback=bool(pending and trainer.step == pending[0] and pending.pop()), stop=decision.stop)

    monkeypatch.setattr(Trainer, "_decide", decide)
    run = train(folder, "run", *flags(folder), "--save-every-n-steps", "3", "--rollback-loss-spikes", "6")
    for file in ("icl.jsonl", "metrics.jsonl"):
        assert [row["step"] for row in rows(run / file) if "average" in row or "icl/average" in row] == [0, 2, 4, 6]
    assert [row["step"] for row in rows(run / "samples.jsonl")[::4]] == [0, 2, 4, 6]
    assert not pending, "it has rolled back"


def _assert_equal_runs(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    assert scores(run) == scores(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    ours, theirs = (
        [(row["step"], row["icl/average"]) for row in rows(r / "metrics.jsonl") if "icl/average" in row]
        for r in (run, expected)
    )
    assert ours == theirs


# --- time limit ------------------------------------------------------------------------------------------------------
def test_examples_are_thinned_to_the_share_of_the_time() -> None:
    def choose(step: int, spent: list[tuple[int, float, int]], limit: int = 100) -> int:
        records = [{"step": at, "seconds": seconds, "examples": n} for at, seconds, n in spent]
        return Budget(0.2, step_s=1.0).examples(step, records, limit, count=lambda number: 10 * number)

    # 0.2 / (1 - 0.2) of 100 s of training are 25 s, enough for 250 examples of 0.1 s, 16 or 25 of each task.
    assert choose(0, []) == FIRST_EXAMPLES and choose(0, [], limit=3) == 3
    assert choose(100, [(0, 8.0, 80)]) == 16
    assert choose(100, [(0, 0.8, 8)], limit=20) == 20
    assert choose(200, [(0, 8.0, 80), (100, 16.0, 160)]) == 16, "unspent time does not change the examples"
    assert choose(200, [(0, 40.0, 400), (100, 1.0, 10)]) == 8, "the time of earlier evaluations counts"
    assert choose(100, [(0, 500.0, 80)]) == 1, "the least"


def test_time_limit_uses_the_first_examples_with_the_same_prompts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(folder, "run", *flags(folder), "--icl-max-time-share", "0.001")
    all_rows = rows(run / "icl.jsonl")
    assert [row["examples_per_task"] for row in all_rows] == [FIRST_EXAMPLES, 1, 1, 1]
    assert [row["examples"] for row in all_rows] == [8 + 8 + 7 + 5, 4, 4, 4]
    assert "(the first 1 of each task, because of --icl-max-time-share)" in caplog.text


# --- evaluation-only runs and messages -------------------------------------------------------------------------------
def test_evaluation_without_training(folder: Path) -> None:
    run = train(folder, "run", *flags(folder))
    main([
        "--model", str(folder / "model.json"), "--resume", str(run / "checkpoints/epoch_1.pt"), "--precision", "fp32",
        "--logs", str(folder), "--name", "evaluation", *flags(folder),
    ])  # fmt: skip
    assert scores(folder / "evaluation") == scores(run)[-1:]
    assert (folder / "evaluation/samples.jsonl").read_text().splitlines() == (
        run / "samples.jsonl"
    ).read_text().splitlines()[-4:]
    assert not (folder / "evaluation/checkpoints/results.jsonl").exists()


def test_tokenizer_of_the_data_and_of_the_run(folder: Path) -> None:
    """Without --tokenizer, the copy next to the shards is used, then that of the run; others are refused."""
    icl = ["--icl-yaml", str(folder / "tasks.yaml")]
    with pytest.raises(ConfigError, match=r"--icl-yaml needs the tokenizer.*: give it with --tokenizer"):
        train(folder, "run", *icl)
    assert not (folder / "run").exists(), "nothing was started"
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    shard = write_shard(folder / "data/00000.tar", [np.arange(33) % 300 for _ in range(STEPS * 4)])
    settings = {"tokenizer_fingerprint": tokenizer.fingerprint, "eot_id": tokenizer.eot_id}
    (folder / "data/dataset.json").write_text(json.dumps({"settings": settings, "inputs": []}))
    for file, content in tokenizer.files().items():
        storage.write_bytes(folder / "data/tokenizer" / file, content)
    data = ["--dataset-type", "auto", "--train-data", shard, "--data-key", "npy"]
    run = train(folder, "run", *data, *icl)
    evaluate = ["--model", str(folder / "model.json"), "--precision", "fp32", "--logs", str(folder), *icl]
    main([*evaluate, "--name", "evaluation", "--resume", str(run / "checkpoints/epoch_1.pt")])
    assert scores(folder / "evaluation") == scores(run)[-1:]
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["merges"].pop()
    (folder / "other.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"other.json .*gives other ids"):
        train(folder, "other", *data, *icl, "--tokenizer", str(folder / "other.json"))


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("tasks.yaml", "icl_tasks: [", ConfigError, r"--icl-yaml .*tasks.yaml: cannot be read"),
        ("tasks.yaml", "icl_tasks: [{label: a, icl_task_type: odd}]", ConfigError, "icl_task_type is 'odd'"),
        ("choose.jsonl", None, ConfigError, r"(?s)choose.jsonl is missing.*--icl-data-dir"),
        ("choose.jsonl", '{"query": 1, "choices": ["a"], "gold": 0}\n', DataError, "query is 1, expected a text"),
        ("prompts.txt", "\n", ConfigError, r"--sample-prompts .*found no prompt"),
        ("prompts.txt", "many words " * 40, ConfigError, r"prompt 1 has \d+ tokens, expected at most 31"),
        ("model.json", json.dumps({**SHAPE, "vocab_size": 100}), DataError, "vocabulary has 100 ids"),
    ],
)
def test_invalid_files_are_reported_before_training(
    file: str, content: str | None, error: type[Exception], message: str, folder: Path
) -> None:
    path = folder / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        train(folder, "run", *flags(folder))
    assert not (folder / "run").exists()


def test_options_without_effect_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(folder, "run", "--icl-max-examples", "3", "--sample-max-tokens", "3", "--tokenizer", "unused", steps=1)
    for flag, other in (("icl-max-examples", "icl-yaml"), ("sample-max-tokens", "sample-prompts")):
        assert f"--{flag} has no effect without --{other}" in caplog.text
    assert "--tokenizer has no effect without --train-text, --icl-yaml or --sample-prompts" in caplog.text
    with pytest.raises(ConfigError, match=r"(?s)--sample-temperature: found -1.0.*--icl-max-time-share: found 1.5"):
        train(folder, "other", *flags(folder)[:-5], "--icl-max-time-share", "1.5", "--sample-temperature=-1")
