"""Import and export of models of transformers: bit-equal round trips of all families, and clear errors."""

from __future__ import annotations

import importlib.util
import json
import pickle
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, TINY, hf_model
from safetensors.torch import load_file, save_file
from tokenizer_helpers import write_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from open_lm import storage
from open_lm.checkpoint import load_weights, read_model_state
from open_lm.config.architecture import read_architecture
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import CheckpointError, ConfigError, StorageError
from open_lm.hf.convert import main
from open_lm.hf.weight_files import WeightFiles
from open_lm.model.params import params_from_keys
from open_lm.model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
# Fields of a config.json that do not change what a model computes, or that only one of its spellings has.
NEUTRAL = {"_name_or_path", "dtype", "transformers_version", "architectures", "use_sliding_window", "max_window_layers"}
PADDED = {"llama_2", "phi_2", "qwen_2", "gemma_3"}


def saved_model(case: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = hf_model(case).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_weights(first: Path, second: Path) -> None:
    expected, actual = weights(first), weights(second)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not _bit_equal(actual[name], expected[name])] == []


def _bit_equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_export_of_an_import_is_the_original(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(case, tmp_path / "hf")
    padding = ["--vocab-multiple", "16"] if case in PADDED else []
    main(["import", str(tmp_path / "hf"), str(tmp_path / "own"), "--verify", *padding])
    main(["export", str(tmp_path / "own"), str(tmp_path / "back"), "--verify"])
    assert capsys.readouterr().out.count("verified: the logits of") == 2
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(loaded) is type(model)
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hf", "back"))
    known = {name for name in after if name not in NEUTRAL and name in before}
    assert {name: after[name] for name in known} == {name: before[name] for name in known}
    assert set(before) - NEUTRAL <= set(after)
    if padding:
        keys = read_architecture(str(tmp_path / "own" / "model.json"))
        assert keys["vocab_size"] == 64 and keys.get("unpadded_vocab_size") == (None if case == "phi_2" else 61)
        rows = read_model_state(tmp_path / "own" / "epoch_0.pt")[0]["tok_embeddings.weight"]
        assert len(rows) == 64 and rows[61:].any() == (case == "phi_2")


def test_shards_and_bin_files_give_the_same_checkpoint(tmp_path: Path) -> None:
    model = saved_model("tinyllama", tmp_path / "one", torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for names, folder in ((["pytorch_model.bin"], "bin"), (["a.bin", "b.bin"], "bins")):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / folder)
        items = list(weights(tmp_path / "one").items())
        parts = [dict(items[number :: len(names)]) for number in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, tmp_path / folder / name)
        index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
        if len(names) > 1:
            (tmp_path / folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    states = []
    for folder in ("one", "shards", "bin", "bins"):
        main(["import", str(tmp_path / folder), str(tmp_path / f"own_{folder}")])
        states.append(read_model_state(tmp_path / f"own_{folder}" / "epoch_0.pt")[0])
        sharded = read_model_state(tmp_path / f"own_{folder}" / "step_00000000")[0]
        assert all(_bit_equal(sharded[name], tensor) for name, tensor in states[0].items())
    assert all(_bit_equal(state[name], tensor) for state in states for name, tensor in states[0].items())
    assert {tensor.dtype for tensor in states[0].values()} == {torch.bfloat16}


def test_dtype_rounds_the_weights(tmp_path: Path) -> None:
    saved_model("gemma_2b", tmp_path / "hf")
    main(["import", str(tmp_path / "hf"), str(tmp_path / "own"), "--dtype", "bfloat16", "--verify"])
    main(["export", str(tmp_path / "own"), str(tmp_path / "back"), "--dtype", "float32"])
    expected = {name: tensor.bfloat16().float() for name, tensor in weights(tmp_path / "hf").items()}
    actual = weights(tmp_path / "back")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_order_of_rows_follows_the_position_embedding_of_model(tmp_path: Path) -> None:
    """Checkpoints of llama_rotary have other rows than those of rotary; the logits and the export are the same."""
    saved_model("tinyllama", tmp_path / "hf")
    main(["import", str(tmp_path / "hf"), str(tmp_path / "own")])
    named = json.loads((tmp_path / "own" / "model.json").read_text())
    named |= {"positional_embedding_type": "llama_rotary", "seq_len": 32}
    (tmp_path / "named.json").write_text(json.dumps(named))
    # The command line of other programs for the same conversion.
    main(["--checkpoint_dir", str(tmp_path / "hf"), f"--output_file={tmp_path / 'other'}", "--verify",
          "--model", str(tmp_path / "named.json")])  # fmt: skip
    keys = read_architecture(str(tmp_path / "other" / "model.json"))
    assert (keys["positional_embedding_type"], keys["seq_len"]) == ("llama_rotary", 32)
    name = "layers.0.attention.q_proj.weight"
    for folder, file in (("own", "step_00000000"), ("own", "epoch_0.pt")):
        with pytest.raises(CheckpointError, match="was imported for rotary, but --model has llama_rotary"):
            load_weights(str(tmp_path / folder / file), Transformer(params_from_keys(keys)))
    rows = [read_model_state(tmp_path / folder / "epoch_0.pt")[0][name] for folder in ("own", "other")]
    assert not torch.equal(*rows) and torch.equal(*(row.sort(0).values for row in rows))
    main(["export", str(tmp_path / "other"), str(tmp_path / "back"), "--verify"])
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    (tmp_path / "named.json").write_text(json.dumps({**named, "norm_eps": 1e-3, "n_layers": 2}))
    with pytest.raises(ConfigError, match=r"(?s)n_layers is 2 and 3.*norm_eps is 0.001 and 1e-05"):
        main(["import", str(tmp_path / "hf"), str(tmp_path / "third"), "--model", str(tmp_path / "named.json")])
    assert not (tmp_path / "third").exists()


def test_buckets(s3_bucket: str, tmp_path: Path) -> None:
    saved_model("qwen_2", tmp_path / "hf")
    root = f"s3://{s3_bucket}/models"
    for file in (tmp_path / "hf").iterdir():
        storage.upload(file, f"{root}/hf/{file.name}")
    main(["import", f"{root}/hf", f"{root}/own", "--verify"])
    main(["export", f"{root}/own/epoch_0.pt", f"{root}/back", "--verify"])
    (tmp_path / "back").mkdir()
    storage.download(f"{root}/back/model.safetensors", tmp_path / "back" / "model.safetensors")
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ConfigError, match=r"models/own: has a model\.json already"):
        main(["import", f"{root}/hf", f"{root}/own"])


def test_other_schemes_use_fsspec(tmp_path: Path) -> None:
    """memory:// is a store of fsspec without a backend of its own, like gs://."""
    model = saved_model("gemma_2b", tmp_path / "hf")
    root = f"memory://bucket{tmp_path}"
    for file in (tmp_path / "hf").iterdir():
        storage.upload(file, f"{root}/hf/{file.name}")
    main(["import", f"{root}/hf", f"{root}/own", "--verify"])
    main(["export", f"{root}/own/step_00000000", f"{root}/back", "--verify"])
    (tmp_path / "back").mkdir()
    storage.download(f"{root}/back/model.safetensors", tmp_path / "back" / "model.safetensors")
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    params = params_from_keys(read_architecture(f"{root}/own/model.json"))
    for weights_of in ("own/step_00000000", "own/epoch_0.pt", "back"):
        native = Transformer(params)
        load_weights(f"{root}/{weights_of}", native)
        assert torch.equal(native.tok_embeddings.weight, model.model.embed_tokens.weight), weights_of


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_gs_urls_without_gcsfs_name_the_package(llama: Path, tmp_path: Path) -> None:
    url = "gs://bucket/model"
    main(["import", str(llama), str(tmp_path / "own")])
    commands = (
        ["import", url, str(tmp_path / "new")],
        ["import", str(llama), url],
        ["export", url, str(tmp_path / "new")],
        ["export", str(tmp_path / "own"), url],
    )
    for argv in commands:
        with pytest.raises(StorageError, match=rf"{url}.*package that is not installed \(Please install gcsfs"):
            main(argv)
    with pytest.raises(StorageError, match="Please install gcsfs"):
        load_weights(f"{url}/step_00000000", Transformer(params_from_keys(read_architecture("open_lm_test_tiny"))))
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.incomplete").exists()


def test_the_tokenizer_and_special_ids_are_those_of_the_source(tmp_path: Path) -> None:
    source, mirror = tmp_path / "hf", tmp_path / "mirror" / "org" / "model"
    config = AutoConfig.for_model("llama", **{**TINY, "vocab_size": 300})
    AutoModelForCausalLM.from_config(config).save_pretrained(mirror)
    write_tokenizer(mirror / "tokenizer.json")
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (mirror / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [256, 257], "bos_token_id": 1, "temperature": 0.6, "do_sample": True}
    (mirror / "generation_config.json").write_text(json.dumps(generation))
    download = runpy.run_path(str(ROOT / "scripts" / "download.py"))["main"]
    for _ in range(2):
        flags = ["--repo_id", "org/model", "--local-mirror", str(tmp_path / "mirror"), "--output", str(source)]
        download([*flags, "--access_token", "secret"])
    main(["import", str(source), str(tmp_path / "own")])
    assert choose_tokenizer(str(tmp_path / "own" / "epoch_0.pt")).eot_id == 257
    main(["export", str(tmp_path / "own"), str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == settings
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (mirror / "tokenizer.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.temperature) == ([256, 257], 0.6)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 250}))
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:250].clone()
    save_file(tensors, source / "model.safetensors")
    assert_refused(source, tmp_path / "none", ConfigError, "has 258 ids, but the embedding only 250 rows, 8 too few")


# ---------------------------------------------------------------------------------------------- bad input
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    saved_model("llama_2", folder)
    return folder


def changed(llama: Path, tmp_path: Path, **fields: Any) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def assert_refused(folder: Path, tmp_path: Path, error: type[Exception], *patterns: str) -> None:
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(error) as found:
        main(["import", str(folder), str(tmp_path / "own")])
    assert [pattern for pattern in patterns if pattern not in str(found.value)] == [], str(found.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("own")] == []


@pytest.mark.parametrize(
    ("fields", "patterns"),
    [
        ({"model_type": "mamba"}, ["model_type 'mamba' is not supported", "llama", "openlm", "qwen3"]),
        ({"hidden_act": "relu"}, ["hidden_act is 'relu'", "silu"]),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4, "factor": 4.0}}, ["rope_type is 'spiral'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantized (awq)"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder is True, expected False", "not implemented"]),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, ["auto_map"]),
    ],
)
def test_configurations_that_change_the_result_are_refused(
    llama: Path, tmp_path: Path, fields: dict[str, Any], patterns: list[str]
) -> None:
    assert_refused(changed(llama, tmp_path, **fields), tmp_path, ConfigError, *patterns)


def test_all_tensors_that_do_not_fit_are_listed(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(56, 31)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 32, dtype=torch.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # older checkpoints have it
    save_file(tensors, folder / "model.safetensors")
    assert_refused(
        folder,
        tmp_path,
        CheckpointError,
        "2 tensors are missing: model.norm.weight (32,), lm_head.weight (61, 32)",
        "1 tensors are not part of the model: model.layers.0.self_attn.q_proj.bias (32,)",
        "model.layers.1.mlp.up_proj.weight: found (56, 31), expected (56, 32)",
        "quantized, expected floating-point weights: model.layers.2.mlp.up_proj.weight int8",
    )


def test_truncated_files_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    for length, message in ((len(data) - 8, "truncated: expected"), (200, "truncated: the header"), (3, "3 bytes")):
        (folder / "model.safetensors").write_bytes(data[:length])
        assert_refused(folder, tmp_path, CheckpointError, "model.safetensors", message)
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert_refused(folder, tmp_path, CheckpointError, "not a safetensors file")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, tmp_path, CheckpointError, "expected model.safetensors or pytorch_model.bin", "config.json")


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def test_pickled_code_is_not_executed(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path)
    (folder / "model.safetensors").unlink()
    for save in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))):
        save({"model.norm.weight": _Harmful(tmp_path / "trace")}, folder / "pytorch_model.bin")
        assert_refused(folder, tmp_path, CheckpointError, "pytorch_model.bin")
    assert not (tmp_path / "trace").exists()


def test_existing_folders_are_not_overwritten_and_interrupted_ones_are(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "own"
    (tmp_path / "own.incomplete").mkdir()
    (tmp_path / "own.incomplete" / "half").write_text("of a killed process")
    main(["import", str(llama), str(target)])
    assert not (target / "half").exists() and not (tmp_path / "own.incomplete").exists()
    with pytest.raises(ConfigError, match="exists already"):
        main(["import", str(llama), str(target)])
    with pytest.raises(ConfigError, match="expected a folder with config"):
        main(["import", str(tmp_path / "absent"), str(tmp_path / "other")])


def test_weights_are_read_one_tensor_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    read = WeightFiles.read

    def counted(self: WeightFiles, name: str) -> Tensor:
        nonlocal alive, most
        tensor = read(self, name)
        import weakref

        def free() -> None:
            nonlocal alive
            alive -= 1

        alive += 1
        most = max(most, alive)
        weakref.finalize(tensor, free)
        return tensor

    monkeypatch.setattr(WeightFiles, "read", counted)
    main(["import", str(llama), str(tmp_path / "own")])
    assert most == 1
