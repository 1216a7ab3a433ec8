"""Stored distributions of a teacher: unbiased samples, exact alignment with the data, and training on them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import distillation_worker
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_block_source, write_shard, write_source
from run_helpers import tiny_flags, train, train_rows
from torch import Tensor

from open_lm.config.sections import DataConfig
from open_lm.data.hashing import hash_key
from open_lm.data.sources import find_sources
from open_lm.data.teacher_cache import CachedShard, read_settings, shard_problem
from open_lm.errors import ConfigError, DataError
from open_lm.finetune.cache_teacher import main as cache_teacher
from open_lm.finetune.distributions import StoredIds, draw_ids, entropies, most_likely_ids, uniform_numbers
from open_lm.kernels.linear_distillation import (
    DenseTargets,
    DistillationSettings,
    SparseTargets,
    TeacherHead,
    linear_distillation,
)

TEACHER = {
    **{"hidden_dim": 24, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE},
    "ffn_type": "gelu",
}
IDS, DRAWS = 20, 50


def logits() -> Tensor:
    return 2 * torch.randn(3, IDS, generator=torch.Generator().manual_seed(0))


def dense(stored: StoredIds, weights: Tensor) -> Tensor:
    """Return stored weights (E,) as (R, IDS)."""
    rows = torch.repeat_interleave(torch.arange(len(stored.counts)), stored.counts)
    result = torch.zeros(len(stored.counts), IDS, dtype=torch.float64)
    result[rows, stored.ids] = weights.double()
    return result


# --- samples ---------------------------------------------------------------------------------------------------------
def test_the_mean_of_samples_is_the_distribution_but_that_of_the_most_likely_ids_is_not() -> None:
    log_probs, repeats = logits().log_softmax(-1), 2000
    totals = torch.zeros(3, IDS, dtype=torch.float64)
    for seed in range(repeats):
        stored = draw_ids(log_probs, torch.from_numpy(uniform_numbers(seed, 3, DRAWS)))
        assert (stored.counts <= DRAWS).all() and stored.weights.sum() == 3 * DRAWS
        totals += dense(stored, stored.weights)
    # Pearson's test: the sum is chi-squared with IDS - 1 degrees of freedom, whose 99.9th percentile is 43.8.
    expected = log_probs.double().exp() * repeats * DRAWS
    statistics = ((totals - expected).square() / expected).sum(-1)
    assert (statistics < 43.8).all()
    top = most_likely_ids(log_probs, 5)
    truncated = dense(top, top.weights) * repeats * DRAWS
    assert (((truncated - expected).square() / expected).sum(-1) > 1000).all()


def gradient(teacher: Tensor, sparse: SparseTargets | None = None) -> tuple[Tensor, Tensor]:
    """Return the divergence of three tokens and its gradient of the student's logits (3, IDS)."""
    weight = torch.eye(IDS, dtype=torch.float64)
    hidden = torch.linspace(-1, 2, 3 * IDS, dtype=torch.float64).view(3, IDS).requires_grad_()
    target = sparse or DenseTargets(teacher.double(), TeacherHead(weight))
    settings = DistillationSettings(weight=1.0)
    loss = linear_distillation(hidden, weight, torch.zeros(3, dtype=torch.int64), target, settings, ignore_index=-100)
    return loss[0].detach(), torch.autograd.grad(loss[0], hidden)[0]


def as_targets(stored: StoredIds, weights: Tensor, log_probs: Tensor) -> SparseTargets:
    ids = torch.arange(IDS).expand(3, IDS)
    return SparseTargets(ids, dense(stored, weights), entropies(log_probs), IDS)


def test_loss_and_gradient_of_samples_are_unbiased_and_those_of_the_most_likely_ids_are_not() -> None:
    teacher, repeats = logits(), 1000
    log_probs = teacher.log_softmax(-1)
    loss, exact = gradient(teacher)
    losses, gradients = [], []
    for seed in range(repeats):
        stored = draw_ids(log_probs, torch.from_numpy(uniform_numbers(hash_key(seed, 1), 3, DRAWS)))
        value, slope = gradient(teacher, as_targets(stored, stored.weights / DRAWS, log_probs))
        losses.append(value)
        gradients.append(slope)
    found, all_gradients = torch.stack(losses), torch.stack(gradients)
    assert abs(found.mean() - loss) < 4 * found.std() / repeats**0.5
    error = (all_gradients.mean(0) - exact).abs()
    assert (error < 4.5 * all_gradients.std(0) / repeats**0.5 + 1e-9).all()
    top = most_likely_ids(log_probs, 5)
    weights = top.weights / dense(top, top.weights).sum(-1).repeat_interleave(5)
    biased = gradient(teacher, as_targets(top, weights, log_probs))
    assert (biased[1] - exact).abs().max() > 10 * error.max()


def test_numbers_and_draws_depend_on_the_key_only() -> None:
    numbers = uniform_numbers(5, 4, 3)
    assert numbers.min() >= 0 and numbers.max() < 1 and (numbers == uniform_numbers(5, 4, 3)).all()
    certain = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    stored = draw_ids(certain, torch.from_numpy(uniform_numbers(5, 1, 7)))
    assert (stored.counts.tolist(), stored.ids.tolist(), stored.weights.tolist()) == ([1], [1], [7])


