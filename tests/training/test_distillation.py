"""Training with a teacher next to the student, in every layout, and teachers that cannot be used."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distillation_worker
import pytest
import torch
import torch.nn.functional as F
from data_helpers import SEQ_LEN, VOCAB_SIZE
from distillation_worker import STEPS, VOCAB, Z, batch, create
from parity import on_ranks
from run_helpers import tiny_flags, train, train_rows
from tokenizer_helpers import write_data, write_tokenizer
from torch import nn

from open_lm.config.registry import DISTILL_LOSSES
from open_lm.data.masking import IGNORE_INDEX, document_ids
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.hf.exporting import export_model

WEIGHT, TEMPERATURE = 0.3, 2.0
FLAGS = ["--distill-weight", str(WEIGHT), "--distill-temperature", str(TEMPERATURE)]


def reference(folder: Path, loss: str, documents: bool) -> list[list[float]]:
    """Return the results of `distillation_worker.train`, from all logits in one process."""
    student, teacher = create({}, folder, 5), create({}, folder, 1)
    teacher.load_state_dict(torch.load(folder / "teacher.pt"))
    teacher.eval()
    optimizer, numbers = torch.optim.SGD(student.parameters(), lr=0.1), []
    for step in range(STEPS):
        ids, targets = batch(step)
        masks = {"document_ids": document_ids(ids, distillation_worker.EOT)} if documents else {}
        logits = student(ids, **masks)[0][..., :VOCAB].flatten(0, 1)
        with torch.no_grad():
            teacher_logits = teacher(ids, **masks)[0][..., :VOCAB].flatten(0, 1)
        valid = targets.flatten() != IGNORE_INDEX
        log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, teacher_logits))
        log_m = ((log_q.exp() + log_p.exp()) / 2).log()
        values = {
            "forward-kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "reverse-kl": (log_q.exp() * (log_q - log_p)).sum(-1),
            "jsd": ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2,
            "mse": (logits - teacher_logits).square().mean(-1),
        }[loss]
        divergence = (values * valid).sum() / valid.sum()
        cross_entropy = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
        z_loss = Z * (logits.logsumexp(-1).square() * valid).sum() / valid.sum()
        scale = 1.0 if loss == "mse" else TEMPERATURE**2
        total = (1 - WEIGHT) * cross_entropy + WEIGHT * scale * divergence + z_loss
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
        optimizer.step()
        numbers.append([total.item(), cross_entropy.item(), divergence.item(), norm.item()])
    return numbers


LAYOUTS = {
    "ddp": [],
    "accumulation": ["--accum-freq", "2"],
    "fsdp": ["--fsdp"],
    "tensor": ["--tensor-parallel", "2"],
    "fsdp tensor": ["--fsdp", "--tensor-parallel", "2", "--accum-freq", "2"],
    "context": ["--context-parallel", "2"],
}


@pytest.mark.parametrize("loss", DISTILL_LOSSES)
@pytest.mark.parametrize("documents", [False, True])
def test_one_process_trains_as_with_all_logits(loss: str, documents: bool, tmp_path: Path) -> None:
    distillation_worker.prepare(tmp_path)
    found = distillation_worker.train(str(tmp_path), [*FLAGS, "--distill-loss", loss], documents)
    for row, expected in zip(found, reference(tmp_path, loss, documents), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_compiled_blocks_of_student_and_teacher_train_as_with_all_logits(tmp_path: Path) -> None:
    distillation_worker.prepare(tmp_path)
    torch._dynamo.reset()
    # The backend traces graphs like the default one but generates no code, which would be slow.
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        found = distillation_worker.train(str(tmp_path), [*FLAGS, "--torchcompile"])
    for row, expected in zip(found, reference(tmp_path, "forward-kl", False), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.processes
def test_every_layout_trains_as_with_all_logits(tmp_path: Path) -> None:
    distillation_worker.prepare(tmp_path)
    losses = tuple(DISTILL_LOSSES)
    cases = [(layout, losses[number % 4], number % 2 == 0, False) for number, layout in enumerate(LAYOUTS)]
    cases += [("context", "forward-kl", True, False), ("tensor", "mse", False, False)]
    cases += [(layout, "forward-kl", False, True) for layout in ("fsdp tensor", "context")]
    jobs = [
        (
            distillation_worker.train,
            str(tmp_path),
            [*FLAGS, "--distill-loss", loss, *LAYOUTS[layout]],
            documents,
            is_stored,
        )
        for layout, loss, documents, is_stored in cases
    ]
    for case, found in zip(cases, on_ranks(2, jobs), strict=True):
        for row, expected in zip(found, reference(tmp_path, *case[1:3]), strict=True):
            assert row == pytest.approx(expected, rel=1e-5), case


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train a teacher on data of a tokenizer; return the folders and the flags of a student."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    data, flags = write_data(folder / "data", tokenizer), tiny_flags(folder, folder / "logs")
    train(flags, data, 2, "--name", "teacher", "--ffn-type", "gelu")
    return {"folder": folder, "data": data, "flags": [*flags, "--distill-precision", "fp32"], "tokenizer": tokenizer}


def distil(runs: dict[str, Any], name: str, *flags: str, steps: int = 2, epochs: int = 1) -> list[list[float]]:
    """Train a student; return the loss, its terms and the gradient norm of each step."""
    train(runs["flags"], runs["data"], steps, "--name", name, *flags, epochs=epochs)
    names = ("loss", "ce_loss", "distill_loss", "grad_norm")
    return [[row[f"train/{value}"] for value in names] for row in train_rows(runs["folder"] / "logs" / name)]


def test_a_teacher_is_a_run_or_a_checkpoint_or_an_exported_folder(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    teacher = str(folder / "logs" / "teacher")
    expected = distil(runs, "run", "--distill-pretrained", teacher, steps=2, epochs=2)
    assert all(row[2] > 0 for row in expected)
    distil(runs, "resumed", "--distill-pretrained", teacher, steps=2)
    resumed = distil(runs, "resumed", "--distill-pretrained", teacher, "--resume", "latest", steps=2, epochs=2)
    assert resumed == [pytest.approx(row, rel=1e-6) for row in expected]
    weights = f"{teacher}/checkpoints/epoch_1.pt"
    model = ["--distill-model", f"{teacher}/model.json", "--distill-pretrained", weights]
    assert distil(runs, "checkpoint", *model)[0] == pytest.approx(expected[0], rel=1e-6)
    export_model(teacher, str(folder / "exported"))
    exported = distil(runs, "exported", "--distill-model", str(folder / "exported"))
    assert exported[0] == pytest.approx(expected[0], rel=1e-5)


def test_a_student_of_transformers_learns_from_a_native_teacher(runs: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = runs["folder"] / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **shape)).save_pretrained(student)
    flags = ["--hf-model", str(student), "--hf-seq-len", str(SEQ_LEN), "--distill-weight", "0.9"]
    (first, *_, last) = distil(
        runs, "llama", *flags, "--distill-pretrained", str(runs["folder"] / "logs" / "teacher"), steps=6
    )
    assert first[0] == pytest.approx(0.1 * first[1] + 0.9 * first[2], rel=1e-5)
    assert last[2] < first[2]


def test_a_teacher_with_another_tokenizer_is_rejected_with_both_fingerprints(runs: dict[str, Any]) -> None:
    other = write_tokenizer(runs["folder"] / "reversed.json", reverse=True)
    data = write_data(runs["folder"] / "other", other)
    flags = ["--distill-pretrained", str(runs["folder"] / "logs" / "teacher")]
    with pytest.raises(DataError, match="different ids") as error:
        train(runs["flags"], data, 1, "--name", "other", *flags)
    for tokenizer in (other, runs["tokenizer"]):
        assert tokenizer.fingerprint[:12] in str(error.value)
    assert "the run of" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--distill-model", "open_lm_11m"],
            "open_lm_11m is an architecture without weights; set",
        ),
        (["--distill-pretrained", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--distill-weight", "1.5"], "--distill-weight: found 1.5, expected a fraction from 0 to 1"),
        (["--distill-temperature", "0"], "--distill-temperature: found 0.0, expected a number above 0"),
        (["--distill-loss", "kl"], "--distill-loss: found 'kl', expected one of forward-kl, reverse-kl, jsd, mse"),
    ],
)
def test_bad_flags(runs: dict[str, Any], flags: list[str], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(message)):
        train(runs["flags"], runs["data"], 1, "--name", "bad", *flags)


def test_a_teacher_without_ids_of_the_data_is_rejected(runs: dict[str, Any]) -> None:
    folder = runs["folder"] / "small"
    folder.mkdir()
    small = create({**distillation_worker.TEACHER, "vocab_size": 40}, folder, 1)
    torch.save(small.state_dict(), folder / "teacher.pt")
    teacher = ["--distill-model", str(folder / "model_1.json"), "--distill-pretrained", str(folder / "teacher.pt")]
    with pytest.raises(ConfigError, match="the teacher has 40 token ids, but the data have 258"):
        train(runs["flags"], runs["data"], 1, "--name", "small", *teacher)


def test_settings_without_a_teacher_have_no_effect(runs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    train(runs["flags"], runs["data"], 1, "--name", "none", "--distill-temperature", "2")
    reason = "has no effect without --distill-model, --distill-pretrained or --distill-cache"
    assert f"--distill-temperature {reason}" in caplog.text
