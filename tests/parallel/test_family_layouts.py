"""Models of all families train in FSDP, tensor and context parallel layouts as in a single process."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import family_worker
import pytest
import torch
from family_models import CASES, TINY
from parity import on_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from open_lm.checkpoint import read_model_state
from open_lm.hf.families import architecture
from open_lm.hf.importing import import_model
from open_lm.parallel.tensor_parallel import local_key_heads

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp": True},
    "tensor": {"tensor_parallel": 2},
    "context": {"context_parallel": 2},
}
# Cases that are equivalent to others.
EQUIVALENT = ("open_llama", "mistral_0.3", "llama_biases", "gemma_2_27b", "phi_qk_norm", "qwen_2_window")
EQUIVALENT += ("llama_yarn", "qwen_3_yarn", "olmo_3_yarn")
MUP = {"mup": True, "mup_base_width": 8, "mup_base_head_dim": 4}
# Further keys of the model of a case: combinations that no family has.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_2": {"vocab_size": 64, "unpadded_vocab_size": 61, "logit_soft_cap": 4.0, "head_bias": True},
    "olmo_2": {"n_kv_heads": 1, "norm_position": "both"},
    "gemma_7b": {"apply_qk_norm": True, **MUP},
    "tinyllama": MUP,
    "mixtral": MUP,
    "phi_2": MUP,
}


def model_keys(case: str, layout: str) -> dict[str, Any]:
    """Return the arguments of Params of a case, without those that give other results on several ranks."""
    model_type, fields = CASES[case]
    keys = architecture(AutoConfig.for_model(model_type, **{**TINY, **fields}).to_dict())
    renamed = {"dim": keys.pop("hidden_dim"), "apply_qk_norm": keys.pop("qk_norm", False)}
    patterns = {name: [True, False] for name in ("attn_window_pattern", "rope_pattern") if name in keys}
    keys = {**keys, **renamed, **patterns, "n_layers": 2, **VARIANTS.get(case, {})}
    if "moe_freq" in keys and layout != "tensor":
        keys["moe_loss_weight"] = 0.0  # the loss of each rank's tokens
    return keys


@pytest.mark.processes
def test_every_family_trains_like_a_single_process_in_every_layout() -> None:
    chosen = [case for case in CASES if case not in EQUIVALENT]
    names = list(product(chosen, LAYOUTS))
    # Every second model is trained on packed documents.
    cases = [(model_keys(case, layout), LAYOUTS[layout], chosen.index(case) % 2 == 0) for case, layout in names]
    results = on_ranks(2, [(family_worker.train, *case) for case in cases])
    single: dict[str, Any] = {}
    failures = {}
    for name, (keys, _, documents), numbers in zip(names, cases, results, strict=True):
        model = json.dumps([keys, documents], sort_keys=True)
        if model not in single:
            single[model] = family_worker.train(keys, {}, documents)
        pairs = [pair for rows in zip(numbers, single[model], strict=False) for pair in zip(*rows, strict=True)]
        difference = max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)
        if not difference < 1e-5:
            failures[name] = difference
    assert not failures


def test_key_heads_of_a_rank() -> None:
    assert [local_key_heads(8, 1, 4, rank) for rank in range(2)] == [[0], [0]]
    assert [local_key_heads(8, 2, 4, rank) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [local_key_heads(12, 3, 2, rank) for rank in range(2)] == [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]
    assert [local_key_heads(24, 4, 3, rank) for rank in range(3)] == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [1, 2],
        [2, 2, 3, 3, 3, 3, 3, 3],
    ]


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the bytes that a process reads are counted by Linux")
def test_each_rank_reads_its_part_of_imported_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 8192}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **sizes}))
    hf.save_pretrained(tmp_path / "hf")
    import_model(str(tmp_path / "hf"), str(tmp_path / "own"))
    arguments = (str(tmp_path / "own" / "model.json"), str(tmp_path / "own" / "step_00000000"))
    layouts: list[dict[str, Any]] = [{"fsdp": True}, {"tensor_parallel": 2}]
    results = on_ranks(2, [(family_worker.read_pretrained, *arguments, settings) for settings in layouts])
    total = sum(parameter.numel() * 4 for parameter in hf.parameters())
    for result in results:
        assert max(result["bytes"]) < 0.53 * total, [count / total for count in result["bytes"]]
        assert sum(result["bytes"]) > total
    assert results[0]["moments"] == pytest.approx(results[1]["moments"], rel=1e-9)
    state = read_model_state(tmp_path / "own" / "epoch_0.pt")[0]
    for name, moment in results[0]["moments"].items():
        values = state[name].double().flatten()
        expected = (values * torch.linspace(0, 1, len(values), dtype=torch.float64)).sum().item()
        assert moment == pytest.approx(expected, rel=1e-9), name
