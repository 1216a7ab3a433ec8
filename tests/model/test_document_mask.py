"""Packed sequences compared with their separate documents, for every representation of the document mask."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import document_worker
import pytest
import torch
from model_helpers import random_ids, small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from open_lm.data.masking import document_ids
from open_lm.kernels import document_attention, row_softmax
from open_lm.kernels.document_attention import (
    DocumentMask,
    dense_document_mask,
    document_positions,
    document_starts,
    flex_block_mask,
    is_document_start,
)
from open_lm.model import transformer as transformer_module
from open_lm.model.attention import ATTN_ACTIVATIONS, create_document_mask, custom_attn, torch_attn
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Transformer

END = 0
REPRESENTATIONS: dict[str, Callable[[Tensor], DocumentMask]] = {
    "dense": lambda is_start: DocumentMask(document_positions(is_start), dense=dense_document_mask(is_start)),
    "starts": lambda is_start: DocumentMask(document_positions(is_start), starts=document_starts(is_start)),
    "block_mask": lambda is_start: DocumentMask(document_positions(is_start), block_mask=flex_block_mask(is_start)),
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


def packed_ids() -> Tensor:
    """Return (3,40) ids: documents of several lengths, also cut at both ends; one document; documents of one token."""
    ids = random_ids(3, 40).clamp(min=1)
    ids[0, [4, 5, 6, 19, 38]] = END
    ids[2] = END
    return ids


def split_documents(ids: Tensor) -> list[tuple[int, slice]]:
    """Return the row and slice of each document, found token by token."""
    documents = []
    for row, tokens in enumerate(ids.tolist()):
        ends = [index + 1 for index, token in enumerate(tokens) if token == END]
        documents += [(row, slice(a, b)) for a, b in pairwise(sorted({0, *ends, len(tokens)}))]
    return documents


def use_representation(representation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make models use this representation instead of the one for this device."""

    def create_mask(ids: Tensor, _attn_func: Any) -> DocumentMask:
        return REPRESENTATIONS[representation](is_document_start(ids))

    monkeypatch.setattr(transformer_module, "create_document_mask", create_mask)


def gradients(model: Transformer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def random_starts(length: int, probability: float, rows: int = 3) -> Tensor:
    is_start = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < probability
    is_start[:, 0] = True
    return is_start


# ------------------------------------------------------------------------------------------ documents and models
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_packed_sequence_equals_its_separate_documents(changes: dict[str, Any]) -> None:
    model, ids, targets = small_model(**changes), packed_ids(), random_ids(3, 40, seed=2)
    logits, hidden, _ = model(ids, document_ids=document_ids(ids, END))
    packed_loss, packed_count = token_loss(logits, targets)
    total, count = torch.zeros(()), 0.0
    for row, span in split_documents(ids):
        separate, separate_hidden, _ = model(ids[row : row + 1, span])
        torch.testing.assert_close(logits[row, span], separate[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[row, span], separate_hidden[0], atol=1e-5, rtol=1e-5)
        loss, valid = token_loss(separate, targets[row : row + 1, span])
        total, count = total + loss, count + valid.item()
    assert packed_count.item() == count == 120
    torch.testing.assert_close(packed_loss, total)
    torch.testing.assert_close(gradients(model, packed_loss), gradients(model, total), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, model(ids)[0], atol=1e-3)


@pytest.mark.parametrize("representation", ["dense", "starts"])
def test_gradients_with_activation_checkpointing(representation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(apply_qk_norm=True, weight_tying=True).train(), packed_ids()
    expected = gradients(model, model(ids, document_ids=document_ids(ids, END))[0].square().mean())
    use_representation(representation, monkeypatch)
    model.set_grad_checkpointing()
    found = gradients(model, model(ids, document_ids=document_ids(ids, END))[0].square().mean())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [MODELS[0], MODELS[2], CUSTOM], ids=str)
def test_one_document_equals_no_mask(changes: dict[str, Any]) -> None:
    model, ids = small_model(**changes), random_ids(2, 40).clamp(min=1)
    expected, found = model(ids)[0], model(ids, document_ids=document_ids(ids, END))[0]
    torch.testing.assert_close(found, expected)
    found_gradients = gradients(model, found.square().mean())
    torch.testing.assert_close(found_gradients, gradients(model, expected.square().mean()))


@pytest.mark.parametrize("representation", sorted(REPRESENTATIONS))
@torch.no_grad()
def test_documents_do_not_affect_each_other(representation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_representation(representation, monkeypatch)
    model, ids = small_model(), packed_ids()
    changed = ids.clone()
    changed[0, 7:19] = random_ids(1, 12, seed=8)[0].clamp(min=1)
    before, after = (model(tokens, document_ids=document_ids(ids, END))[0] for tokens in (ids, changed))
    same = torch.ones(3, 40, dtype=torch.bool)
    same[0, 7:20] = False
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[0, 7:20], after[0, 7:20]).all(-1).any()


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    model, ids = small_model(apply_qk_norm=True), packed_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, document_ids=document_ids(ids, END))[0]
        for row, span in split_documents(ids):
            separate = model(ids[row : row + 1, span])[0]
            torch.testing.assert_close(logits[row, span], separate[0], atol=0.03, rtol=0.03)


@torch.no_grad()
def test_inputs_embeds_and_other_document_ids() -> None:
    model, ids = small_model(), packed_ids()
    document_index = document_ids(ids, END)
    expected = model(ids, document_ids=document_index)[0]
    other = (document_index % 2).to(torch.uint8)  # only the difference between neighbors matters
    found = model(inputs_embeds=model.get_input_embeddings()(ids), document_ids=other)[0]
    assert torch.equal(found, expected)


def test_arguments_that_document_ids_exclude() -> None:
    model, ids = small_model(), packed_ids()
    document_index = document_ids(ids, END)
    cache = model(ids, use_cache=True)[2]
    for others, name in (
        ({"past_key_values": cache}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"attention_mask": torch.ones_like(ids)}, "attention_mask"),
        ({"use_cache": True, "attention_mask": torch.ones_like(ids)}, "use_cache, attention_mask"),
    ):
        with pytest.raises(ValueError, match=f"document_ids together with {name}: "):
            model(ids, document_ids=document_index, **others)
    with pytest.raises(ValueError, match=r"shape \(3, 39\) of torch.int32, expected integers of shape \(3, 40\)"):
        model(ids, document_ids=document_index[:, 1:])
    with pytest.raises(ValueError, match=r"of torch.float32, expected integers"):
        model(ids, document_ids=document_index.float())


