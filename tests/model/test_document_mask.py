"""Rows of several documents against each of the documents alone, through every form of the mask."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import document_worker
import model_helpers
import pytest
import torch
from model_helpers import random_ids, small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from open_lm.data.masking import document_ids
from open_lm.kernels import document_attention
from open_lm.kernels.document_attention import (
    DocumentMask,
    dense_document_mask,
    document_positions,
    document_starts,
    flex_block_mask,
    is_document_start,
)
from open_lm.model import transformer as model
from open_lm.model.attention import ATTN_ACTIVATIONS, create_document_mask, custom_attn, torch_attn
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Transformer

END = 0
FORMS: dict[str, Callable[[Tensor], DocumentMask]] = {
    "allowed": lambda first: DocumentMask(document_positions(first), dense=dense_document_mask(first)),
    "starts": lambda first: DocumentMask(document_positions(first), starts=document_starts(first)),
    "blocks": lambda first: DocumentMask(document_positions(first), block_mask=flex_block_mask(first)),
}
CUSTOM = {
    "attn_name": "custom_attn",
    "attn_activation": "relu",
    "attn_seq_scalar": "none",
    "attn_seq_scalar_alpha": 1.0,
}
MODELS: list[dict[str, Any]] = [
    {},
    {"positional_embedding_type": "head_rotary", "model_norm": "rms_norm"},
    {"positional_embedding_type": "llama_rotary", "ffn_type": "gelu", "apply_qk_norm": True},
    {"positional_embedding_type": "none", "ffn_type": "gemma_geglu", "weight_tying": True},
    {"apply_qk_norm": True, "weight_tying": True, "post_embed_norm": True, "model_norm": "gain_only_lp_layer_norm"},
    {"ffn_type": "swiglu_torch", "model_norm": "no_wb_layer_norm", "apply_qk_norm": True},
    CUSTOM,
    CUSTOM | {"attn_activation": "softmax", "positional_embedding_type": "llama_rotary"},
]


def packed_rows() -> Tensor:
    """(3,40) ids: documents of many lengths, of one token, cut at both ends; a row of one document; ends only."""
    ids = random_ids(3, 40).clamp(min=1)
    ids[0, [4, 5, 6, 19, 38]] = END
    ids[2] = END
    return ids


def documents_of(ids: Tensor) -> list[tuple[int, slice]]:
    """Row and place of each document, found token by token."""
    found = []
    for row, tokens in enumerate(ids.tolist()):
        ends = [place + 1 for place, token in enumerate(tokens) if token == END]
        found += [(row, slice(a, b)) for a, b in pairwise(sorted({0, *ends, len(tokens)}))]
    return found


def through(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take this form of the documents in place of the one chosen for this device."""
    monkeypatch.setattr(model, "create_document_mask", lambda ids, _attn: FORMS[form](is_document_start(ids)))


def gradients(made: Transformer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(made.parameters())))


def random_first(length: int, share: float, rows: int = 3) -> Tensor:
    first = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < share
    first[:, 0] = True
    return first


# ------------------------------------------------------------------------------------------ documents and models
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_packed_row_is_each_of_its_documents_alone(changes: dict[str, Any]) -> None:
    made, ids, targets = small_model(**changes), packed_rows(), random_ids(3, 40, seed=2)
    logits, hidden, _ = made(ids, document_ids=document_ids(ids, END))
    packed_loss, packed_count = token_loss(logits, targets)
    total, count = torch.zeros(()), 0.0
    for row, place in documents_of(ids):
        alone, alone_hidden, _ = made(ids[row : row + 1, place])
        torch.testing.assert_close(logits[row, place], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[row, place], alone_hidden[0], atol=1e-5, rtol=1e-5)
        loss, valid = token_loss(alone, targets[row : row + 1, place])
        total, count = total + loss, count + valid.item()
    assert packed_count.item() == count == 120
    torch.testing.assert_close(packed_loss, total)
    torch.testing.assert_close(gradients(made, packed_loss), gradients(made, total), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, made(ids)[0], atol=1e-3)


