"""Train a small student with a teacher of another architecture, in any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, ModelConfig
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.finetune.distillation import build_distillation
from open_lm.kernels.sparse_targets import SparseTargets
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Transformer, create_model
from open_lm.parallel.parallelize import parallelize
from open_lm.training.step import StepOptions, train_step

BATCH_SIZE, SEQ_LEN, VOCAB, STEPS, EOT, Z = 8, 12, 31, 2, 3, 1e-2
STUDENT = {
    **{"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 36, "qk_norm": True},
    "unpadded_vocab_size": VOCAB,
}
TEACHER = {
    **{"hidden_dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 40},
    **{"ffn_type": "gelu", "model_norm": "rms_norm", "weight_tying": True, "unpadded_vocab_size": VOCAB + 2},
    **{"ffn_dim": 64, "logit_soft_cap": 5.0},
}


def create(architecture: dict[str, Any], folder: Path, seed: int) -> Transformer:
    """Create a model with initial weights of a seed; its JSON file is written to `folder`."""
    path = folder / f"model_{seed}.json"
    if not path.exists():
        path.write_text(json.dumps(architecture))
    with torch.device("meta"):
        model = create_model(ModelConfig(model=str(path)))
    model.to_empty(device="cpu")
    init_weights(model, seed)
    return model


def prepare(folder: Path) -> None:
    """Write the teacher's architecture and weights. Its logits differ more than those of initial weights do."""
    create(STUDENT, folder, 5)
    teacher = create(TEACHER, folder, 1)
    with torch.no_grad():
        teacher.output.weight.mul_(20)
    torch.save(teacher.state_dict(), folder / "teacher.pt")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B,T) of a global batch, with a third of the targets masked."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH_SIZE, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(BATCH_SIZE, SEQ_LEN, generator=generator) < 1 / 3] = IGNORE_INDEX
    targets[0] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), targets


def config(folder: str, flags: list[str]) -> Config:
    teacher = ["--distill-model", f"{folder}/model_1.json", "--distill-pretrained", f"{folder}/teacher.pt"]
    flags = [*teacher, "--distill-precision", "fp32", "--dataset-type", "synthetic", "--precision", "fp32", *flags]
    return Config.from_namespace(parse_args(["--model", f"{folder}/model_5.json", *flags]))


@torch.no_grad()
def stored_targets(folder: str, ids: Tensor, temperature: float) -> SparseTargets:
    """Return the teacher's probabilities of all ids that the student has, as a cache stores them, for ids (B,T)."""
    teacher = create(TEACHER, Path(folder), 1).eval()
    teacher.load_state_dict(torch.load(f"{folder}/teacher.pt"))
    log_probs = (teacher(ids)[0][..., :VOCAB] / temperature).log_softmax(-1)
    all_ids = torch.arange(VOCAB).expand(log_probs.shape)
    return SparseTargets(all_ids, log_probs.exp(), -(log_probs.exp() * log_probs).sum(-1), VOCAB)


def train(folder: str, flags: list[str], documents: bool = False, is_stored: bool = False) -> list[list[float]]:
    """Return [loss, cross entropy, divergence, gradient norm] of each step of plain gradient descent.

    is_stored: use stored distributions in place of the teacher.
    """
    cfg = config(folder, flags)
    runtime = init_runtime(cfg.parallel)
    layout = build_layout(runtime, cfg.parallel)
    end_of_text_id = EOT if documents else None
    with torch.device("meta"):
        student = create_model(cfg.model)
    params = student.params
    model = parallelize(
        student,
        layout,
        cfg.parallel,
        device=runtime.device,
        model_cfg=cfg.model,
        initialise=lambda module: init_weights(module, 5),
    )
    loader: Any = SimpleNamespace(sources=(), cache=None)
    distillation = build_distillation(cfg, runtime, layout, params, loader, end_of_text_id)
    assert distillation is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = StepOptions(
        runtime,
        layout,
        get_autocast("fp32"),
        accum_freq=cfg.optim.accum_freq,
        z_loss_coefficient=Z,
        end_of_text_id=end_of_text_id,
        distillation=replace(distillation, teacher=None) if is_stored else distillation,
    )
    size, numbers = BATCH_SIZE // layout.data_size, []
    for step in range(STEPS):
        local = slice(layout.data_rank * size, (layout.data_rank + 1) * size)
        inputs, targets = (tensor[local] for tensor in batch(step))
        stored = stored_targets(folder, inputs, cfg.distillation.distill_temperature) if is_stored else None
        result = train_step(model, inputs, targets, optimizer, options, stored=stored)
        values = [result.values[name].item() for name in ("loss", "ce_loss", "distill_loss")]
        numbers.append([*values, result.grad_norm.item()])
    shutdown(runtime)
    return numbers
