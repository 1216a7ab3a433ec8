"""Adapters in the format of PEFT: PEFT computes the same logits on the exported model, and the same training step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import hf_model, native_model, native_params
from model_helpers import random_ids
from safetensors.torch import load_file, save_file
from torch import nn

from open_lm.checkpoint.adapters import AdapterRecord
from open_lm.config.adapters import parse_lora
from open_lm.errors import CheckpointError
from open_lm.hf.peft_adapters import exported_modules, read_peft_folder, write_peft_folder
from open_lm.hf.tensor_map import TensorMap
from open_lm.model.adapters import adapters, add_adapters, merged_weight
from open_lm.model.losses import TokenLoss

peft = pytest.importorskip("peft", reason="needs pip install -e '.[finetune]'")


def adapted(model: nn.Module, text: str) -> Any:
    """Add adapters that compute something."""
    add_adapters(model, parse_lora(text), seed=3)
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapters(model):
        layer.adapter.lora_B.data.normal_(0, 0.1, generator=generator)
        if layer.adapter.settings.dora:
            layer.adapter.lora_magnitude.data.mul_(1.2)
    return model


def save(model: Any, config: dict[str, Any] | None, folder: Path) -> None:
    """Write a native model's adapters for its transformers form."""
    state = {name: value for name, value in model.state_dict().items() if ".adapter." in name}
    settings = next(adapters(model))[1].adapter.settings
    modules = exported_modules(state, settings, TensorMap(model.params, config))
    write_peft_folder(str(folder), modules, AdapterRecord(settings, "base", "0" * 64), "0" * 64)


@pytest.mark.parametrize(
    ("case", "positions", "text"),
    [
        ("llama_2", "rotary", "r=3,alpha=5,targets=all-linear"),
        ("tinyllama", "llama_rotary", "r=3,alpha=5,targets=all-linear,dora=true"),
        ("gemma_2", "rotary", "r=2,targets=all-linear,rslora=true"),
        ("olmoe", "rotary", "r=2,targets=all-linear"),
        ("llama_biases", "rotary", "r=2,targets=attention,dora=true,rslora=true"),
    ],
)
def test_peft_computes_the_same_on_a_family(case: str, positions: str, text: str, tmp_path: Path) -> None:
    hf = hf_model(case)
    model = adapted(native_model(hf) if positions == "rotary" else reordered(hf), text)
    save(model, hf.config.to_dict(), tmp_path)
    ids = random_ids(2, 11)
    before = hf(ids).logits
    loaded = peft.PeftModel.from_pretrained(hf, str(tmp_path)).eval()
    torch.testing.assert_close(model.eval()(ids)[0], loaded(ids).logits, rtol=1e-4, atol=1e-5)
    assert (loaded(ids).logits - before).abs().max() > 0.01
    merged = loaded.merge_and_unload().state_dict()
    for module, adapter in read_peft_folder(str(tmp_path))[0].items():
        weight = hf_model(case).get_parameter(f"{module}.weight")
        expected = merged[f"{module}.weight"]
        torch.testing.assert_close(merged_weight(weight, adapter.tensors, adapter.settings), expected, msg=module)


def reordered(hf: Any) -> Any:
    """Return the native model whose queries and keys are in the order of llama_rotary."""
    params = native_params(hf.config, positional_embedding_type="llama_rotary")
    tensor_map = TensorMap(params, hf.config.to_dict())
    weights = hf.state_dict()
    from open_lm.model.transformer import Transformer

    model = Transformer(params)
    state = {}
    for name in tensor_map.shapes:
        rows = [tensor_map.to_native(name, part, weights[str(part.source)]) for part in tensor_map.parts(name)]
        state[name] = torch.cat(rows)
    model.load_state_dict(state | {alias: state[name] for alias, name in tensor_map.aliases.items()}, strict=False)
    return model


@pytest.mark.parametrize("text", ["r=3,alpha=5,targets=all-linear", "r=2,targets=all-linear,dora=true,rslora=true"])
def test_one_step_equals_that_of_peft(text: str, tmp_path: Path) -> None:
    hf, ids = hf_model("tinyllama"), random_ids(4, 11)
    model = adapted(native_model(hf), text)
    save(model, hf.config.to_dict(), tmp_path / "before")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "before"), is_trainable=True).train()
    for trained, loss in (
        (model, lambda: model(ids[:, :-1], loss=TokenLoss(ids[:, 1:]))[0] / ids[:, 1:].numel()),
        (theirs, lambda: theirs(ids, labels=ids).loss),
    ):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0)
        loss().backward()
        optimizer.step()
    save(model, hf.config.to_dict(), tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    (ours, sha256), (saved, _) = (read_peft_folder(str(tmp_path / name)) for name in ("ours", "theirs"))
    before = read_peft_folder(str(tmp_path / "before"))[0]
    assert ours.keys() == saved.keys() and sha256 == "0" * 64
    for module, adapter in ours.items():
        for name, tensor in adapter.tensors.items():
            torch.testing.assert_close(tensor, saved[module].tensors[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(tensor, before[module].tensors[name]), f"{module}.{name} was not trained"


def test_files_that_are_not_lora_are_refused(tmp_path: Path) -> None:
    save(adapted(native_model(hf_model("llama_2")), "r=2"), hf_model("llama_2").config.to_dict(), tmp_path / "good")
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
        ({"bias": "all"}, "bias is all, expected none"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"alpha_pattern": {"(": 2}}, "adapter_config.json: expected alpha_pattern to map regular expressions"),
        ({"use_dora": True}, r"has no lora_magnitude_vector; save the adapters again"),
    ):
        folder = shutil.copytree(tmp_path / "good", tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            read_peft_folder(str(folder))
    weights = tmp_path / "good/adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "lora_B" in key}, weights)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: model\..* has no lora_A.weight"):
        read_peft_folder(str(tmp_path / "good"))
    weights.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_peft_folder(str(tmp_path / "good"))
