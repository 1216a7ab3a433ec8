"""Keys of model configurations: windows, soft caps, grouped heads, dropout, scales, biases and padding of the head."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from model_helpers import random_ids, small_model
from torch import Tensor
from torch._dynamo.utils import counters

from open_lm.config.model_keys import ModelKeys
from open_lm.errors import ConfigError
from open_lm.kernels.document_attention import (
    BLOCK_TOKENS,
    DocumentMask,
    dense_document_mask,
    document_attention,
    document_positions,
    flex_block_mask,
    is_document_start,
)
from open_lm.kernels.general_attention import AttentionOptions
from open_lm.kernels.linear_loss import linear_cross_entropy
from open_lm.model.attention import attend, custom_attn, torch_attn
from open_lm.model.losses import TokenLoss, token_loss
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer

DROPOUTS = ("embedding_dropout", "attn_dropout", "residual_dropout")


def test_defaults_of_keys_and_params_agree() -> None:
    params = Params()
    derived = {"n_kv_heads": params.n_heads, "head_dim": 64, "ffn_dim": 1536, "ffn_bias": False, "moe_ffn_dim": 2048}
    for spec in ModelKeys.specs():
        assert getattr(params, spec.name) == derived.get(spec.name, spec.default), spec.name


# ----------------------------------------------------------------------------------------- attention
def reference(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Compute causal attention with loops over query and key heads; q (B,Tq,H,K), k and v (B,Tk,G,K)."""
    (queries, keys), group = (q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    allowed = (key <= position) & (position - key < (options.window or keys))
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].mT * (options.scale or q.shape[-1] ** -0.5)
        if options.soft_cap is not None:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        out[:, :, head] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, :, head // group]
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3, 12])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(),
        AttentionOptions(scale=0.3),
        AttentionOptions(window=5),
        AttentionOptions(soft_cap=0.7),
        AttentionOptions(scale=0.9, window=3, soft_cap=1.5),
        AttentionOptions(window=1),
        AttentionOptions(window=99),
    ],
)
def test_options_and_grouped_heads(options: AttentionOptions, queries: int, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, 12, key_heads, 8, generator=generator)
    torch.testing.assert_close(attend(torch_attn, q, k, v, None, options), reference(q, k, v, options))


@pytest.mark.parametrize("window", [None, 1, 70, 200, 999])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_flex_attention_equals_a_dense_mask(window: int | None, soft_cap: float | None) -> None:
    """The kernel for CUDA, uncompiled, in sequences of several blocks with documents that cross them."""
    length, generator = 2 * BLOCK_TOKENS + 17, torch.Generator().manual_seed(0)
    ids = torch.tensor([0] * 50 + [1] * 170 + [2] * (length - 220))[None].expand(2, -1)
    starts = is_document_start(torch.cat((ids[:1], torch.zeros_like(ids[:1]))))
    q = torch.randn(2, length, 4, 16, generator=generator)
    k, v = torch.randn(2, 2, length, 2, 16, generator=generator)
    mask = partial(DocumentMask, document_positions(starts))
    options = AttentionOptions(scale=0.5, window=window, soft_cap=soft_cap)
    dense = document_attention(q, k, v, mask(dense=dense_document_mask(starts, window)), options)
    flex = document_attention(q, k, v, mask(block_mask=flex_block_mask(starts, window)), options)
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
    block_mask = flex_block_mask(starts, window)
    blocks = block_mask.to_dense()[:, 0].bool()
    padded = torch.zeros(2, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS, dtype=torch.bool)
    padded[:, :length, :length] = dense_document_mask(starts, window)[:, 0]
    needed = padded.unflatten(1, (3, -1)).unflatten(3, (3, -1)).any(2).any(3)
    assert torch.equal(blocks & needed, needed)  # each block with an allowed pair is computed
    assert not (blocks & ~needed).any()  # and no other


def test_custom_attn_supports_grouped_heads_but_no_options() -> None:
    custom = {"attn_name": "custom_attn", "attn_activation": "softmax", "attn_seq_scalar": "none"}
    settings: dict[str, Any] = {**custom, "attn_seq_scalar_alpha": 0.0, "n_kv_heads": 2}
    model, ids = small_model(**settings), random_ids(2, 12)
    torch.testing.assert_close(model(ids)[0], small_model(n_kv_heads=2)(ids)[0], atol=1e-5, rtol=1e-5)
    assert model.params.attn_func.func is custom_attn  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="custom_attn does not support attn_soft_cap, attn_window; use --attn-name"):
        small_model(**settings, attn_window=4, attn_soft_cap=2.0)
    with pytest.raises(ConfigError, match="head_rotary needs as many key heads as query heads"):
        small_model(n_kv_heads=2, positional_embedding_type="head_rotary")


def test_compiled_blocks_are_not_recompiled_for_other_documents() -> None:
    keys = {"n_kv_heads": 2, "attn_window": 5, "attn_window_pattern": [True, False], "attn_soft_cap": 2.0}
    model = small_model(**keys, norm_position="both", qkv_bias=True)
    compiled = copy.deepcopy(model)
    for block in compiled.layers:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    counts = []
    for seed in range(3):
        ids = random_ids(2, 12, seed=seed)
        documents = (ids % 3 == 0).cumsum(1)
        torch.testing.assert_close(
            compiled(ids, document_ids=documents)[0], model(ids, document_ids=documents)[0], atol=1e-5, rtol=1e-5
        )
        counts.append(counters["stats"]["unique_graphs"])
    assert 0 < counts[0] == counts[1] == counts[2]


