"""Exported runs: they load in transformers without this package, with their tokenizer, and in this package again."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE
from family_models import CASES, TINY
from model_helpers import random_ids
from run_helpers import tiny_flags, tokens
from safetensors.torch import load_file
from tokenizer_helpers import write_data, write_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import open_lm.hf
from open_lm.checkpoint import load_weights, read_model_state
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import CheckpointError, ConfigError
from open_lm.hf.configuration import FIELDS
from open_lm.hf.convert import main
from open_lm.hf.families import architecture
from open_lm.hf.family_configs import config_of
from open_lm.hf.standalone.modeling_openlm import OpenLMConfig, OpenLMForCausalLM
from open_lm.main import main as train
from open_lm.model.params import Params, params_from_keys
from open_lm.model.transformer import Transformer
from open_lm.tokenizer import load_tokenizer

IDS = VOCAB_SIZE
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # relative to the largest value
SIZES: dict[str, Any] = {"dim": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 61, "seq_len": 48}
CUSTOM = {"attn_name": "custom_attn", "attn_activation": "relu_squared", "attn_seq_scalar": "avg"}
# Architectures of no family; together they have every value of every setting.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lp_norms": {"model_norm": "gain_only_lp_layer_norm", "apply_qk_norm": True, "qkv_bias": True},
    "no_gain": {"model_norm": "no_wb_layer_norm", "ffn_type": "gelu", "positional_embedding_type": "none"},
    "biases": {"model_norm": "lp_layer_norm", "ffn_type": "gemma_geglu", "attn_out_bias": True, "head_bias": True},
    "head_rotary": {"positional_embedding_type": "head_rotary", "post_embed_norm": True, "weight_tying": True},
    "llama_rotary": {"positional_embedding_type": "llama_rotary", "rope_fraction": 0.5, "ffn_bias": True},
    "gain_only": {"model_norm": "gain_only_layer_norm", "ffn_type": "geglu_tanh", "embedding_scale": 3.0},
    "custom": {**CUSTOM, "attn_seq_scalar_alpha": 0.5, "n_kv_heads": 2},
    "custom_softmax": {**CUSTOM, "attn_activation": "softmax", "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 0.1},
    "experts": {"moe_freq": 2, "moe_num_experts": 4},
    "gated_experts": {"moe_freq": 1, "moe_num_experts": 5, "moe_ffn_type": "swiglu", "moe_normalize_scores": True},
    "window": {
        **{"attn_window": 5, "attn_window_pattern": [True, False], "rope_local_base": 100.0, "attn_soft_cap": 2.0},
        **{"logit_soft_cap": 3.0, "attn_scale": 0.3, "rope_pattern": [False, True, True], "norm_position": "both"},
    },
}


def random_model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Params(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def standalone(native: Transformer) -> OpenLMForCausalLM:
    """Return the model of an exported folder, with the weights of a native model."""
    model = OpenLMForCausalLM(OpenLMConfig(**{name: getattr(native.params, name) for name in FIELDS})).eval()
    names = dict(model.named_parameters(remove_duplicate=False))
    state = {f"model.{name}": tensor for name, tensor in native.state_dict().items()}
    model.load_state_dict({name: state[name] for name in names})
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()


def family_params(case: str) -> dict[str, Any]:
    model_type, fields = CASES[case]
    params = params_from_keys(architecture(AutoConfig.for_model(model_type, **{**TINY, **fields}).to_dict()))
    return {name: getattr(params, name) for name in FIELDS}


@pytest.mark.parametrize("name", [*VARIANTS, "llama_3", "gemma_3", "phi_2", "qwen_3", "olmo_2", "smollm_3", "olmoe"])
def test_the_source_files_of_an_export_compute_the_native_logits_and_gradients(name: str) -> None:
    native = random_model(**(VARIANTS[name] if name in VARIANTS else family_params(name)))
    model, ids = standalone(native), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with torch.no_grad():
        assert_close(model(ids).logits, native(ids)[0])
        expected = native(ids, attention_mask=mask)[0]
        assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1])
        if not name.startswith("custom"):  # its weights depend on the number of cached keys
            first = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
            last = model(ids[:, 20:], attention_mask=mask, past_key_values=first.past_key_values, logits_to_keep=2)
            assert_close(last.logits, expected[:, -2:])
    output = model.train()(ids, labels=ids)
    reference = open_lm.hf.OpenLMForCausalLM.from_open_lm(native.train())
    for block in native.layers if native.params.moe_freq else ():
        block.feed_forward.capacity_factor = 0.0
    expected_loss = reference(ids, labels=ids).loss
    assert_close(output.loss, expected_loss)
    output.loss.backward()
    expected_loss.backward()
    gradients = dict(native.named_parameters())
    for parameter, tensor in model.named_parameters():
        assert_close(tensor.grad, gradients[parameter.removeprefix("model.")].grad)


@pytest.mark.parametrize("name", ["window", "gated_experts", "head_rotary"])
def test_the_source_files_of_an_export_serve_trainers_that_read_hidden_states_and_recompute_blocks(name: str) -> None:
    model, ids = standalone(random_model(**VARIANTS[name])), random_ids(2, 12)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits, cap = model.get_output_embeddings()(hidden), model.config.final_logit_softcapping
    assert_close(logits if cap is None else cap * torch.tanh(logits / cap), model(ids).logits)
    assert model.base_model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 12
    with pytest.raises(ValueError, match="exactly one of"):
        model.base_model(input_ids=ids, inputs_embeds=hidden)

    calls: list[int] = []
    model.train().model.layers[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 1 + 2  # the block is computed again in the backward pass
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)


def test_every_setting_of_an_architecture_is_part_of_an_export() -> None:
    assert set(open_lm.hf.standalone.configuration_openlm.DEFAULTS) == set(FIELDS)
    assert config_of(random_model().params) is None


# ---------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model of the package's own shape (own) and one that is a llama (llama), with a tokenizer; export both."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    manifest = write_data(folder / "data", tokenizer)
    flags = [*tiny_flags(folder, folder / "logs"), "--dataset-manifest", manifest, "--train-num-samples", tokens(2)]
    shape = json.loads((folder / "model.json").read_text())
    llama = {"model_norm": "rms_norm", "positional_embedding_type": "llama_rotary", "unpadded_vocab_size": IDS}
    for name, keys in (("own", {"qk_norm": True}), ("llama", llama)):
        (folder / f"{name}.json").write_text(json.dumps({**shape, "vocab_size": IDS + 24, **keys}))
        train([*flags, "--model", str(folder / f"{name}.json"), "--name", name, "--epochs", "1"])
        main(["export", str(folder / "logs" / name), str(folder / name), "--verify"])
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("environment", [".venv", ".venv-eval"])
def test_an_export_loads_without_this_package(runs: Path, tmp_path: Path, environment: str) -> None:
    python = Path(sys.executable) if environment == ".venv" else ROOT / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} is not installed: make install-eval")
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    # -S: do not read the files that make the package importable.
    variables = {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-S", "-P", str(ROOT / "tests" / "helpers" / "load_exported.py")]
    folders = [str(runs / "own"), str(runs / "llama")]
    result = subprocess.run(
        [*command, *folders], env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    own, llama = json.loads(next(line for line in result.stdout.split("\n") if line.startswith("[{")))
    assert (own["class"], llama["class"]) == ("OpenLMForCausalLM", "LlamaForCausalLM")
    tokenizer = load_tokenizer(str(runs / "tokenizer.json"))
    for found, name in ((own, "own"), (llama, "llama")):
        assert found["ends"] == found["pads"] == [tokenizer.eot_id] * 3
        assert found["ids"][0] == tokenizer.encode("Some text")
        assert found["cache_is_exact"]
        for row in found["generated"]:
            new = row[len(found["ids"][0]) :]
            assert tokenizer.eot_id not in new or set(new[new.index(tokenizer.eot_id) :]) == {tokenizer.eot_id}
        mask = torch.tensor(found["mask"])
        native = loaded_model(runs, name)
        expected = native(torch.tensor(found["ids"]), attention_mask=mask)[0][..., :IDS]
        assert_close(torch.tensor(found["logits"])[..., :IDS][mask == 1], expected[mask == 1])


def loaded_model(runs: Path, name: str) -> Transformer:
    """Return the model of a run."""
    from open_lm.model.transformer import create_model

    class Settings:
        model = str(runs / f"{name}.json")

    native = create_model(Settings()).eval()
    load_weights(str(runs / "logs" / name / "checkpoints" / "epoch_1.pt"), native)
    return native.requires_grad_(False)


def test_all_forms_of_a_checkpoint_give_the_same_export(runs: Path, tmp_path: Path) -> None:
    checkpoints = runs / "logs" / "own" / "checkpoints"
    for number, source in enumerate((checkpoints / "step_00000002", checkpoints / "epoch_1.pt")):
        main(["export", str(source), str(tmp_path / str(number))])
        weights = load_file(tmp_path / str(number) / "model.safetensors")
        expected = load_file(runs / "own" / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    card = (runs / "own" / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in expected.values())
    assert f"{parameters:,} parameters" in card and "| optimizer steps | 2 |" in card and "trust_remote_code" in card
    assert "trust_remote_code" not in (runs / "llama" / "README.md").read_text()


def test_an_exported_folder_is_a_source_of_weights(runs: Path, tmp_path: Path) -> None:
    for name in ("own", "llama"):
        expected, loaded = loaded_model(runs, name), loaded_model(runs, name)
        for parameter in loaded.parameters():
            parameter.zero_()
        load_weights(str(runs / name), loaded)  # with other rows than the folder, for llama
        ids = random_ids(1, SEQ_LEN)
        assert torch.equal(loaded(ids)[0], expected(ids)[0])
        registered = AutoModelForCausalLM.from_pretrained(runs / name)
        assert_close(registered(ids).logits.detach()[..., :IDS], expected(ids)[0][..., :IDS])
    with pytest.raises(
        CheckpointError, match=r"(?s)is not the model of --model.*model_norm is 'rms_norm' and 'default_"
    ):
        load_weights(str(runs / "own"), loaded_model(runs, "llama"))


def test_training_evaluation_and_generation_accept_an_exported_folder(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    manifest = str(runs / "data" / "manifest.jsonl")
    flags = [*tiny_flags(tmp_path, tmp_path / "logs"), "--model", str(runs / "own.json")]
    training = [*flags, "--dataset-manifest", manifest, "--train-num-samples", tokens(1), "--epochs", "1"]
    train([*training, "--pretrained", f"params::{runs / 'own'}", "--name", "started"])
    assert choose_tokenizer(str(tmp_path / "logs" / "started")).eot_id == 256
    with pytest.raises(CheckpointError, match=r"exported model without the state of the optimizer.*--pretrained"):
        train([*training, "--resume", str(runs / "own"), "--name", "resumed"])
    validation = [*flags, "--val-data", str(next((runs / "data").glob("*.tar"))), "--val-data-key", "npy"]
    losses = []
    for checkpoint in (runs / "own", runs / "logs" / "own" / "checkpoints" / "epoch_1.pt"):
        caplog.clear()
        train([*validation, "--resume", str(checkpoint), "--name", f"evaluated-{len(losses)}"])
        losses.append([message for message in caplog.messages if "loss" in message and "Validation on" in message])
    assert losses[0] == losses[1] != []
    generate = runpy.run_path(str(ROOT / "scripts" / "generate.py"))["main"]
    texts = []
    for checkpoint in (runs / "own", runs / "logs" / "own"):
        capsys.readouterr()
        generate(["--checkpoint", str(checkpoint), "--prompt", "Some", "--max-new-tokens", "4"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_bad_exports_are_refused(runs: Path, tmp_path: Path, shared_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="is in the format of transformers already"):
        main(["export", str(runs / "own"), str(tmp_path / "out")])
    checkpoint = str(runs / "logs" / "own" / "checkpoints" / "epoch_1.pt")
    weights = tmp_path / "weights.pt"
    torch.save(read_model_state(checkpoint)[0], weights)
    model = ["--model", str(runs / "own.json")]
    with pytest.raises(ConfigError, match="--model is missing"):
        main(["export", str(weights), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"--tokenizer .*has 32000 ids, but the model only 1024 rows"):
        main(["export", str(weights), str(tmp_path / "out"), *model, "--tokenizer",
              str(shared_dir / "data" / "tokenizers" / "llama2.model")])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model.*attention\.q_norm"):
        main(["export", checkpoint, str(tmp_path / "out"), "--model", str(runs / "llama.json")])
    assert list(tmp_path.iterdir()) == [weights]
