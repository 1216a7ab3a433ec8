"""Reading runs: those of the original OpenLM, resumed, failed, remote and damaged ones; problems and their places."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from report_runs import SECRET, SPIKE_STEP, STEP_TOKENS, STEPS, train_line, write_lines, write_run

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.report import REPORT_FILE, write_report
from open_lm.report.__main__ import main
from open_lm.report.collect import collect_run, collect_runs
from open_lm.report.curves import run_clock
from open_lm.report.problems import find_spikes, find_stalls
from open_lm.report.records import ERROR, FAILED, FINISHED, RESTART, ROLLBACK, SKIPPED, STOPPED, UNFINISHED, Run
from open_lm.report.refresh import refresh_report
from open_lm.report.thinning import thin


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def titles(run: Run) -> list[str]:
    return [problem.title for problem in run.problems]


def test_collects_all_that_a_run_leaves(run_folder: Path) -> None:
    run = collect_run(str(run_folder))
    s = run.summary
    assert (run.name, s.state, s.model, s.parameters) == ("run", FINISHED, "tiny", 12345)
    assert (s.step, s.planned_steps, s.tokens, s.planned_tokens) == (STEPS, 200, 819200, 819200)
    assert s.tokens_per_second == 8192 and s.mfu == pytest.approx(0.4) and s.peak_memory_bytes == 2**31
    assert s.wall_s == pytest.approx(600 + 0.5 * (STEPS - 1))
    assert s.devices == "8 x NVIDIA H100" and s.flops == 4e15
    assert s.energy is not None and s.energy.kwh == pytest.approx(1.0) and s.energy.method == "counters of the devices"
    assert s.validation is not None and s.validation.loss == 2.0 and s.validation.sets[0].name == "held_out"
    assert [e.step for e in run.evaluations] == [0, 200] and run.evaluations[1].tasks[0].interval == pytest.approx(
        (0.31, 0.51)
    )
    assert run.evaluations[1].tasks[0].centered == pytest.approx((0.41 - 0.25) / 0.75)
    assert [sample.step for sample in run.samples] == [0, 100, 200]
    assert {(event.step, event.kind) for event in run.events} == {
        (100, SKIPPED), (120, RESTART), (140, ROLLBACK),
    }  # fmt: skip
    assert [(change.name, change.values) for change in run.changes] == [("lr", ("0.001", "0.0005"))]
    web, books = run.sources
    assert (web.planned_share, web.seen_tokens, web.stored_tokens) == (0.75, STEPS * 3072, 40_000 * 64)
    assert books.passes == pytest.approx(STEPS * 1024 / (500 * 64))
    assert web.parts == {"wiki": 600_000, "news": 1_800_000} and not books.parts  # of several --source


def test_problems_name_their_places(run_folder: Path) -> None:
    run = collect_run(str(run_folder))
    found = {problem.title: problem for problem in run.problems}
    assert found["Loss spikes"].where == f"step {SPIKE_STEP}"
    assert (
        found["Stalls"].where == "step 121"
        and "10 min" in found["Stalls"].detail
        and "restart" in found["Stalls"].detail
    )
    assert found["Loss or gradient not finite"].where == "step 100"
    assert found["Rollbacks"].where == "step 140"
    assert found["Data repeated many times"].where == "books/manifest.jsonl"
    assert not {"Training waits for data", "The loss rose again", "The run became slower"} & set(found)


def test_run_of_the_original_open_lm(shared_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_dir / "compat" / "run" / "logs" / "upstream", tmp_path / "upstream")
    run = collect_run(str(tmp_path / "upstream"))
    assert (run.summary.state, run.summary.step, run.summary.planned_steps) == (FINISHED, 128, 128)
    assert (run.summary.tokens, run.summary.parameters, run.summary.model) == (65536, 164416, "tiny_bytes")
    steps, losses = run.metrics.get("train/loss")
    assert steps[[0, 1, 8, 9, -1]].tolist() == [1, 9, 64, 65, 128] and losses[0] == pytest.approx(6.182)
    assert [validation.tokens for validation in run.validations] == [32768, 65536]
    assert run.summary.validation is not None and run.summary.validation.loss == pytest.approx(2.38568, abs=1e-4)
    assert [checkpoint.name for checkpoint in run.checkpoints] == ["epoch_1.pt", "epoch_2.pt"]
    assert [source.seen_tokens for source in run.sources] == [65536]
    refresh_report(str(tmp_path / "upstream"))
    assert "tiny_bytes" in (tmp_path / "upstream" / REPORT_FILE).read_text()


def test_runs_that_are_not_finished(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "params.txt").write_text("model: tiny.json\n")
    empty = collect_run(str(tmp_path / "empty"))
    assert empty.summary.state == UNFINISHED and titles(empty) == ["No results yet"]

    run = write_run(tmp_path / "failed", steps=130)
    lines = (run / "out.log").read_text().splitlines()[:-1]
    error = "2026-01-02,11:00:00 | ERROR | the run ended early: DataError: shard 3 is damaged"
    (run / "out.log").write_text("\n".join([*lines, error]) + "\n")
    failed = collect_run(str(run))
    assert failed.summary.state == FAILED and failed.problems[0].severity == ERROR
    assert failed.problems[0].detail == "DataError: shard 3 is damaged" and failed.problems[0].where == "step 200"

    end = next(number for number, line in enumerate(lines) if "stopped by a signal" in line)
    (run / "out.log").write_text("\n".join(lines[: end + 1]) + "\n")
    assert collect_run(str(run)).summary.state == STOPPED
    write_report([str(run), str(tmp_path / "empty")], str(tmp_path / "report.html"))

    with pytest.raises(ConfigError, match="found a folder with the runs empty, failed; name them"):
        collect_run(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--out .*: found a folder, expected the path of a file"):
        main([str(run), "--out", str(tmp_path)])


def test_damaged_files_are_counted_not_fatal(run_folder: Path) -> None:
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 201, "train/loss": null, "train/note": "text"}\n{"train/loss": 1}\n[1]\n{"step": 20')
    (run_folder / "data.json").write_text("{")
    (run_folder / "checkpoints" / "evals").mkdir()
    (run_folder / "checkpoints" / "evals" / "epoch_1_core.json").write_text('{"schema": "other"}')
    run = collect_run(str(run_folder))
    assert run.metrics.num_damaged == 3 and run.metrics.get("train/loss")[0][-1] == 201
    assert np.isnan(run.metrics.get("train/loss")[1][-1]) and "train/note" not in run.metrics.metrics
    assert titles(run).count("A file cannot be read") == 2 and "Damaged lines" in titles(run)
    assert [source.name for source in run.sources] == ["web/manifest.jsonl", "books/manifest.jsonl"], "from params.txt"


def test_stored_evaluations_and_their_problems(run_folder: Path) -> None:
    evals = run_folder / "checkpoints" / "evals"
    evals.mkdir()
    tasks = [
        {
            "task": "long",
            "shots": 5,
            "kind": "multiple_choice",
            "score": 0.5,
            "baseline": 0.25,
            "n": 9,
            "truncated": 4,
            "sequences": 36,
        },
        {"task": "broken", "shots": 0, "kind": "multiple_choice", "problem": "no file"},
    ]
    aggregate = {"name": "core", "baselines": "v2", "score": 0.125, "tasks": 22, "missing": []}
    content = {"schema": "open_lm.icl/1", "checkpoint": "c/epoch_1.pt", "engine": "native", "step": 200, "tokens": 1}
    content |= {"average": 0.5, "centered_average": 0.33, "aggregates": [aggregate], "gauntlet": None, "tasks": tasks}
    (evals / "epoch_1_core.json").write_text(json.dumps(content))
    run = collect_run(str(run_folder))
    stored = run.evaluations[-1]
    assert (stored.origin, stored.step, stored.is_live) == ("evals/epoch_1_core.json", 200, False)
    assert list(stored.aggregates.values()) == [0.125] and "CORE" in next(iter(stored.aggregates))
    found = {problem.title: problem.detail for problem in run.problems}
    assert "long 5-shot: 4 of 36" in found["Truncated contexts"]
    assert "broken 0-shot: no file" in found["Tasks that did not run"]


def test_no_secret_and_no_other_folder(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_report([str(run_folder)], str(tmp_path / "report.html"))
    assert SECRET not in (tmp_path / "report.html").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"other: expected the folder of a run.*found notes\.txt"):
        write_report([str(tmp_path / "other")], str(tmp_path / "none.html"))
    assert not (tmp_path / "none.html").exists()
    with caplog.at_level(logging.WARNING):
        refresh_report(str(tmp_path / "other"))
    assert len(caplog.records) == 1 and "cannot write the report" in caplog.text


def test_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder of this user, and those of others, whose usual places are /home and /Users."""
    monkeypatch.setenv("HOME", str(tmp_path))
    linux, mac = (PurePosixPath("/", parent, "somebody") for parent in ("home", "Users"))
    other = linux.with_name("model")
    folder = write_run(tmp_path / "run", cache_dir=f"{linux}/cache", pretrained=f"['{tmp_path}/a.pt']")
    text = (folder / "data.json").read_text()
    (folder / "data.json").write_text(text.replace("web/manifest", f"{mac}/web/manifest"))
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 0, "tokens": 0, "number": 1, "temperature": 0, "prompt": f"ls {other}", "text": "a"})
    )
    write_report([str(folder)], str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "somebody" not in html and str(tmp_path) not in html
    assert "~/cache" in html and "~/a.pt" in html and "~/web/manifest" in html
    assert f"ls {other}" in html, "texts of the model are unchanged"


def test_names_differ_between_runs(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", lr="0.1")
    runs = collect_runs([str(first), str(second), str(first)])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_run_and_report_on_s3(
    run_folder: Path, tmp_path: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{s3_bucket}/logs/run"
    for path in run_folder.rglob("*"):
        if path.is_file():
            storage.upload(path, f"{url}/{path.relative_to(run_folder)}")
    main([url, "--out", f"s3://{s3_bucket}/report.html"])
    assert f"s3://{s3_bucket}/report.html: 1 run" in capsys.readouterr().out
    assert collect_run(url).summary == collect_run(str(run_folder)).summary
    assert "fingerprint-web" in storage.read_text(f"s3://{s3_bucket}/report.html")


def test_metrics_of_fine_tuning(tmp_path: Path) -> None:
    lines = [
        {"step": s, "time": 1e9 + s, "train/loss": 0.7 - s / 50, "train/accuracy": 0.5, "train/margin": s / 10,
         "train/tokens": s * 100, "epoch": s / 10}
        for s in range(1, 11)
    ]  # fmt: skip
    write_lines(tmp_path / "dpo" / "metrics.jsonl", lines)
    run = collect_run(str(tmp_path / "dpo"))
    assert run.summary.tokens == 1000 and run.metrics.get("train/margin")[1][-1] == 1.0
    write_report([str(tmp_path / "dpo")], str(tmp_path / "dpo.html"))
    assert "Accuracy of preferences" in (tmp_path / "dpo.html").read_text()


# ---------------------------------------------------------------------------------------------- long runs
def test_thinning_a_million_records_keeps_every_spike() -> None:
    number = 1_000_000
    steps = np.arange(1, number + 1)
    values = np.sin(steps / 1e5) + np.random.default_rng(0).normal(0, 0.01, number)
    places = np.array([3, 777_777, 999_990])
    values[places] = [9.0, 8.0, -7.0]
    values[500_000:500_400] = np.nan
    curve = thin(steps, values, 4000)
    assert len(curve.values) <= 4002 and curve.records_per_point == 500
    assert set(steps[places]) <= set(curve.steps) and curve.steps[[0, -1]].tolist() == [1, number]
    assert (np.diff(curve.steps) > 0).all() and np.array_equal(curve.values, values[curve.steps - 1], equal_nan=True)
    assert curve.means is not None and len(curve.means) == 2000
    assert curve.means[7] == pytest.approx(values[3500:4000].mean())
    assert find_spikes(values)[[0, -1]].tolist() == [777_777, 777_777]
    short = thin(steps[:100], values[:100], 4000)
    assert len(short.values) == 100 and short.records_per_point == 1


def test_spikes_and_stalls() -> None:
    noise = np.random.default_rng(1).normal(3.0, 0.05, 5000).astype(np.float32)
    assert len(find_spikes(noise)) == 0
    noise[[2000, 2001, 4000]] = 6.0
    assert find_spikes(noise).tolist() == [2000, 4000], "neighbors are one spike"
    assert len(find_spikes(np.full(300, np.nan))) == 0 and len(find_spikes(np.ones(5))) == 0
    times = np.arange(100.0) + 1000.0 * (np.arange(100) >= 40)
    assert find_stalls(times).tolist() == [40]
    assert len(find_stalls(np.arange(100.0) * 30)) == 0


def test_clock_of_a_run_converts_steps(run_folder: Path) -> None:
    run = collect_run(str(run_folder))
    clock = run_clock(run, "run")
    assert clock.steps.tolist() == list(range(1, STEPS + 1)) and clock.tokens[-1] == STEPS * STEP_TOKENS
    assert clock.hours[0] == 0 and clock.hours[120] - clock.hours[119] == pytest.approx(600.5 / 3600)


def test_curves_without_tokens_or_times(tmp_path: Path) -> None:
    lines = [
        {key: value for key, value in train_line(s).items() if key in ("step", "train/loss")} for s in range(1, 30)
    ]
    write_lines(tmp_path / "run" / "metrics.jsonl", lines)
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert 'value="step"' in html and 'value="tokens"' not in html
