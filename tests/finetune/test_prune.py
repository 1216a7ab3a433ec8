"""Pruned students compared with their teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source
from distillation_worker import create
from torch import Tensor

from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.finetune.prune import main as prune
from open_lm.finetune.pruning import measure
from open_lm.generate import load_model_for_generation
from open_lm.model.transformer import Transformer

SHAPE = {"hidden_dim": 24, "n_layers": 3, "n_heads": 4, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "ffn_dim": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "swiglu": {"weight_tying": True},
    "gelu": {"ffn_type": "gelu", "ffn_bias": True, "qkv_bias": True, "attn_out_bias": True},
    "grouped": {
        **{"n_kv_heads": 2, "qk_norm": True, "qk_norm_per_head": True, "ffn_type": "gemma_geglu"},
        **{"attn_window": 4, "attn_window_pattern": [True, False], "logit_soft_cap": 5.0},
    },
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_source(tmp_path / "data", [9, 6])


def teacher_of(folder: Path, architecture: dict[str, Any]) -> Transformer:
    """Create a teacher whose blocks matter, and write its weights."""
    teacher = create({**SHAPE, **architecture}, folder, 1)
    with torch.no_grad():
        for parameter in teacher.layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    torch.save({"epoch": 1, "name": "teacher", "state_dict": teacher.state_dict()}, folder / "teacher.pt")
    return teacher.eval()


def run(folder: Path, data: str, *flags: str) -> Transformer:
    """Prune the teacher and load the student as training does."""
    model = ["--model", str(folder / "model_1.json"), "--data", data, "--data-key", "npy", "--device", "cpu"]
    prune([str(folder / "teacher.pt"), str(folder / "student"), *model, *flags])
    cfg = ModelConfig(model=str(folder / "student" / "model.json"))
    return load_model_for_generation(str(folder / "student" / "epoch_0.pt"), cfg)


def ids() -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def without(teacher: Transformer, report: dict[str, Any]) -> Tensor:
    """Return the teacher's logits without the contributions of what pruning removed."""
    params = teacher.params
    group = params.n_heads // params.n_kv_heads
    for number, block in enumerate(teacher.blocks()):
        layer = str(number)
        if layer in report["kept_features"]:
            features = torch.ones(params.ffn_dim)
            features[report["kept_features"][layer]] = 0
            heads = torch.ones(params.n_kv_heads)
            heads[report["kept_key_heads"][layer]] = 0
            removed = heads.repeat_interleave(group * params.head_dim).bool()
            block.attention.out_proj.weight[:, removed] = 0
            output: Any = block.feed_forward[2] if params.ffn_type == "gelu" else getattr(
                block.feed_forward, "w3" if params.ffn_type == "swiglu" else "down_proj"
            )  # fmt: skip
            output.weight[:, features.bool()] = 0
    teacher.layers = torch.nn.ModuleList(teacher.layers[number] for number in report["kept_blocks"])
    return teacher(ids())[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_student_of_the_same_size_is_the_teacher(name: str, tmp_path: Path, data: str) -> None:
    teacher = teacher_of(tmp_path, ARCHITECTURES[name])
    student = run(tmp_path, data)
    assert torch.equal(student(ids())[0], teacher(ids())[0])
    keys = json.loads((tmp_path / "student" / "model.json").read_text())
    assert keys["n_layers"] == 3 and keys["ffn_dim"] == 32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_student_computes_what_the_teacher_does_without_the_removed_parts(
    name: str, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_of(tmp_path, ARCHITECTURES[name])
    student = run(tmp_path, data, "--layers", "2", "--heads", "2", "--ffn-dim", "20")
    report = json.loads((tmp_path / "student" / "pruning.json").read_text())
    assert student.params.n_heads == 2 and student.n_layers == 2 and student.params.head_dim == 6
    sizes = report["parameters"]
    assert sizes["student"] < sizes["teacher"] == sum(p.numel() for p in teacher.parameters())
    assert sizes["student"] == sum(p.numel() for p in student.parameters())
    torch.testing.assert_close(student(ids())[0], without(teacher, report), rtol=1e-4, atol=1e-4)
    assert f"{sizes['student']:,} of {sizes['teacher']:,} parameters remain" in capsys.readouterr().out


def test_importance_is_low_for_what_has_no_effect(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, {})
    blocks: list[Any] = list(teacher.blocks())
    with torch.no_grad():
        blocks[1].attention.out_proj.weight.zero_()
        blocks[1].feed_forward.w3.weight.zero_()
        blocks[0].feed_forward.w12.weight[32 + 5] = 0  # the up projection of feature 5
        blocks[2].attention.in_proj.weight[2 * 24 + 6 : 2 * 24 + 12] = 0  # the values of head 1
    importance = measure(teacher, [ids(), ids()])
    assert importance.blocks[1] == pytest.approx(0, abs=1e-6) and importance.blocks[[0, 2]].min() > 1e-3
    assert importance.features[0].argmin() == 5 and importance.features[0][5] == 0
    assert importance.key_heads[2].argmin() == 1
    again = measure(teacher, [ids()])
    torch.testing.assert_close(again.features, importance.features)  # a mean, not a sum


@pytest.mark.parametrize(
    ("architecture", "flags", "message"),
    [
        ({}, ["--layers", "4"], "--layers: found 4, the teacher has 3; expected 1 to 3"),
        ({}, ["--ffn-dim", "0"], "--ffn-dim: found 0, the teacher has 32"),
        ({"n_kv_heads": 2}, ["--heads", "3"], "serve 2 query heads each; expected a multiple of it"),
        (
            {"positional_embedding_type": "head_rotary"},
            ["--heads", "2"],
            "the angles of head_rotary depend",
        ),
        ({"moe_freq": 2, "moe_num_experts": 2}, ["--layers", "2"], "do not support mixtures of experts"),
        ({}, ["--unknown"], "unrecognized arguments: --unknown; see --help for all flags"),
        ({}, ["--sequences", "0"], "--sequences: found 0, expected 1 or more"),
    ],
)
def test_invalid_sizes(architecture: dict[str, Any], flags: list[str], message: str, tmp_path: Path, data: str) -> None:
    create({**SHAPE, **architecture}, tmp_path, 1)
    torch.save({"state_dict": {}}, tmp_path / "teacher.pt")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, data, *flags)
    assert not (tmp_path / "student").exists()
