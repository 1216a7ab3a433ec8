"""Test runs that resume with another number of ranks or workers, or in another layout.

Each sequence of the data order is trained on once, in order, and the weights are the same in every layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, places, sequence, write_source
from elastic_worker import JOBS, OPTIMIZERS, SINGLE, Run, do_jobs
from rank_processes import on_ranks
from recording_worker import recording

from open_lm.config.sections import DataConfig
from open_lm.data.order import DataOrder, OrderSettings, choose_lanes
from open_lm.data.sources import find_sources
from open_lm.main import main

pytestmark = pytest.mark.processes

BATCH, STEPS, SEED = 4, 10, 11
Batches = dict[int, list[tuple[int, ...]]]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    (tmp_path / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    manifests = [write_source(tmp_path / "a", [7, 5, 8], 0), write_source(tmp_path / "b", [13, 7], 1)]
    return [
        "--model", str(tmp_path / "model.json"), "--dataset-manifest", *manifests, "--data-key", "npy", "--epochs", "2",
        "--train-num-samples", str(STEPS * BATCH * SEQ_LEN // 2), "--global-batch-size", str(BATCH), "--warmup", "2",
        "--precision", "fp32", "--log-every-n-steps", "1", "--seed", str(SEED), "--lr", "1e-2",
    ]  # fmt: skip


def expected_batches(flags: list[str]) -> Batches:
    """Return the sequences of each step from the data order."""
    start = flags.index("--dataset-manifest")
    sources = find_sources(DataConfig(dataset_manifest=flags[start + 1 : start + 3]))
    samples = DataOrder(sources, SEED, OrderSettings(lanes=choose_lanes(BATCH))).take(STEPS * BATCH)
    ids = [sequence(*place) for place in zip(*(a.tolist() for a in samples[:3]), strict=True)]
    rows = places(np.stack(ids))
    return {step: sorted(rows[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)}


def recorded_batches(folder: Path) -> Batches:
    """Return the sequences that all ranks together trained on in each step."""
    batches: Batches = {}
    for path in folder.iterdir():
        for line in map(json.loads, path.read_text().splitlines()):
            batches.setdefault(line["step"], []).extend(tuple(row) for row in line["rows"])
    return {step: sorted(rows) for step, rows in sorted(batches.items())}


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_resuming_with_other_numbers_of_ranks_and_workers(
    flags: list[str], tmp_path: Path, ranks: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    continuous, resumed = tmp_path / "continuous", tmp_path / "resumed"
    continuous.mkdir()
    resumed.mkdir()
    with recording(continuous, 0):
        main([*flags, "--name", "continuous", "--workers", "0"])
    resume_flags = [*flags, "--name", "resumed", "--resume", "latest"]
    with recording(resumed, 3):
        main([*resume_flags, "--workers", "1"])
    ranks(2, "recording_worker", str(resumed), "5", *resume_flags, "--workers", "2", "--fsdp")
    ranks(4, "recording_worker", str(resumed), "8", *resume_flags, "--workers", "1")
    with recording(resumed, 0):
        main([*resume_flags, "--workers", "0"])
    expected = expected_batches(flags)
    assert recorded_batches(continuous) == expected
    assert recorded_batches(resumed) == expected
    rows = [row for batch in expected.values() for row in batch]
    assert len(rows) == len(set(rows)) == 40, "one pass over both sources has each sequence once"
    resumed_losses, expected_losses = losses(tmp_path / "logs/resumed"), losses(tmp_path / "logs/continuous")
    assert [step for step, _ in resumed_losses] == list(range(1, STEPS + 1))
    assert [loss for _, loss in resumed_losses] == pytest.approx([loss for _, loss in expected_losses], abs=1e-5)


def test_any_layout_resumes_from_any_other(tmp_path: Path) -> None:
    for optimizer in OPTIMIZERS:
        (tmp_path / optimizer).mkdir()
    on_ranks(do_jobs, tmp_path, 4)
    on_ranks(do_jobs, tmp_path, 2)
    do_jobs(0, tmp_path)
    on_ranks(do_jobs, tmp_path, 8)
    for optimizer in OPTIMIZERS:
        expected = Run(SINGLE, optimizer, seed=1).train(range(6))
        for ranks, jobs in JOBS.items():
            for job, job_losses in zip(jobs, torch.load(tmp_path / optimizer / f"losses_{ranks}.pt"), strict=True):
                expected_losses = expected[job.steps.start : job.steps.stop]
                assert job_losses == pytest.approx(expected_losses, abs=1e-5), (optimizer, ranks, job)
        Run(SINGLE, optimizer, seed=3).load(tmp_path / optimizer / "eight")
