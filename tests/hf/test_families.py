"""The native model computes the logits and gradients of each family of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, TINY, checkpoint_tensors, hf_model, native_model, native_params, packed
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from open_lm.errors import ConfigError
from open_lm.generate.sampling import Sampling, generate_ids
from open_lm.hf.families import FAMILIES, architecture, tensor_sources
from open_lm.hf.standalone.configuration_openlm import DEFAULTS, OpenLMConfig
from open_lm.hf.standalone.rotary_openlm import rotary_table
from open_lm.model.losses import TokenLoss
from open_lm.model.positional_embedding import get_positional_embedding, sequence_lengths

TOLERANCE = 1e-5  # relative to the largest value
CHUNKS = (5, 1, 17, 1, 16)  # tokens that a KV cache receives at a time
# Cached keys keep the rotary frequencies of the length at which they were computed.
DEPENDS_ON_LENGTH = ("llama_dynamic", "llama_longrope")


def random_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: Tensor, expected: Tensor, label: str = "", tolerance: float = TOLERANCE) -> None:
    difference = (actual - expected).abs().max().item()
    limit = tolerance * expected.abs().max().item()
    assert difference <= limit, f"{label}: {difference:.2e}, expected at most {limit:.2e}"


def in_chunks(hf: Any, ids: Tensor, lengths: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Return the logits of a model of transformers whose KV cache receives `lengths` tokens at a time."""
    chunks, cache, start = [], None, 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for length in lengths:
        part = slice(start, start + length)
        more = {} if mask is None else {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        output = hf(ids[:, part], past_key_values=cache, use_cache=True, **more)
        cache, start = output.past_key_values, part.stop
        chunks.append(output.logits)
    return torch.cat(chunks, 1)


def test_every_family_is_tested() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    hf = hf_model(case)
    native, ids = native_model(hf), random_ids(2, 40)
    expected = hf(ids).logits
    assert_equal(native(ids)[0], expected, "all positions")
    expected_chunks = in_chunks(hf, ids, CHUNKS) if case in DEPENDS_ON_LENGTH else expected
    chunks, cache, start = [], None, 0
    for length in CHUNKS:
        logits, _, cache = native(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        chunks.append(logits)
        start += length
    assert_equal(torch.cat(chunks, 1), expected_chunks, "KV cache")
    hf.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        sources = tensor_sources(hf.config.to_dict(), [name for name, _ in native.named_parameters()])
        assert {name for source in sources.values() for name in source.names} == set(file.keys())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_left_padding(case: str) -> None:
    hf = hf_model(case)
    native, ids = native_model(hf), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = hf(ids, attention_mask=mask, position_ids=positions).logits
    if case in DEPENDS_ON_LENGTH:
        assert_equal(native(ids, attention_mask=mask)[0][mask == 1], expected[mask == 1])
        # A new model: that of `hf` keeps the frequencies of the longest sequence so far.
        expected = in_chunks(hf_model(case), ids, (24, 6), mask)
    logits, _, cache = native(ids[:, :24], attention_mask=mask[:, :24], use_cache=True)
    rest, _, _ = native(ids[:, 24:], attention_mask=mask, past_key_values=cache)
    assert_equal(torch.cat((logits, rest), 1)[mask == 1], expected[mask == 1])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_documents_equal_separate_sequences(case: str) -> None:
    native, ids = native_model(hf_model(case)), random_ids(1, 40)
    lengths = (12, 3, 25)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    expected = torch.cat([native(part)[0] for part in ids.split(lengths, dim=1)], dim=1)
    assert_equal(native(ids, document_ids=documents)[0], expected)


def step(model: torch.nn.Module, loss: Tensor) -> None:
    """Compute gradients of the loss, and update the parameters with AdamW.

    Its eps is larger than the rounding errors of gradients, whose sign would otherwise determine an update.
    """
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1).step()


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_a_step(case: str) -> None:
    hf = hf_model(case).train()
    native, ids = native_model(hf).train(), random_ids(2, 41)
    has_experts = native.params.moe_freq > 0
    output = hf(ids[:, :-1], **({"output_router_logits": True} if has_experts else {}))
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
    loss = native(ids[:, :-1], loss=TokenLoss(ids[:, 1:]))[0] / 80
    if has_experts:
        auxiliary = native.auxiliary_loss()
        assert auxiliary is not None
        expected = expected + hf.config.router_aux_loss_coef * output.aux_loss
        loss = loss + auxiliary
    assert_equal(loss, expected, "loss")
    step(hf, expected)
    step(native, loss)
    parameters = dict(hf.named_parameters(remove_duplicate=False))
    gradients = ((name, parameter.grad) for name, parameter in parameters.items())
    expected_grads = packed(hf.config, native, checkpoint_tensors(gradients))
    updated = packed(hf.config, native, checkpoint_tensors(iter(parameters.items())))
    for name, parameter in native.named_parameters():
        assert parameter.grad is not None
        assert_equal(parameter.grad, expected_grads[name], f"gradient of {name}")
        assert_equal(parameter.detach(), updated[name], f"updated {name}")


def test_a_padded_vocabulary_gives_the_loss_and_gradients_of_the_unpadded_model() -> None:
    hf = hf_model("llama_2")
    plain, ids = native_model(hf).train(), random_ids(2, 41)
    padded = native_model(hf, vocab_size=64, unpadded_vocab_size=61).train()
    with torch.no_grad():
        padded.output.weight[61:] = 1.0  # padding rows have no effect, whatever they contain
        logits = padded(ids)[0]
    assert_equal(logits[..., :61], plain(ids)[0])
    assert (logits[..., 61:] == -torch.inf).all()
    with pytest.raises(IndexError, match="targets range from 1 to 61, expected 0 to 60"):
        padded(ids[:1, :2], loss=TokenLoss(torch.tensor([[1, 61]])))
    losses = [model(ids[:, :-1], loss=TokenLoss(ids[:, 1:], 1e-3))[0] for model in (plain, padded)]
    assert_equal(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), padded.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_equal(other.grad[: len(one)], one.grad, name)
        assert (other.grad[len(one) :] == 0).all()


@pytest.mark.parametrize("case", ["gemma_2", "phi_2", "llama_2"])
def test_half_precision_is_within_the_rounding_noise(case: str) -> None:
    """The error of bfloat16 logits is at most 1.5 times that of transformers' bfloat16 logits."""
    hf = hf_model(case)
    native, ids = native_model(hf), random_ids(2, 40)
    with torch.no_grad():
        exact = native(ids)[0]
        error = (native.bfloat16()(ids)[0] - exact).square().mean().sqrt()
        reference = (hf.bfloat16()(ids).logits.float() - exact).square().mean().sqrt()
    assert 0 < error < 1.5 * reference


def version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the rotary settings of version 4 of transformers."""
    parameters = copy.deepcopy(config.pop("rope_parameters"))
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    theta, fraction = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor", None)
    scaling = parameters if parameters["rope_type"] != "default" else None
    config.pop("layer_types", None)
    pattern = {"sliding_window_pattern": config.pop("_sliding_window_pattern", 2)}
    return {**config, **pattern, "rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": fraction}


@pytest.mark.parametrize("case", [case for case in CASES if "olmo_3" not in case])  # version 4 has no olmo3
def test_configurations_of_version_4_give_the_same_architecture(case: str) -> None:
    model_type, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **{**TINY, **fields}).to_dict()
    assert architecture(version_4(dict(config))) == architecture(config)


def test_unsupported_configurations_are_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"model_type 'bert' is not supported, expected one of gemma, gemma2, .*qwen3"
    ):
        architecture({"model_type": "bert"})
    config = AutoConfig.for_model("olmoe", **TINY, clip_qkv=3.0, hidden_act="relu").to_dict()
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError) as caught:
        architecture({**config, "quantization_config": {"bits": 4}})
    for part in (
        "hidden_act is 'relu'",
        "clip_qkv is 3.0",
        "the rope_type is 'spiral', expected one of default, linear, llama3, yarn, dynamic",
        "quantization_config is {",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"llama has no weights for the parameter layers\.0\.ffn_post_norm\.weight"):
        tensor_sources({"model_type": "llama"}, ["layers.0.ffn_post_norm.weight"])


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        **{"factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "dynamic": {"factor": 2.5},
    "yarn": {
        **{"factor": None, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.4},
        **{"beta_fast": 8, "beta_slow": 2},
    },
    "longrope": {
        **{"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)]},
        "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_frequencies_of_all_types_of_scaling(kind: str) -> None:
    """Below, at and beyond the original length, for sequences that become longer and shorter again."""
    parameters = {"rope_type": kind, "rope_theta": 5e5, **SCALINGS[kind]}
    fields = {**TINY, "hidden_size": 64, "max_position_embeddings": 64 if kind == "dynamic" else 256}
    config = AutoConfig.for_model("llama", **fields, rope_parameters=parameters)
    params = native_params(config)
    (layer,) = {params.layer_kind(layer) for layer in range(params.n_layers)}
    rope = params.rope(layer)
    embedding, reference = get_positional_embedding("rotary", 16, rope), LlamaRotaryEmbedding(config)
    standalone = OpenLMConfig(**{name: getattr(params, name) for name in DEFAULTS})
    for length in (7, 64, 65, 200, 33):
        positions = torch.arange(length)
        lengths = sequence_lengths(positions, None) if rope.depends_on_length else None
        angles = embedding.angles(positions, 4, lengths)
        expected = reference(torch.zeros(()), positions[None])
        exported = rotary_table(standalone, positions, False)
        for own, other, table in zip((angles.cos, angles.sin), exported, expected, strict=True):
            assert_equal(own.squeeze(-2), table[0, :, :8], f"{length} tokens", 2e-6)
            assert_equal(other.squeeze(-2), table[0, :, :8], f"export, {length} tokens", 2e-6)


@pytest.mark.parametrize("case", ["tinyllama", "olmo_2", "mixtral"])
def test_unpacked_tensors_are_those_of_the_checkpoint(case: str) -> None:
    hf = hf_model(case)
    native = native_model(hf)
    names = [name for name, _ in native.named_parameters()]
    tensors = checkpoint_tensors(hf.named_parameters(remove_duplicate=False))
    for name, source in tensor_sources(hf.config.to_dict(), names).items():
        parts = source.unpack(native.get_parameter(name))
        for part, tensor in zip(source.names, parts, strict=True):
            assert torch.equal(tensor, tensors[part])


@torch.no_grad()
@pytest.mark.parametrize("case", ["gemma_2", "gemma_3", "mistral", "phi_2", "smollm_3", "mixtral", *DEPENDS_ON_LENGTH])
def test_greedy_generation_equals_that_of_transformers(case: str) -> None:
    hf = hf_model(case)
    native, prompts = native_model(hf, seq_len=64), random_ids(3, 12)
    settings = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(prompts)}
    expected = hf.generate(prompts, max_new_tokens=15, **settings)
    steps = generate_ids(native, prompts.tolist(), Sampling(max_new_tokens=15, temperature=0))
    assert [list(row) for row in zip(*steps, strict=True)] == expected[:, 12:].tolist()
