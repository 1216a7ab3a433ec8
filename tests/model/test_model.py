"""The Transformer: KV cache, padding, weight tying, activation checkpointing, initialization, configuration."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_helpers import random_ids, small_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from open_lm.errors import ConfigError
from open_lm.model import initialization
from open_lm.model.attention import torch_attn
from open_lm.model.initialization import init_weights
from open_lm.model.losses import token_loss
from open_lm.model.transformer import Block, Params, Transformer, create_model, create_params

NUM_PARAMETERS = {
    "open_lm_11m": 11_014_848,
    "open_lm_25m": 24_683_904,
    "open_lm_41m": 41_007_168,
    "open_lm_87m": 87_474_000,
    "open_lm_160m": 162_436_608,
    "open_lm_411m": 411_666_432,
    "open_lm_410m": 411_666_432,
    "open_lm_830m": 834_554_880,
    "open_lm_1b": 1_439_895_552,
    "m1b_neox": 1_439_895_552,
    "open_lm_1b_old": 1_439_895_552,
    "open_lm_3b": 2_796_098_560,
    "g3b_neox": 2_796_098_560,
    "open_lm_7b": 6_889_676_800,
    "l7b_neox": 6_889_676_800,
    "open_lm_11m_v2": 10_570_944,
    "open_lm_79m_v2": 78_922_752,
    "open_lm_154m_v2": 153_705_600,
    "open_lm_411m_v2": 411_666_432,
    "open_lm_test_tiny": 27_296,
    "llama2_7b": 6_738_415_616,
    "open_llama_3b": 3_426_473_600,
    "tinyllama_1b": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "gemma_2b": 2_506_172_416,
    "phi_2": 2_779_683_840,
    "lf_llm_269m": 320_145_408,  # of which 268,682,240 are not in the embedding
}
POSITIONS = ("rotary", "head_rotary", "llama_rotary", "none")


@pytest.mark.parametrize("name", sorted(NUM_PARAMETERS))
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(Namespace(model=name))
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu", "gemma_geglu"])
def test_chunks_with_the_cache_equal_the_full_sequence(positions: str, ffn_type: str) -> None:
    model = small_model(positional_embedding_type=positions, ffn_type=ffn_type, apply_qk_norm=True)
    ids = random_ids(2, 20)
    full, _, _ = model(ids)
    chunks: list[Tensor] = []
    cache: Any = None
    for start, end in ((0, 3), (3, 4), (4, 13), (13, 20)):
        logits, _, cache = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        chunks.append(logits)
    torch.testing.assert_close(torch.cat(chunks, 1), full, atol=1e-5, rtol=1e-5)
    assert len(cache) == 2
    assert cache[0][0].shape == (2, 20, 4, 8)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_cache_is_not_modified_and_not_returned_without_use_cache(positions: str) -> None:
    model = small_model(positional_embedding_type=positions)
    ids = random_ids(1, 9)
    _, _, cache = model(ids[:, :6], use_cache=True)
    before = copy.deepcopy(cache)
    logits, _, new_cache = model(ids[:, 6:], past_key_values=tuple(map(tuple, cache)))
    assert new_cache is None
    torch.testing.assert_close(cache, before)
    torch.testing.assert_close(logits, model(ids)[0][:, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padding_does_not_change_logits(positions: str, custom: bool) -> None:
    attention = {"attn_activation": "relu", "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 1.0}
    changes = {"attn_name": "custom_attn", **attention} if custom else {}
    model = small_model(positional_embedding_type=positions, **changes)
    rows = [random_ids(1, length, seed=length)[0] for length in (12, 5, 1)]
    ids, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, 12 - len(tokens) :] = tokens
        mask[row, 12 - len(tokens) :] = 1
    logits, _, cache = model(ids, use_cache=True, attention_mask=mask)
    assert logits.isfinite().all()
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(logits[row, 12 - len(tokens) :], model(tokens[None])[0][0], atol=1e-5, rtol=1e-5)
    if custom:
        return  # the attention length is the number of keys of a chunk, so chunks give other results by definition
    after = random_ids(3, 4, seed=99)
    longer = torch.cat((mask, torch.ones_like(after)), dim=1)
    logits, _, _ = model(after, past_key_values=cache, use_cache=True, attention_mask=longer)
    for row, tokens in enumerate(rows):
        expected = model(torch.cat((tokens, after[row]))[None])[0][0, -4:]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_inputs_embeds() -> None:
    model, ids = small_model(post_embed_norm=True), random_ids(2, 6)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids))[0], model(ids)[0])
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="exactly one of"):
        model(ids, inputs_embeds=model.tok_embeddings(ids))


def test_a_mask_without_cached_columns_raises() -> None:
    model, ids = small_model(), random_ids(2, 6)
    _, _, cache = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="including cached keys"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))


class OperatorCounter(TorchDispatchMode):
    """A mode that counts matrix products and cosines, and measures the memory of results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.cosines = 0
        self.results: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten._scaled_dot_product_attention_math)
        self.cosines += func.overloadpacket is torch.ops.aten.cos
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.results.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def bytes_alive(self) -> int:
        alive = {ref.cdata: size for ref, size in self.results if not ref.expired()}
        return sum(alive.values())


