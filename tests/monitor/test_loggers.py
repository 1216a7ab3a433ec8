"""Log messages, metrics and files of a run, read back with the usual programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from open_lm import storage
from open_lm.config.sections import LoggingConfig
from open_lm.errors import ConfigError
from open_lm.monitor.loggers import (
    JsonLinesLogger,
    append_line,
    build_loggers,
    close_logging,
    parse_report_to,
    setup_logging,
)
from open_lm.monitor.run_folder import RunPaths, copy_codebase, write_params
from open_lm.storage.redaction import redact


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    close_logging()
    logging.getLogger().setLevel(level)


def paths_in(tmp_path: Path) -> RunPaths:
    paths = RunPaths(str(tmp_path / "logs"), "run")
    paths.prepare(None)
    return paths


def config(tmp_path: Path, report_to: str = "") -> LoggingConfig:
    return LoggingConfig(logs=str(tmp_path / "logs"), report_to=report_to, wandb_project_name="open_lm_test")


# ---------------------------------------------------------------------------------------------- messages
def test_console_and_log_file_have_the_documented_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "out.log"
    setup_logging(str(log))
    logging.info("first")
    logging.debug("below the level")
    setup_logging(str(log))  # the next run in this process appends to the file and writes each line once
    logging.warning("second")
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    pattern = r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| %s \| %s"
    for line, (level, message) in zip(lines, (("INFO", "first"), ("WARNING", "second")), strict=True):
        assert re.fullmatch(pattern % (level, message), line)
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.processes
def test_the_log_file_continues_after_the_console_is_closed(tmp_path: Path) -> None:
    log = tmp_path / "out.log"
    code = (
        "import logging, os; from open_lm.monitor.loggers import setup_logging\n"
        f"setup_logging({str(log)!r}); logging.info('one'); os.read(0, 1); logging.info('two'); logging.info('three')"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        assert b"one" in process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"x")
        process.stdin.close()
        errors = process.stderr.read()
    assert b"Logging error" not in errors
    assert [line.split(" | ")[-1] for line in log.read_text().splitlines()] == ["one", "two", "three"]


def test_secrets_in_messages_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    setup_logging(str(tmp_path / "out.log"))
    logging.info("key 0123456789abcdef0123 at https://me:pw@host/x")
    assert (tmp_path / "out.log").read_text().endswith("key *** at https://***@host/x\n")


# ---------------------------------------------------------------------------------------------- metrics.jsonl
def read_lines(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_metrics_are_one_json_object_per_line(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    loggers = build_loggers(config(tmp_path), paths, {})
    loggers.log({"train/loss": torch.tensor(2.5), "train/tokens": 64, "val/data": ["a"], "x": math.nan}, step=1)
    loggers.log({"train/loss": float("inf")}, step=2)
    loggers.close()
    first, second = read_lines(paths.metrics)
    assert first.pop("time") and second.pop("time")
    assert first == {"step": 1, "train/loss": 2.5, "train/tokens": 64, "val/data": ["a"], "x": None}
    assert second == {"step": 2, "train/loss": None}


def test_metrics_of_a_resumed_run_contain_each_step_once(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    logger = JsonLinesLogger(path)
    for step in range(1, 8):
        logger.log({"loss": step}, step)
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # the process was killed while writing a line
    resumed = JsonLinesLogger(path, start_step=5)
    for step in range(6, 9):
        resumed.log({"loss": -step}, step)
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, -6), (7, -7), (8, -8),
    ]  # fmt: skip


def test_append_line_to_local_and_remote_files(tmp_path: Path) -> None:
    for path in (str(tmp_path / "new" / "results.jsonl"), "memory://loggers-test/results.jsonl"):
        append_line(path, "[1]")
        append_line(path, "[2]\n")
        assert storage.read_text(path) == "[1]\n[2]\n"


# ---------------------------------------------------------------------------------------------- TensorBoard and wandb
def test_tensorboard_files_can_be_read_and_resumed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = paths_in(tmp_path)
    loggers = build_loggers(config(tmp_path, "tensorboard"), paths, {})
    for step in range(1, 7):
        loggers.log({"train/loss": 10.0 - step, "note": "text"}, step)
    loggers.close()
    loggers = build_loggers(config(tmp_path, "tensorboard"), paths, {}, start_step=4)
    loggers.log({"train/loss": 0.5}, 5)
    loggers.close()
    events = EventAccumulator(paths.tensorboard)
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 0.5),
    ]  # fmt: skip


@pytest.mark.processes
def test_offline_wandb_stores_the_run_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    paths = paths_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        loggers = build_loggers(config(tmp_path, "wandb"), paths, {"lr": 0.1, "remote_sync": "https://u:secret12@h/x"})
    assert "no Weights & Biases API key was found" in caplog.text
    loggers.log({"train/loss": 1.5}, 1)
    loggers.log({"train/loss": 1.25}, 2)
    loggers.log_texts({"samples/1 (greedy)": "a <b>"}, 2)
    loggers.close()
    (folder,) = Path(paths.root, "wandb").glob("offline-run-*")
    (recorded,) = folder.glob("*.wandb")
    assert recorded.name == "run-run.wandb"
    data = recorded.read_bytes()
    assert b"train/loss" in data and b"1.25" in data and b"open_lm_test" in data
    (table,) = folder.glob("files/media/table/*.table.json")
    assert json.loads(table.read_text())["data"] == [["samples/1 (greedy)", "a <b>"]]
    assert not any(b"secret12" in file.read_bytes() for file in folder.rglob("*") if file.is_file())


TRACKIO = """
import sys
connections = []
def record(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        connections.append((event, str(arguments)))
sys.addaudithook(record)
from open_lm.config.sections import LoggingConfig
from open_lm.monitor.loggers import build_loggers
from open_lm.monitor.run_folder import RunPaths
for start_step in (-1, 2):  # a new run, and the same one resumed
    cfg = LoggingConfig(logs=sys.argv[1], report_to="trackio", wandb_project_name="a b")
    loggers = build_loggers(cfg, RunPaths(sys.argv[1], "run"), {"lr": 0.1, "notes": "https://u:secret12@h"}, start_step)
    for step in (1, 2):
        loggers.log({"train/loss": 1.0 / step, "tokens": 8, "val/data": ["a"]}, max(start_step, 0) + step)
    loggers.log_texts({"samples/1 (greedy)": "a <b>"}, 2)
    loggers.close()
assert not connections, connections
"""


@pytest.mark.processes
def test_trackio_stores_runs_on_this_machine_and_uses_no_network(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "db"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "logs")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    (database,) = (tmp_path / "db").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    rows = [(name, step, json.loads(values)) for _, name, step, values in found]
    assert len({row[0] for row in found}) == 1, "a resumed run continues"
    assert rows[0] == ("run", 1, {"train/loss": 1.0, "tokens": 8})
    assert [step for _, step, _ in rows] == [1, 2, 2, 3, 4, 2]
    assert "a <b>" in json.dumps(rows[2][2]["samples/1 (greedy)"])
    assert b"secret12" not in database.read_bytes()


@pytest.mark.parametrize(
    "package, name", [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard"), ("trackio", "trackio")]
)
def test_missing_packages_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"--report-to {name}: the package {name} is not installed.*pip install"):
        build_loggers(config(tmp_path, name), paths_in(tmp_path), {})


# ---------------------------------------------------------------------------------------------- --report-to
@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("wandb", ["wandb"]),
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
        (" Tensorboard , tensorboard", ["tensorboard"]),
        ("all", ["tensorboard", "wandb"]),
        ("trackio,all", ["trackio", "tensorboard", "wandb"]),
    ],
)
def test_report_to(text: str, expected: list[str]) -> None:
    assert parse_report_to(text) == expected


def test_all_unknown_loggers_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"found 'mlflow', 'comet', expected tensorboard, wandb, trackio, all"):
        parse_report_to("mlflow,wandb,comet")


def test_other_ranks_and_runs_without_logs_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for logs, is_master in (("none", True), ("logs", False)):
        paths = RunPaths(logs, "run")
        paths.prepare(None) if is_master else None
        loggers = build_loggers(LoggingConfig(logs=logs, report_to="all"), paths, {}, is_master=is_master)
        loggers.log({"x": 1.0}, 1)
        loggers.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the run folder
def test_params_are_sorted_lines_with_secrets_redacted(tmp_path: Path) -> None:
    args = argparse.Namespace(
        name="run",
        lr=0.003,
        beta2=0.95,
        train_data=[
            "pipe:curl -H 'Authorization: Bearer tok123' https://h/x?X-Amz-Signature=abc&part=1 -",
            "s3://b/{1..2}.tar",
        ],
        val_data_key=["npy"],
        remote_sync="https://user:hunter2@host/logs",
        wandb_notes="uses hf_abcdefghijklmnopqrstuvwxyz and AKIAABCDEFGHIJKLMNOP",
        resume=None,
    )
    write_params(str(tmp_path / "params.txt"), args)
    assert (tmp_path / "params.txt").read_text().splitlines() == [
        "beta2: 0.95",
        "lr: 0.003",
        "name: run",
        "remote_sync: https://***@host/logs",
        "resume: None",
        "train_data: [\"pipe:curl -H 'Authorization: Bearer ***' https://h/x?X-Amz-Signature=***&part=1 -\", 's3://b/{1..2}.tar']",
        "val_data_key: ['npy']",
        "wandb_notes: uses *** and ***",
    ]


def test_only_values_of_secret_environment_variables_are_redacted(tmp_path: Path) -> None:
    home = str(tmp_path)
    environ = {"MY_API_KEY": "verysecretvalue", "HOME": home, "AWS_SECRET_ACCESS_KEY": "short"}
    text = f"AWS_SECRET_ACCESS_KEY=abc verysecretvalue {home}/a short --token=xyz s3://bucket/key@2"
    assert redact(text, environ) == f"AWS_SECRET_ACCESS_KEY=*** *** {home}/a short --token=*** s3://bucket/key@2"


def test_an_existing_run_needs_resume_latest(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    Path(paths.metrics).write_text("{}\n")
    with pytest.raises(ConfigError, match=r"--name run: the run already exists.*--resume latest"):
        paths.prepare(None)
    with pytest.raises(ConfigError, match="already exists"):
        paths.prepare("other/epoch_1.pt")
    paths.prepare("latest")
    with pytest.raises(ConfigError, match="--remote-sync s3://b/logs"):
        RunPaths("s3://b/logs", "run").prepare(None)


def test_the_source_is_copied(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    folder = Path(copy_codebase(paths))
    assert (folder / "open_lm" / "monitor" / "run_folder.py").is_file()
    assert not list(folder.rglob("__pycache__")) and not list(folder.glob("*.copying"))
    assert copy_codebase(paths) == str(folder)