@pytest.mark.parametrize("form", ["allowed", "starts"])
def test_gradients_through_recomputed_activations(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = small_model(apply_qk_norm=True, weight_tying=True).train(), packed_rows()
    expected = gradients(made, made(ids, document_ids=document_ids(ids, END))[0].square().mean())
    through(form, monkeypatch)
    made.set_grad_checkpointing()
    found = gradients(made, made(ids, document_ids=document_ids(ids, END))[0].square().mean())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [MODELS[0], MODELS[2], CUSTOM], ids=str)
def test_a_row_with_one_document_is_the_row_without_a_mask(changes: dict[str, Any]) -> None:
    made, ids = small_model(**changes), random_ids(2, 40).clamp(min=1)
    expected, found = made(ids)[0], made(ids, document_ids=document_ids(ids, END))[0]
    torch.testing.assert_close(found, expected)
    found_gradients = gradients(made, found.square().mean())
    torch.testing.assert_close(found_gradients, gradients(made, expected.square().mean()))


@pytest.mark.parametrize("form", sorted(FORMS))
@torch.no_grad()
def test_nothing_of_one_document_reaches_another(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through(form, monkeypatch)
    made, ids = small_model(), packed_rows()
    changed = ids.clone()
    changed[0, 7:19] = random_ids(1, 12, seed=8)[0].clamp(min=1)
    before, after = (made(tokens, document_ids=document_ids(ids, END))[0] for tokens in (ids, changed))
    same = torch.ones(3, 40, dtype=torch.bool)
    same[0, 7:20] = False
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[0, 7:20], after[0, 7:20]).all(-1).any()


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    made, ids = small_model(apply_qk_norm=True), packed_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(ids, document_ids=document_ids(ids, END))[0]
        for row, place in documents_of(ids):
            alone = made(ids[row : row + 1, place])[0]
            torch.testing.assert_close(logits[row, place], alone[0], atol=0.03, rtol=0.03)


@torch.no_grad()
def test_embeddings_and_any_numbering() -> None:
    made, ids = small_model(), packed_rows()
    numbers = document_ids(ids, END)
    expected = made(ids, document_ids=numbers)[0]
    other = (numbers % 2).to(torch.uint8)  # neighbours differ, which is all that counts
    found = made(inputs_embeds=made.get_input_embeddings()(ids), document_ids=other)[0]
    assert torch.equal(found, expected)


def test_what_documents_cannot_go_with() -> None:
    made, ids = small_model(), packed_rows()
    numbers = document_ids(ids, END)
    cache = made(ids, use_cache=True)[2]
    for others, name in (
        ({"past_key_values": cache}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"attention_mask": torch.ones_like(ids)}, "attention_mask"),
        ({"use_cache": True, "attention_mask": torch.ones_like(ids)}, "use_cache, attention_mask"),
    ):
        with pytest.raises(ValueError, match=f"document_ids together with {name}: "):
            made(ids, document_ids=numbers, **others)
    with pytest.raises(ValueError, match=r"shape \(3, 39\) of torch.int32, expected integers of shape \(3, 40\)"):
        made(ids, document_ids=numbers[:, 1:])
    with pytest.raises(ValueError, match=r"of torch.float32, expected integers"):
        made(ids, document_ids=numbers.float())


# ----------------------------------------------------------------------------------------------- forms and kernels
@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 128, 300])
@torch.no_grad()
def test_every_form_gives_the_same(length: int, share: float, width: int) -> None:
    first = random_first(length, share)
    q, k, v = torch.randn(3, 3, length, 2, width, generator=torch.Generator().manual_seed(1))
    found = {form: torch_attn(q, k, v, True, make(first)) for form, make in FORMS.items()}
    found["custom"] = custom_attn(q, k, v, "softmax", "none", 1.0, True, FORMS["allowed"](first))
    for row in range(3):
        starts = [*first[row].nonzero()[:, 0].tolist(), length]
        for a, b in pairwise(starts):
            alone = torch_attn(q[row, None, a:b], k[row, None, a:b], v[row, None, a:b], True)[0]
            for form, out in found.items():
                torch.testing.assert_close(out[row, a:b], alone, atol=2e-6, rtol=1e-5, msg=f"{form} {a}:{b}")