# ----------------------------------------------------------------------------------- representations and kernels
@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("probability", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 128, 300])
@torch.no_grad()
def test_all_representations_give_the_same_result(length: int, probability: float, width: int) -> None:
    is_start = random_starts(length, probability)
    q, k, v = torch.randn(3, 3, length, 2, width, generator=torch.Generator().manual_seed(1))
    found = {
        representation: torch_attn(q, k, v, True, make(is_start)) for representation, make in REPRESENTATIONS.items()
    }
    found["custom"] = custom_attn(q, k, v, "softmax", "none", 1.0, True, REPRESENTATIONS["dense"](is_start))
    for row in range(3):
        starts = [*is_start[row].nonzero()[:, 0].tolist(), length]
        for a, b in pairwise(starts):
            separate = torch_attn(q[row, None, a:b], k[row, None, a:b], v[row, None, a:b], True)[0]
            for representation, out in found.items():
                torch.testing.assert_close(
                    out[row, a:b], separate, atol=2e-6, rtol=1e-5, msg=f"{representation} {a}:{b}"
                )


@pytest.mark.parametrize("probability", [0.0, 0.004, 0.02, 1.0])
@pytest.mark.parametrize("length", [128, 300, 640])
def test_block_mask_equals_create_block_mask(length: int, probability: float) -> None:
    """The block mask equals the one that torch computes from every pair of query and key."""
    is_start = random_starts(length, probability)
    number = is_start.cumsum(1)
    expected = create_block_mask(
        lambda b, _h, q, k: (q >= k) & (number[b, q] == number[b, k]), 3, None, length, length, device="cpu"
    )
    found = flex_block_mask(is_start)
    assert found.seq_lengths == expected.seq_lengths
    assert torch.equal(found.to_dense(), expected.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(found, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks")), kind
        indices = (getattr(mask, f"{kind}_indices") for mask in (found, expected))
        used = torch.arange(counts.shape[-1]) < counts[..., None]
        assert torch.equal(*(index[used] for index in indices)), kind


@pytest.mark.parametrize("activation", sorted(ATTN_ACTIVATIONS))
def test_custom_attention_divides_by_the_sequence_length(activation: str) -> None:
    """The length of the document would reveal to its first tokens where it ends."""
    is_start = random_starts(12, 0.3)
    q, k, v = torch.randn(3, 3, 12, 2, 8, generator=torch.Generator().manual_seed(1))
    found = custom_attn(q, k, v, activation, "max", 1.0, True, REPRESENTATIONS["dense"](is_start))
    without_length = custom_attn(q, k, v, activation, "none", 1.0, True, REPRESENTATIONS["dense"](is_start))
    torch.testing.assert_close(found, without_length / 12)


def test_the_representation_depends_on_the_attention_function() -> None:
    document_index = document_ids(packed_ids(), END)
    documents = create_document_mask(document_index, torch_attn)
    assert documents.starts is not None and documents.starts[0, :8].tolist() == [0, 0, 0, 0, 0, 5, 6, 7]
    assert documents.dense is None
    assert documents.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    other = create_document_mask(document_index, lambda q, k, v, is_causal, attention_mask=None: v)
    assert other.dense is not None and other.dense.shape == (3, 1, 40, 40)


def test_missing_flex_attention_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_softmax.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    document_attention.supports_flex_attention.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [document_attention.supports_flex_attention(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
    document_attention.supports_flex_attention.cache_clear()
    assert caplog.text.count("compute capability is below 8.0") == 1


@pytest.mark.parametrize("representation", ["block_mask", "dense", "starts"])
@torch.no_grad()
def test_compiled_blocks_are_compiled_once(representation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number and lengths of documents change with every batch."""
    model = small_model(seq_len=200)
    batches = [random_ids(2, 200, vocab_size=20, seed=seed) for seed in range(12)]
    expected = [model(ids, document_ids=document_ids(ids, END))[0] for ids in batches]
    use_representation(representation, monkeypatch)
    counter = CompileCounter()
    for block in model.layers:
        block.compile(backend=counter)
    compiled_after_first = 0
    for ids, logits in zip(batches, expected, strict=True):
        found = model(ids, document_ids=document_ids(ids, END))[0]
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        compiled_after_first = compiled_after_first or counter.frame_count
    assert counter.frame_count == compiled_after_first == 1


@pytest.mark.processes
def test_two_processes_give_the_loss_of_one_process(tmp_path: Path, ranks: Callable[..., object]) -> None:
    ranks(2, "document_worker", "out.json")
    expected = document_worker.loss_and_norm("ddp")
    for found in json.loads((tmp_path / "out.json").read_text()).values():
        assert found == pytest.approx(expected, rel=1e-5)
    assert document_worker.loss_and_norm("ddp", masked=False)[0] != pytest.approx(expected[0], rel=1e-3)
