"""Runs with muP: resume, evaluate, refuse another parametrization, adapters, exports as a start of other runs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source
from run_helpers import tiny_flags, train
from torch import Tensor

from open_lm.checkpoint import load_weights, read_model_state
from open_lm.config.sections import ModelConfig
from open_lm.errors import CheckpointError
from open_lm.evaluate.checkpoints import load_checkpoint
from open_lm.finetune.merge import main as merge
from open_lm.finetune.pruning import shape_of, student_keys
from open_lm.hf.convert import main as convert
from open_lm.model.params import create_params, params_from_keys
from open_lm.model.transformer import Transformer

MUP = ("--mup", "--mup-base-width", "4")  # m is 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data and a run of two epochs."""
    folder = tmp_path_factory.mktemp("mup")
    write_source(folder / "data", [40])
    train_in(folder, "run", *MUP)
    return folder


def train_in(folder: Path, name: str, *more: str, epochs: int = 2) -> None:
    data = str(folder / "data/manifest.jsonl")
    train(tiny_flags(folder, logs=folder), data, 2, "--name", name, "--optimizer", "muon", *more, epochs=epochs)


def weights(folder: Path, run: str, epoch: int = 2) -> str:
    return str(folder / run / f"checkpoints/epoch_{epoch}.pt")


@torch.no_grad()
def logits(checkpoint: str) -> Tensor:
    ids = torch.randint(0, VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    result: Tensor = load_checkpoint(checkpoint)(ids)[0]
    return result


@pytest.mark.parametrize("checkpoint", ["epoch_1.pt", "step_00000002"])
def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, checkpoint: str) -> None:
    train_in(folder, f"from_{checkpoint}", *MUP, "--resume", str(folder / "run/checkpoints" / checkpoint))
    resumed, full = (read_model_state(weights(folder, run))[0] for run in (f"from_{checkpoint}", "run"))
    assert all(torch.equal(resumed[name], value) for name, value in full.items())


def test_weights_are_refused_with_another_parametrization(folder: Path) -> None:
    saved = r"was trained with --mup --mup-base-width 4 --mup-base-head-dim 2"
    other = ("--mup", "--mup-base-width", "8")
    for name, more in (
        ("resumed", (*other, "--resume", weights(folder, "run", 1))),
        ("sharded", (*other, "--resume", str(folder / "run/checkpoints/step_00000002"))),
        ("pretrained", ("--pretrained", weights(folder, "run"))),
        ("average", (*other, "--average", weights(folder, "run"), weights(folder, "run", 1))),
        ("heads", (*MUP, "--mup-base-head-dim", "8", "--pretrained", weights(folder, "run"))),
    ):
        with pytest.raises(CheckpointError, match=saved):
            train_in(folder, name, *more)
    train_in(folder, "equal", "--mup", "--mup-base-width", "16", epochs=1)  # all factors are 1
    train_in(folder, "standard", "--pretrained", weights(folder, "equal", 1), epochs=1)


def test_weights_are_compared_whatever_kernels_or_files_this_machine_has(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    copytree(folder / "run", run)
    model = Transformer(create_params(ModelConfig(model=str(folder / "model.json"))))
    settings = (run / "params.txt").read_text()
    for name, value, found in (("attn_name", "sdpa_flash", "CheckpointError"), ("model", "gone", "a warning")):
        changed = re.sub(rf"^{name}: .*$", f"{name}: {value}", settings, flags=re.MULTILINE)
        assert changed != settings
        (run / "params.txt").write_text(changed)
        if found == "a warning":
            load_weights(weights(tmp_path, "run"), model)
            assert "(--mup) is not compared with that of this run: --model gone: unknown model" in caplog.text
        else:
            with pytest.raises(CheckpointError, match=r"was trained with --mup .* but this run is without --mup"):
                load_weights(weights(tmp_path, "run"), model)


def test_an_export_starts_runs_of_the_standard_parametrization(folder: Path, tmp_path: Path) -> None:
    convert(["export", str(folder / "run"), str(tmp_path / "export"), "--verify"])
    assert torch.allclose(logits(str(tmp_path / "export")), logits(weights(folder, "run")), atol=1e-5)
    start = ("--pretrained", str(tmp_path / "export"))
    train_in(folder, "again", *start, epochs=1)
    with pytest.raises(CheckpointError, match=r"was trained without --mup, but this run is with --mup .*remove --mup"):
        train_in(folder, "refused", *MUP, *start)


def test_adapters_of_a_run_merge_into_native_and_exported_weights(folder: Path, tmp_path: Path) -> None:
    lora = ("--lora", "r=2,targets=all-linear,dora=true", "--pretrained", weights(folder, "run"))
    train_in(folder, "lora", *MUP, *lora, epochs=1)
    expected = logits(weights(folder, "lora", 1))
    assert not torch.allclose(expected, logits(weights(folder, "run")), atol=1e-4)
    merge([str(folder / "lora"), str(tmp_path / "native")])
    assert torch.allclose(logits(str(tmp_path / "native/epoch_1.pt")), expected, atol=1e-5)
    convert(["export", str(folder / "run"), str(tmp_path / "base")])
    adapter = str(folder / "lora/checkpoints/adapter_1")
    merge([adapter, str(tmp_path / "merged"), "--base", str(tmp_path / "base")])
    assert torch.allclose(logits(str(tmp_path / "merged")), expected, atol=1e-5)


def test_the_log_states_the_factors(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train_in(folder, "logged", *MUP, "--lr", "0.5", epochs=1)
    (message,) = [message for message in caplog.messages if message.startswith("muP:")]
    assert "width 16 is 4 times that of the base model" in message
    assert "AdamW x 0.25, Muon x 0.5" in message and "logits x 0.25" in message and "attention scores x 0.5" in message


def test_a_pruned_student_keeps_the_parametrization(folder: Path) -> None:
    params: Any = load_checkpoint(weights(folder, "run")).params
    student = params_from_keys(student_keys(params, [0], shape_of(params)))
    assert student.parametrization == params.parametrization and not student.parametrization.is_standard
