"""The transformers integration: logits, saving and loading, generate(), tokenizers, training of other models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_golden_check import VARIANTS, assert_equivalent, check
from model_helpers import random_ids, small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from open_lm.errors import CheckpointError, ConfigError
from open_lm.hf import OpenLMConfig, OpenLMForCausalLM, OpenLMTokenizerFast, load_hf_tokenizer
from open_lm.model.losses import TokenLoss
from open_lm.model.transformer import Params, create_params
from open_lm.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ModelSettings:
    model: str
    hf_model: str | None = None
    hf_seq_len: int | None = None


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_models(shared_dir: Path, variant: str) -> None:
    assert_equivalent(check(shared_dir / "compat" / "models" / variant))


def test_import_paths_of_existing_callers() -> None:
    from open_lm.utils.transformers.hf_config import OpenLMConfig as CallersConfig
    from open_lm.utils.transformers.hf_model import OpenLMforCausalLM, OpenLMModel

    params = create_params(ModelSettings("open_lm_test_tiny"))
    ids = random_ids(2, 7, vocab_size=16)
    causal = OpenLMforCausalLM(CallersConfig(params)).eval()
    bare = OpenLMModel(CallersConfig(params)).eval()
    bare.model.load_state_dict(causal.model.state_dict())
    logits, hidden, cache = bare(ids)
    assert torch.equal(logits, causal(ids).logits) and hidden.shape == (2, 7, params.dim) and cache is None


def test_configuration_round_trip_and_alternative_names(tmp_path: Path) -> None:
    params = Params(dim=48, n_layers=3, n_heads=4, vocab_size=77, seq_len=31, model_norm="rms_norm", apply_qk_norm=True)
    OpenLMConfig(params).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_params() == params
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.max_position_embeddings) == (48, 3, 31)
    sizes: dict[str, Any] = {"hidden_dim": 48, "num_hidden_layers": 3, "n_heads": 4, "vocab_size": 77, "seq_len": 31}
    other = OpenLMConfig(**sizes, norm_type="rms_norm", qk_norm=True)
    assert other.to_params() == params
    old = OpenLMConfig(params_args_dict={"model": "open_lm_test_tiny", "qk_norm": True})
    assert (old.dim, old.vocab_size, old.apply_qk_norm) == (16, 16, True)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    OpenLMForCausalLM.from_open_lm(small_model()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.attention.in_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.in_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loss_gradients_and_activation_checkpointing() -> None:
    model = OpenLMForCausalLM.from_open_lm(small_model()).train()
    ids = random_ids(3, 20)
    labels = ids.clone()
    labels[0, 5:12] = -100
    output = model(ids, labels=labels)
    valid = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1][valid], labels[:, 1:][valid])
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=7).loss, expected * valid.sum() / 7, atol=1e-5)
    output.loss.backward()
    weight = model.model.layers[0].attention.in_proj.weight
    plain, weight.grad = weight.grad, None
    model.activation_checkpointing_enable()
    assert model.model.grad_checkpointing
    model(ids, labels=labels).loss.backward()
    assert torch.allclose(weight.grad, plain, atol=1e-6)


def test_beam_search_and_sampling() -> None:
    model = OpenLMForCausalLM.from_open_lm(small_model())
    prompt = random_ids(2, 6)
    beams = model.generate(prompt, max_new_tokens=5, num_beams=3, pad_token_id=0)
    without = model.generate(prompt, max_new_tokens=5, num_beams=3, pad_token_id=0, use_cache=False)
    assert torch.equal(beams, without)
    torch.manual_seed(0)
    assert model.generate(prompt, max_new_tokens=5, do_sample=True, pad_token_id=0).shape == (2, 11)


def test_unsupported_arguments_raise() -> None:
    model = OpenLMForCausalLM.from_open_lm(small_model())
    with pytest.raises(ValueError, match="output_attentions"):
        model(random_ids(1, 4), output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask"):
        model(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


def test_logits_of_the_last_positions_only() -> None:
    native = small_model()
    model, ids = OpenLMForCausalLM.from_open_lm(native), random_ids(2, 9)
    full, kept = native(ids)[0], native(ids, logits_to_keep=2)[0]
    assert kept.shape == (2, 2, 61)
    torch.testing.assert_close(kept, full[:, -2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, kept, rtol=0, atol=0)
    assert model(ids, labels=ids, logits_to_keep=2).logits.shape == (2, 9, 61)


def test_resized_vocabulary() -> None:
    model = OpenLMForCausalLM.from_open_lm(small_model())
    before = model(random_ids(1, 5)).logits
    model.resize_token_embeddings(70)
    assert model.model.vocab_size == model.config.vocab_size == 70
    after = model(random_ids(1, 5)).logits
    assert after.shape[-1] == 70 and torch.allclose(after[..., :61], before, atol=1e-6)
    ids = random_ids(1, 5)  # the new head computes losses, as the native model's
    expected = torch.nn.functional.cross_entropy(after[0], ids[0], reduction="sum")
    torch.testing.assert_close(model.model(ids, loss=TokenLoss(ids))[0], expected)


@pytest.mark.parametrize("name", ["gpt-neox-20b.json", "llama2.model", "mistral.model"])
def test_tokenizers_give_the_same_ids_as_the_native_ones(shared_dir: Path, tmp_path: Path, name: str) -> None:
    spec = str(shared_dir / "data" / "tokenizers" / name)
    native, hf_tokenizer = load_tokenizer(spec), load_hf_tokenizer(spec)
    with open(shared_dir / "data" / "eval" / "boolq.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["query"] for _, line in zip(range(40), file, strict=False)]
    texts += ["", " a", "  two\n\n\tlines ", "naïve 日本 🙂"]
    assert [hf_tokenizer(text)["input_ids"] for text in texts] == [native.encode(text) for text in texts]
    assert [hf_tokenizer.decode(native.encode(text)) for text in texts] == texts
    assert hf_tokenizer.eos_token_id == native.eot_id and len(hf_tokenizer) == native.vocab_size
    hf_tokenizer.save_pretrained(tmp_path)
    OpenLMConfig(Params()).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, OpenLMTokenizerFast)
    assert loaded(texts[0])["input_ids"] == native.encode(texts[0]) and loaded.eos_token_id == native.eot_id


def test_special_tokens_only_on_request(shared_dir: Path) -> None:
    spec = str(shared_dir / "data" / "tokenizers" / "llama2.model")
    assert load_hf_tokenizer(spec, add_special_tokens=True)("a b")["input_ids"] == [
        1,
        *load_tokenizer(spec).encode("a b"),
    ]


def save_llama_model(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=48, **sizes)).eval()
    model.save_pretrained(folder)
    return model


def test_a_transformers_model_can_be_trained(tmp_path: Path) -> None:
    from open_lm.hf.trainable import create_hf_model

    llama = save_llama_model(tmp_path)
    model = create_hf_model(ModelSettings("", str(tmp_path), 16)).eval()
    assert (model.vocab_size, model.seq_len, model.params.n_layers) == (61, 16, 2)
    ids = random_ids(2, 16)
    logits, _, cache = model(ids, use_cache=True)
    assert torch.equal(logits, llama(ids).logits) and cache is not None
    model.train()
    model.set_grad_checkpointing()
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3


def test_invalid_transformers_models_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm.hf.trainable import create_hf_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_llama_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="positions for 48 tokens"):
        create_hf_model(ModelSettings("", str(tmp_path / "model"), 49))
    with pytest.raises(ConfigError, match="--hf-model"):
        create_hf_model(ModelSettings("", str(tmp_path / "absent"), 16))
    with pytest.raises(ConfigError, match="--hf-seq-len"):
        create_hf_model(ModelSettings("", str(tmp_path / "model")))


@pytest.mark.processes
def test_importing_the_trainer_does_not_import_transformers() -> None:
    program = (
        "import sys, open_lm.model.transformer, open_lm.generate.sampling; sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