# --- caches ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Return the flags of a student, the manifest of three shards, and the flags of the command for a teacher."""
    manifest = write_source(tmp_path / "data", [9, 6, 7])
    teacher = distillation_worker.create(TEACHER, tmp_path, 1)
    with torch.no_grad():
        teacher.output.weight.mul_(50)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    model = ["--model", str(tmp_path / "model_1.json"), "--pretrained", str(tmp_path / "teacher.pt")]
    command = [*model, "--data", manifest, "--data-key", "npy", "--precision", "fp32", "--device", "cpu"]
    return {"student": tiny_flags(tmp_path, tmp_path / "logs"), "data": manifest, "command": command, "path": tmp_path}


def distil(files: dict[str, Any], name: str, *flags: str, steps: int = 4, epochs: int = 1) -> list[dict[str, Any]]:
    """Train the student and return its log lines."""
    train(files["student"], files["data"], steps, "--name", name, *flags, epochs=epochs)
    return train_rows(files["path"] / "logs" / name)


def values(rows: list[dict[str, Any]]) -> list[float]:
    names = ("loss", "ce_loss", "distill_loss", "grad_norm")
    return [row[f"train/{name}"] for row in rows for name in names]


def online(files: dict[str, Any]) -> list[str]:
    path = files["path"]
    teacher = ["--distill-model", str(path / "model_1.json"), "--distill-pretrained", str(path / "teacher.pt")]
    return [*teacher, "--distill-precision", "fp32"]


