"""Training with a teacher next to the student, in every layout."""

from __future__ import annotations

from pathlib import Path

import distillation_worker
import pytest
import torch
import torch.nn.functional as F
from distillation_worker import STEPS, VOCAB, Z, batch, create
from parity import on_ranks
from torch import nn

from open_lm.config.registry import DISTILL_LOSSES
from open_lm.data.masking import IGNORE_INDEX, document_ids

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


@pytest.mark.processes
def test_every_layout_trains_as_with_all_logits(tmp_path: Path) -> None:
    distillation_worker.prepare(tmp_path)
    cases = [
        (layout, loss, documents)
        for number, layout in enumerate(LAYOUTS)
        for loss, documents in (("forward-kl", True), (tuple(DISTILL_LOSSES)[1 + number % 3], False))
    ]
    jobs = [
        (distillation_worker.train, str(tmp_path), [*FLAGS, "--distill-loss", loss, *LAYOUTS[layout]], documents)
        for layout, loss, documents in cases
    ]
    for case, found in zip(cases, on_ranks(2, jobs), strict=True):
        for row, expected in zip(found, reference(tmp_path, *case[1:]), strict=True):
            assert row == pytest.approx(expected, rel=1e-5), case