# ----------------------------------------------------------------------------------------- dropout
def test_without_dropout_no_random_number_is_drawn() -> None:
    model, state = small_model().train(), torch.get_rng_state()
    model(random_ids(2, 9), loss=TokenLoss(random_ids(2, 9)))[0].backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_active_in_training_only(name: str) -> None:
    model, plain, ids = small_model(**{name: 0.5}), small_model(), random_ids(2, 12)
    torch.testing.assert_close(model(ids)[0], plain(ids)[0])
    model.train()
    first, second = model(ids)[0], model(ids)[0]
    assert not torch.allclose(first, second) and first.isfinite().all()
    with pytest.raises(ConfigError, match=f"{name} is 1.0, expected a number from 0 to below 1"):
        small_model(**{name: 1.0})


@pytest.mark.parametrize("policy", ["full", "op"])
def test_recomputation_repeats_the_dropout_of_the_forward_pass(policy: str) -> None:
    model, ids = small_model(**dict.fromkeys(DROPOUTS, 0.3)).train(), random_ids(2, 12)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable, policy)
        torch.manual_seed(3)
        loss = model(ids, loss=TokenLoss(ids))[0]
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_attention_dropout_drops_weights() -> None:
    """With constant values the result is the sum of the remaining weights, scaled to a mean of 1."""
    q = torch.zeros(1, 400, 2, 8)
    out = attend(torch_attn, q, q, torch.ones_like(q), None, AttentionOptions(dropout=0.25))
    assert out[:, 200:].mean().item() == pytest.approx(1.0, abs=0.01)
    for value in out[0, 0].unique().tolist():  # one weight: dropped, or divided by the remaining share
        assert value in (0.0, pytest.approx(4 / 3))


# ----------------------------------------------------------------------------------------- embeddings and head
def test_embedding_scale_is_rounded_to_the_dtype() -> None:
    scale = 3072**0.5
    model = small_model(embedding_scale=scale).bfloat16()
    ids = random_ids(1, 5)
    weight = model.tok_embeddings.weight[ids]
    assert torch.equal(model.get_input_embeddings()(ids), weight * torch.tensor(scale).bfloat16())
    assert torch.tensor(scale).bfloat16() == 55.5


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "settings", [{"bias": True}, {"soft_cap": 1.5}, {"num_ids": 9}, {"bias": True, "soft_cap": 2.0}]
)
def test_loss_with_bias_soft_cap_and_padding(settings: dict[str, Any], per_token: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 6), (12, 6), (12,))
    )
    targets = torch.tensor([1, 8, -100, 3, 0, 5, 8])
    cap, num_ids = settings.get("soft_cap"), settings.get("num_ids", 12)
    logits = hidden @ weight.t() + (bias if "bias" in settings else 0)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logits = logits[:, :num_ids]
    z_losses = 1e-2 * logits.logsumexp(-1).square()[targets != -100]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") + z_losses.sum()
    actual = linear_cross_entropy(
        *(hidden, weight, targets),
        **{"ignore_index": -100, "z_loss_coefficient": 1e-2, "per_token": per_token},
        **{**settings, **({"bias": bias} if "bias" in settings else {})},
    ).sum()
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    inputs = [hidden, weight, *([bias] if "bias" in settings else [])]
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def test_head_settings_of_logits_and_loss_agree() -> None:
    model = small_model(head_bias=True, logit_soft_cap=2.0, unpadded_vocab_size=50, weight_tying=True)
    with torch.no_grad():
        model.output.bias.normal_()
    ids = random_ids(2, 12, vocab_size=50)
    logits, hidden, _ = model(ids)
    assert (logits[..., 50:] == -torch.inf).all() and logits[..., :50].abs().max() <= 2.0
    torch.testing.assert_close(model.logits(hidden), logits)
    loss = model(ids, loss=TokenLoss(ids, 1e-3))[0]
    torch.testing.assert_close(loss, token_loss(logits[..., :50], ids, 1e-3)[0])


def test_rms_norm_with_an_offset_starts_at_a_gain_of_one() -> None:
    model = small_model(model_norm="gemma_rms_norm", norm_position="both", apply_qk_norm=True, qk_norm_per_head=True)
    norms = {name: value for name, value in model.named_parameters() if name.endswith("norm.weight")}
    assert len(norms) == 13 and all((value == 0).all() for value in norms.values())
    plain = small_model(model_norm="rms_norm", norm_position="both", apply_qk_norm=True, qk_norm_per_head=True)
    torch.testing.assert_close(model(random_ids(1, 9))[0], plain(random_ids(1, 9))[0])


def test_a_model_with_all_keys_survives_copying() -> None:
    keys = {"n_kv_heads": 2, "attn_window": 5, "rope_pattern": [True, False], "embedding_scale": 4.0}
    model: Transformer = small_model(**keys, residual_dropout=0.1)
    ids = random_ids(1, 9)
    assert torch.equal(copy.deepcopy(model)(ids)[0], model(ids)[0])