@pytest.mark.processes
def test_training_on_all_ids_equals_training_with_the_teacher(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = files["path"] / "all"
    options = ["--method", "top-k", "--top-k", str(VOCAB_SIZE), "--temperature", "2", "--output", str(cache)]
    cache_teacher([*files["command"], *options])
    output = capsys.readouterr().out
    assert re.search(r"3 of 3 shards written, 60\d\d.\d bytes per token", output)
    flags = ["--distill-temperature", "2", "--distill-weight", "0.7"]
    expected = distil(files, "online", *flags, *online(files))
    found = distil(files, "offline", *flags, "--distill-cache", str(cache), "--workers", "1")
    assert values(found) == pytest.approx(values(expected), rel=1e-5)
    assert expected[0]["train/loss"] == pytest.approx(
        0.3 * expected[0]["train/ce_loss"] + 0.7 * 4 * expected[0]["train/distill_loss"], rel=1e-5
    )


def test_a_sampled_cache_is_next_to_the_shards_and_resumes_exactly(files: dict[str, Any]) -> None:
    cache_teacher([*files["command"], "--draws", "30", "--batch-size", "4"])
    cache = str(files["path"] / "data" / "teacher")
    assert json.loads(Path(cache, "teacher.json").read_text())["settings"]["count"] == 30
    expected = distil(files, "one", "--distill-cache", cache, *online(files), steps=2, epochs=2)
    assert expected[-1]["train/distill_loss"] > 0
    distil(files, "two", "--distill-cache", cache, steps=2)
    found = distil(files, "two", "--distill-cache", cache, "--resume", "latest", steps=2, epochs=2)
    assert values(found) == pytest.approx(values(expected), rel=1e-6)
    other = str(files["path"] / "other")
    cache_teacher([*files["command"], "--draws", "30", "--batch-size", "5", "--output", other])
    for path in Path(cache).iterdir():
        assert path.read_bytes() == Path(other, path.name).read_bytes()


@pytest.mark.processes
def test_a_killed_command_continues_with_whole_files(files: dict[str, Any]) -> None:
    folder, reference = files["path"] / "killed", files["path"] / "reference"
    command = [sys.executable, "-m", "open_lm.finetune.cache_teacher", *files["command"], "--output", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "1/3 shards" in process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    cache_teacher([*files["command"], "--output", str(reference)])
    complete = {path.name for path in reference.iterdir()}
    assert "00000.safetensors" in {path.name for path in folder.iterdir()}
    kept = (folder / "00000.safetensors").stat().st_mtime_ns
    cache_teacher([*files["command"], "--output", str(folder)])
    assert (folder / "00000.safetensors").stat().st_mtime_ns == kept
    for name in complete:
        assert (folder / name).read_bytes() == (reference / name).read_bytes()


def test_other_settings_and_teachers_do_not_continue_a_cache(files: dict[str, Any]) -> None:
    output = ["--output", str(files["path"] / "cache")]
    cache_teacher([*files["command"], *output])
    with pytest.raises(ConfigError, match=r"count is 20, not 50"):
        cache_teacher([*files["command"], "--draws", "20", *output])
    state = torch.load(files["path"] / "teacher.pt")
    torch.save({name: value + 1e-3 for name, value in state.items()}, files["path"] / "teacher.pt")
    with pytest.raises(ConfigError, match=r"teacher is '\w{32}', not '\w{32}' as there; choose another --output"):
        cache_teacher([*files["command"], *output])
    with pytest.raises(ConfigError, match=r"was made by teacher \w{32}, but --distill-pretrained is teacher \w{32}"):
        distil(files, "wrong", "--distill-cache", output[1], *online(files))


def test_training_rejects_a_cache_that_does_not_fit(files: dict[str, Any]) -> None:
    cache = files["path"] / "cache"
    cache_teacher([*files["command"], "--output", str(cache)])
    flags = ["--distill-cache", str(cache)]
    with pytest.raises(ConfigError, match="has temperature 1: set --distill-temperature 1"):
        distil(files, "a", *flags, "--distill-temperature", "3")
    with pytest.raises(ConfigError, match="--distill-loss jsd needs all of the teacher's probabilities"):
        distil(files, "b", *flags, "--distill-loss", "jsd")
    with pytest.raises(ConfigError, match="made with attention over full sequences, but this run has attention"):
        distil(files, "c", *flags, "--document-mask", "--end-of-text-id", "3")
    with pytest.raises(ConfigError, match="found 2 folders for 1 sources"):
        distil(files, "d", *flags, str(cache))
    with pytest.raises(ConfigError, match=r"no teacher\.json; expected a folder of"):
        distil(files, "e", "--distill-cache", str(files["path"] / "data"))
    path = cache / "00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-500] + bytes(byte ^ 1 for byte in content[-500:]))  # weights of several sequences
    with pytest.raises(DataError, match=r"00001\.safetensors: sequence \d+ has changed since it was written"):
        distil(files, "f", *flags)
    path.unlink()
    with pytest.raises(DataError, match=r"00001\.safetensors: no such file; complete the cache"):
        distil(files, "g", *flags)


def test_a_cache_of_other_data_is_rejected(files: dict[str, Any]) -> None:
    cache = files["path"] / "cache"
    cache_teacher([*files["command"], "--output", str(cache)])
    files["data"] = write_source(files["path"] / "others", [9, 6, 7], source=1)
    with pytest.raises(DataError, match=r"sequence \d+ was made for other token ids"):
        distil(files, "a", "--distill-cache", str(cache))
    files["data"] = write_source(files["path"] / "larger", [9, 6, 8])
    with pytest.raises(DataError, match=r"00002\.safetensors: has 7 sequences, but the shard has 8"):
        distil(files, "b", "--distill-cache", str(cache))


def test_shards_are_compared_by_checksum(files: dict[str, Any]) -> None:
    manifest, cache = write_block_source(files["path"] / "blocks", [5, 5]), str(files["path"] / "cache")
    cache_teacher([*files["command"][:4], "--data", manifest, *files["command"][6:], "--output", cache])
    settings = read_settings(cache)
    assert settings is not None
    (source,) = find_sources(DataConfig(dataset_manifest=[manifest]))
    for shard, size, sha256 in zip(source.shards, source.sizes, source.sha256, strict=True):
        assert not shard_problem(cache, shard, settings, size, sha256)
        assert "was made for a shard with sha256" in shard_problem(cache, shard, settings, size, "1" * 64)
    other = replace(settings, seed=1)
    assert "belongs to another cache (hash" in shard_problem(cache, source.shards[0], other, None, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draws", "0"], "--draws: found 0, expected 1 or more, at most 65535"),
        (["--temperature", "0"], "--temperature: found 0.0, expected a number above 0"),
        (["--end-of-text-id", "3"], "--end-of-text-id has no effect without --document-mask"),
        (["--unknown"], "unrecognized arguments: --unknown; see --help for all flags"),
        (["--num-ids", "1001"], "--num-ids 1001: the teacher has 1000 ids"),
        (["--output", "s3://bucket/x"], "--output s3://bucket/x: expected a local folder"),
    ],
)
def test_invalid_flags_of_the_command(files: dict[str, Any], flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cache_teacher([*files["command"], *flags])


def test_sequences_of_several_lengths_are_an_error_and_short_ones_have_no_distributions(files: dict[str, Any]) -> None:
    folder = files["path"] / "mixed"
    folder.mkdir()
    lengths = (SEQ_LEN + 1, 4, SEQ_LEN + 1)
    write_shard(folder / "00000001.tar", [sequence(0, 0, n, length) for n, length in enumerate(lengths)])
    command = [*files["command"], "--data", str(folder / "00000001.tar"), "--output", str(folder / "cache")]
    cache_teacher(command)
    counts = CachedShard(str(folder / "cache"), "00000001.tar").arrays["counts"]
    assert counts[1].sum() == 0 and (counts[[0, 2]] > 0).all()
    write_shard(folder / "00000002.tar", [sequence(0, 0, n, length) for n, length in enumerate((SEQ_LEN + 1, 12))])
    command[command.index("--data", 8) + 1] = str(folder / "00000002.tar")
    with pytest.raises(DataError, match="sequence 1 has 12 ids, but the first of the data set has 9"):
        cache_teacher([*command[:-1], str(folder / "other")])