@pytest.mark.parametrize("share", [0.0, 0.004, 0.02, 1.0])
@pytest.mark.parametrize("length", [128, 300, 640])
def test_blocks_are_those_of_the_whole_mask(length: int, share: float) -> None:
    """The kernels visit the blocks that torch finds by looking at every query and key, and mask the same of them."""
    first = random_first(length, share)
    number = first.cumsum(1)
    expected = create_block_mask(
        lambda b, _h, q, k: (q >= k) & (number[b, q] == number[b, k]), 3, None, length, length, device="cpu"
    )
    found = flex_block_mask(first)
    assert found.seq_lengths == expected.seq_lengths
    assert torch.equal(found.to_dense(), expected.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(found, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks")), kind
        indices = (getattr(mask, f"{kind}_indices") for mask in (found, expected))
        used = torch.arange(counts.shape[-1]) < counts[..., None]
        assert torch.equal(*(index[used] for index in indices)), kind


@pytest.mark.parametrize("activation", sorted(ATTN_ACTIVATIONS))
def test_custom_attention_divides_by_the_row_s_length(activation: str) -> None:
    """A document's own length would tell its first tokens where it ends."""
    first = random_first(12, 0.3)
    q, k, v = torch.randn(3, 3, 12, 2, 8, generator=torch.Generator().manual_seed(1))
    found = custom_attn(q, k, v, activation, "max", 1.0, True, FORMS["allowed"](first))
    undivided = custom_attn(q, k, v, activation, "none", 1.0, True, FORMS["allowed"](first))
    torch.testing.assert_close(found, undivided / 12)


def test_the_form_follows_the_attention_function() -> None:
    numbers = document_ids(packed_rows(), END)
    documents = create_document_mask(numbers, torch_attn)
    assert documents.starts is not None and documents.starts[0, :8].tolist() == [0, 0, 0, 0, 0, 5, 6, 7]
    assert documents.dense is None
    assert documents.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    other = create_document_mask(numbers, lambda q, k, v, is_causal, attention_mask=None: v)
    assert other.dense is not None and other.dense.shape == (3, 1, 40, 40)


def test_a_device_without_flex_attention_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(document_attention.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    document_attention.supports_flex_attention.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [document_attention.supports_flex_attention(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
    document_attention.supports_flex_attention.cache_clear()
    assert caplog.text.count("compute capability is below 8.0") == 1


@pytest.mark.parametrize("form", ["blocks", "allowed", "starts"])
@torch.no_grad()
def test_compiled_blocks_are_compiled_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the documents are: their numbers and lengths change with every batch."""
    made = small_model(seq_len=200)
    batches = [random_ids(2, 200, vocab_size=20, seed=seed) for seed in range(12)]
    expected = [made(ids, document_ids=document_ids(ids, END))[0] for ids in batches]
    through(form, monkeypatch)
    counter = CompileCounter()
    for block in made.layers:
        block.compile(backend=counter)
    compiled_after_first = 0
    for ids, logits in zip(batches, expected, strict=True):
        found = made(ids, document_ids=document_ids(ids, END))[0]
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        compiled_after_first = compiled_after_first or counter.frame_count
    assert counter.frame_count == compiled_after_first == 1


def test_layouts_of_two_processes_give_one_process_s_loss(tmp_path: Path, torchrun: Callable[..., Any]) -> None:
    for module in (document_worker, model_helpers):
        shutil.copy(str(module.__file__), tmp_path)
    torchrun(2, "document_worker", "out.json")
    expected = document_worker.loss_and_norm("ddp")
    for found in json.loads((tmp_path / "out.json").read_text()).values():
        assert found == pytest.approx(expected, rel=1e-5)
    assert document_worker.loss_and_norm("ddp", masked=False)[0] != pytest.approx(expected[0], rel=1e-3)
