"""Golden files of the original on a CPU in float32: its weights load and reproduce its results."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_lm.model.losses import token_loss
from open_lm.model.transformer import Transformer, create_model

VARIANTS = (
    "default",
    "gain_only_qknorm",
    "geglu_llama_rotary",
    "gelu_no_wb",
    "head_rotary",
    "lp_qknorm_dclm",
    "nope_lp",
    "rms_swiglu_torch",
    "tied_postembed",
)


@pytest.fixture(params=VARIANTS)
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[Transformer, dict[str, Any]]:
    """A model with the original's weights, and the original's results for it."""
    folder = shared_dir / "compat" / "models" / request.param
    model = create_model(Namespace(model=str(folder / "config.json")))
    state = torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"]
    model.load_state_dict(state, strict=True)
    return model, torch.load(folder / "golden.pt", weights_only=True)


def test_every_golden_model_is_tested(shared_dir: Path) -> None:
    assert sorted(VARIANTS) == sorted(path.name for path in (shared_dir / "compat" / "models").iterdir())


def test_logits_and_hidden_states(golden: tuple[Transformer, dict[str, Any]]) -> None:
    model, expected = golden
    with torch.no_grad():
        logits, hidden, cache = model(expected["input_ids"][:, :-1])
    assert cache is None
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, expected["hidden"], atol=1e-5, rtol=0)


def test_number_of_parameters(golden: tuple[Transformer, dict[str, Any]]) -> None:
    model, expected = golden
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["num_params"]


def test_three_optimizer_steps(golden: tuple[Transformer, dict[str, Any]]) -> None:
    model, expected = golden
    ids: Tensor = expected["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss_sum, num_valid = token_loss(model(ids[:, :-1])[0], ids[:, 1:])
        loss = loss_sum / num_valid
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["losses_adamw_lr1e-3_wd0.1_clip1"], abs=1e-4)
    assert norms == pytest.approx(expected["grad_norms"], abs=1e-4)


def test_cached_chunks_give_the_same_logits(golden: tuple[Transformer, dict[str, Any]]) -> None:
    model, expected = golden
    ids, cache, chunks, start = expected["input_ids"][:, :-1], None, [], 0
    with torch.no_grad():
        for length in (5, 1, 30, 28):
            logits, _, cache = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
            chunks.append(logits)
            start += length
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected["logits"], atol=1e-5, rtol=0)