def run_step(model: Transformer, ids: Tensor) -> tuple[list[Tensor], int, int, int]:
    """Return gradients, bytes stored for the backward pass, and matrix products of the forward and backward pass."""
    with OperatorCounter() as counter:
        loss, count = token_loss(model(ids[:, :-1])[0], ids[:, 1:])
        stored, forward = counter.bytes_alive(), counter.products
        gradients = list(torch.autograd.grad(loss / count, list(model.parameters())))
    return gradients, stored, forward, counter.products - forward


@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu"])
def test_activation_checkpointing_gives_the_same_gradients(ffn_type: str) -> None:
    model, ids = small_model(ffn_type=ffn_type).train(), random_ids(2, 41)
    expected, all_bytes, forward, backward = run_step(model, ids)
    assert backward == 2 * forward
    per_block = (forward - 1) // 2  # two blocks and the head
    stored = {}
    settings = (("full", 1, 2 * per_block, 2), ("full", 2, per_block, 1), ("op", 1, 0, 0), ("half-op", 1, per_block, 2))
    for policy, every, recomputed, blocks in settings:
        model.set_grad_checkpointing(policy=policy, every=every)
        assert model.grad_checkpointing
        gradients, stored[policy, every], _, products = run_step(model, ids)
        minimum = backward + recomputed - blocks  # the last product of a block need not be recomputed
        assert products in (minimum, backward + recomputed)
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    assert stored["full", 1] < stored["full", 2] < all_bytes
    assert stored["full", 1] < stored["half-op", 1] < stored["op", 1] < all_bytes
    model.set_grad_checkpointing(False)
    assert run_step(model, ids)[1] == all_bytes


@pytest.mark.parametrize("positions", POSITIONS)
def test_angles_are_computed_once_for_all_layers(positions: str) -> None:
    model, ids = small_model(positional_embedding_type=positions).train(), random_ids(2, 9)
    model.set_grad_checkpointing()
    with OperatorCounter() as counter:
        model(ids)[0].sum().backward()
    assert counter.cosines == (positions != "none")
    x = torch.randn(2, 5, 32)
    angles = model.layers[0].attention.angles(x, None, None)
    assert torch.equal(model.layers[1](x)[0], model.layers[1](x, angles=angles)[0])


def test_invalid_checkpointing_settings_raise() -> None:
    with pytest.raises(ConfigError, match=r"found policy 'some' for one in 1 blocks, expected one of full, op"):
        small_model().set_grad_checkpointing(policy="some")
    with pytest.raises(ConfigError, match="1 or more"):
        small_model().set_grad_checkpointing(every=0)


@pytest.mark.parametrize("policy", ["full", "op", "half-op"])
def test_activation_checkpointing_of_compiled_blocks(policy: str) -> None:
    model, ids = small_model().train(), random_ids(2, 9)
    expected = run_step(model, ids)[0]
    model.set_grad_checkpointing(policy=policy)
    for block in model.layers:
        block.compile(backend="aot_eager")
    loss, count = token_loss(model(ids[:, :-1])[0], ids[:, 1:])
    torch.testing.assert_close(list(torch.autograd.grad(loss / count, list(model.parameters()))), expected)


def test_logits_are_float32_in_half_precision() -> None:
    model, ids = small_model(), random_ids(1, 5)
    exact = model(ids)[0]
    logits, hidden, _ = model.bfloat16()(ids)
    assert (logits.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits, exact, atol=0.1, rtol=0.1)


def test_head_width_that_does_not_divide_the_model_width() -> None:
    model = small_model(dim=34, n_heads=4)
    assert model.layers[0].attention.in_proj.weight.shape == (96, 34)
    assert model(random_ids(1, 3))[0].shape == (1, 3, 61)


# ------------------------------------------------------------------------------------------- state and memory
def test_weights_stay_tied_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(Params(dim=16, n_layers=1, n_heads=2, vocab_size=9, weight_tying=True))
    model.to_empty(device="cpu")
    assert model.tok_embeddings.weight is model.output.weight
    assert {"tok_embeddings.weight", "output.weight"} <= set(model.state_dict())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu", "gemma_geglu"])
def test_models_created_on_the_meta_device_are_equal(positions: str, ffn_type: str) -> None:
    params = Params(
        dim=24, n_layers=2, n_heads=2, vocab_size=11, positional_embedding_type=positions, ffn_type=ffn_type
    )
    direct = Transformer(params)
    direct.reset_parameters(seed=5)
    with torch.device("meta"):
        materialized = Transformer(params)
    materialized.to_empty(device="cpu")
    for tensor in materialized.state_dict().values():
        tensor.fill_(float("nan"))
    materialized.reset_parameters(seed=5)
    torch.testing.assert_close(materialized.state_dict(), direct.state_dict(), rtol=0, atol=0)


def test_initializing_the_meta_device_raises() -> None:
    with torch.device("meta"):
        model = Transformer(Params(dim=16, n_layers=1, n_heads=2, vocab_size=9))
    with pytest.raises(ValueError, match="to_empty"):
        init_weights(model, 0)


def test_standard_deviations() -> None:
    model = Transformer(Params(dim=128, n_layers=3, n_heads=4, vocab_size=512, moe_freq=2, moe_num_experts=4))
    model.reset_parameters(seed=1)
    hidden = 512  # of 128, rounded up to a multiple of 256
    expected = {
        "tok_embeddings.weight": 128**-0.5,
        "output.weight": 128**-0.5,
        "layers.2.attention.in_proj.weight": 128**-0.5,
        "layers.2.attention.out_proj.weight": (128 * 6) ** -0.5,
        "layers.1.feed_forward.w12.weight": 128**-0.5,
        "layers.1.feed_forward.w3.weight": (hidden * 4) ** -0.5,
        "layers.2.feed_forward.experts.mlp.w1": 128**-0.5,
        "layers.2.feed_forward.experts.mlp.w2": (4 * 128 * 6) ** -0.5,
    }
    state = model.state_dict()
    for name, std in expected.items():
        # Truncation at three standard deviations reduces the standard deviation by a factor of 0.9866.
        assert state[name].std().item() == pytest.approx(0.9866 * std, rel=0.02), name
        assert state[name].abs().max().item() <= 3 * std
    assert (state["norm.weight"] == 1).all() and not state["norm.bias"].any()


def test_each_parameter_depends_only_on_seed_and_name() -> None:
    small = Transformer(Params(dim=16, n_layers=1, n_heads=2, vocab_size=9))
    deep = Transformer(Params(dim=16, n_layers=3, n_heads=2, vocab_size=9))
    small.reset_parameters(seed=3)
    deep.reset_parameters(seed=3)
    shared = small.state_dict()
    torch.testing.assert_close({name: deep.state_dict()[name] for name in shared}, shared, rtol=0, atol=0)
    deep.reset_parameters(seed=4)
    assert not torch.equal(deep.output.weight, small.output.weight)
    assert not torch.equal(deep.layers[0].attention.in_proj.weight, deep.layers[1].attention.in_proj.weight)


@pytest.mark.parametrize("count", [7, 16, 64, 77, 32 * 31 + 15, 32 * 31 + 17])
def test_values_drawn_in_blocks_equal_values_drawn_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for block_size in (32, 1 << 20):
        monkeypatch.setattr(initialization, "_BLOCK_VALUES", block_size)
        drawn[block_size] = torch.empty(count)
        with OperatorCounter() as counter:
            initialization.truncated_normal_(drawn[block_size], 0.5, torch.Generator().manual_seed(0))
        assert (
            block_size > count or len({ref.cdata for ref, size in counter.results if size > 4 * 47}) <= 1
        )  # the values
    assert torch.equal(drawn[32], drawn[1 << 20]) and drawn[32].abs().max() <= 1.5
    if torch.__version__ >= "2.13":  # older versions use another algorithm
        expected = torch.nn.init.trunc_normal_(torch.empty(count), 0, 0.5, -1.5, 1.5, torch.Generator().manual_seed(0))
        assert torch.equal(expected, drawn[32])


def test_construction_uses_the_global_seed() -> None:
    torch.testing.assert_close(small_model(seed=2).state_dict(), small_model(seed=2).state_dict(), rtol=0, atol=0)
    assert not torch.equal(small_model(seed=2).output.weight, small_model(seed=3).output.weight)


def test_a_new_model_predicts_almost_uniformly() -> None:
    model, ids = small_model(vocab_size=61), random_ids(4, 40)
    loss, count = token_loss(model(ids[:, :-1])[0], ids[:, 1:])
    assert loss.item() / count.item() == pytest.approx(math.log(61), abs=0.8)


# ------------------------------------------------------------------------------------------------ configuration
def test_params_hold_callables_and_names() -> None:
    params = create_params(Namespace(model="open_lm_test_tiny", model_norm="rms_norm", qk_norm=True, ffn_type="gelu"))
    assert vars(params)["attn_func"] is torch_attn or not torch.cuda.is_available()
    assert vars(params)["norm_type"](4, eps=1e-5).weight.shape == (4,)
    assert (params.dim, params.hidden_dim, params.head_dim, params.norm_eps) == (16, 16, 8, 1e-5)
    assert (params.model_norm, params.apply_qk_norm, params.ffn_type) == ("rms_norm", True, "gelu")
    assert isinstance(Transformer(params).layers[0], Block)


def test_the_model_file_takes_precedence_over_flags() -> None:
    params = create_params(Namespace(model="open_lm_1b_old", positional_embedding_type="none", seq_len=4))
    assert (params.positional_embedding_type, params.seq_len) == ("head_rotary", 2048)


def test_invalid_params_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Params(dim=2, n_heads=4, n_layers=0, moe_freq=1, moe_num_experts=2, moe_top_k=3)
    for part in ("n_layers is 0", "n_heads is 4, more than hidden_dim 2", "--moe-top-k is 3, expected 1 to 2"):
        assert part in str(caught.value)


@pytest.fixture
def second_of_two_ranks() -> Iterator[DeviceMesh]:
    """A mesh of two ranks on the second rank, with a fake process group that does not communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "changes", [{"weight_tying": True}, {"ffn_type": "gelu"}, {"moe_freq": 1, "moe_num_experts": 3}]
)
def test_a_sharded_model_has_the_same_initial_values(second_of_two_ranks: DeviceMesh, changes: dict[str, Any]) -> None:
    params = Params(dim=24, n_layers=2, n_heads=2, vocab_size=31, **changes)
    with torch.device("meta"):
        sharded = Transformer(params)
    for block in sharded.layers:
        fully_shard(block, mesh=second_of_two_ranks)
    fully_shard(sharded, mesh=second_of_two_ranks)
    sharded.to_empty(device="cpu")
    sharded.reset_parameters(seed=7)
    full = Transformer(params)
    full.reset_parameters(seed=7)
    for name, parameter in sharded.named_parameters():
        expected = full.get_parameter(name).chunk(2)[1]
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.to_local(), expected, rtol=0, atol=0, msg=name)


def test_angles_stay_float32_under_mixed_precision(second_of_two_ranks: DeviceMesh) -> None:
    model = small_model()
    for block in (*model.layers, model):
        fully_shard(block, mesh=second_of_two_ranks, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen: list[Any] = []
    model.layers[1].attention.pos_embed.register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(random_ids(2, 9))
    queries, _, _, angles = seen
    assert queries.dtype == torch.bfloat16 and angles.cos.dtype == angles.sin.dtype == torch.float32


def test_compiled_model_gives_the_same_logits_and_gradients() -> None:
    model, ids = small_model(moe_freq=2, moe_num_experts=3).train(), random_ids(2, 9)

    def gradients(call: Any) -> list[Tensor]:
        loss, count = token_loss(call(ids[:, :-1])[0], ids[:, 1:])
        total = loss / count + model.auxiliary_loss()
        return list(torch.autograd.grad(total, list(model.parameters())))

    expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), expected)
