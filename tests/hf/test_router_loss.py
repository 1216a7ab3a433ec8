"""The router loss of transformers models with experts in training: transformers' own, in every layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_experts_worker import SEQ_LEN, VOCAB, batch, step
from model_helpers import random_ids, small_model

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.hf import OpenLMForCausalLM
from open_lm.hf.trainable import create_hf_model
from open_lm.model.losses import TokenLoss, batch_loss
from open_lm.training.step import StepOptions

SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
# Class -> settings of its configuration. The names of the coefficient and of the number of experts differ.
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.5},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "head_dim": 8},
    "JetMoe": {"num_local_experts": 4, "aux_loss_coef": 0.5, "kv_channels": 8},
}


@dataclass
class ModelSettings:
    hf_model: str
    hf_seq_len: int | None = SEQ_LEN
    model: str = ""


def save_model(folder: Path, name: str = "Mixtral", **changes: Any) -> Any:
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**SIZES, **{**MODELS.get(name, {}), **changes}))
    model.save_pretrained(folder)
    return model.train()


def reference(model: Any, slices: int = 1) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return cross entropy, weighted router loss and gradients of transformers' own loss.

    With slices, the batch is split: the router loss is the mean over slices, the cross entropy is over all tokens.
    """
    inputs, targets = batch()
    num_valid = (targets != IGNORE_INDEX).sum()
    totals = torch.zeros(2)
    model.zero_grad()
    for ids, labels in zip(inputs.chunk(slices), targets.chunk(slices), strict=True):
        # shift_labels are the targets of the same positions; the loss is summed and divided by num_items_in_batch.
        arguments = {"labels": labels, "shift_labels": labels, "num_items_in_batch": num_valid}
        plain = model(ids, **arguments).loss
        router_loss = model(ids, **arguments, output_router_logits=True).loss - plain
        (plain + router_loss / slices).backward()
        totals += torch.stack((plain.detach(), router_loss.detach() / slices))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return totals[0].item(), totals[1].item(), gradients


def assert_equal_steps(
    found: tuple[dict[str, float], dict[str, torch.Tensor]], expected: tuple[float, float, dict[str, torch.Tensor]]
) -> None:
    values, gradients = found
    loss, router_loss, expected_gradients = expected
    assert router_loss > 0.1
    assert values["loss"] == pytest.approx(loss, abs=1e-6)
    assert values["load_balancing_loss"] == pytest.approx(router_loss, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_training_adds_the_router_loss_of_transformers(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path, name)
    assert_equal_steps(step(str(tmp_path)), reference(model))


def test_router_loss_is_the_mean_over_micro_batches_and_survives_recomputation(tmp_path: Path) -> None:
    expected = reference(save_model(tmp_path), slices=4)
    assert_equal_steps(step(str(tmp_path), accum_freq=4), expected)
    assert_equal_steps(step(str(tmp_path), accum_freq=4, checkpointing=True), expected)


def test_router_loss_is_the_mean_over_ranks(tmp_path: Path, ranks: Any) -> None:
    model = save_model(tmp_path / "model")
    slices = {1: 2, 2: 4}  # with two ranks, accumulation over 1 and 2 micro-batches
    jobs = [{"fsdp": fsdp, "accum_freq": accum} for fsdp in (True, False) for accum in slices]
    ranks(2, "hf_experts_worker", str(tmp_path / "model"), "out.pt", *map(json.dumps, jobs))
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for job in jobs:
        found = results[json.dumps(job, sort_keys=True)]
        assert_equal_steps(found, reference(model, slices[job["accum_freq"]]))


def test_validation_reports_the_plain_cross_entropy(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    trainable = create_hf_model(ModelSettings(str(tmp_path))).eval()
    inputs, targets = batch()
    options = StepOptions(Runtime(), MeshLayout(), get_autocast("fp32"))
    with torch.no_grad():
        loss = batch_loss(trainable, inputs, TokenLoss(targets), options)
    assert trainable.auxiliary_loss() is None
    assert (loss / (targets != IGNORE_INDEX).sum()).item() == pytest.approx(reference(model)[0], abs=1e-6)


def test_coefficient_0_and_models_without_experts_have_no_router_loss(tmp_path: Path) -> None:
    save_model(tmp_path / "zero", router_aux_loss_coef=0.0)
    save_model(tmp_path / "dense", "Qwen3Moe", mlp_only_layers=[0, 1])
    for folder in ("zero", "dense"):
        values, _ = step(str(tmp_path / folder))
        assert set(values) == {"loss"}


def test_experts_whose_router_loss_cannot_be_computed_are_refused_for_training(tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    heads = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    more = {"qk_nope_head_dim": 4, "moe_intermediate_size": 16, "n_shared_experts": 1}
    config = transformers.DeepseekV3Config(**{**SIZES, **sizes, **heads, **more})
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    create_hf_model(ModelSettings(str(tmp_path)))  # evaluation needs no router loss
    with pytest.raises(ConfigError, match=r"--hf-model .*DeepseekV3ForCausalLM has experts.*router_aux_loss_coef"):
        create_hf_model(ModelSettings(str(tmp_path)), for_training=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "router_aux_loss_coef": 0}))
    assert set(step(str(tmp_path))[0]) == {"loss"}


def test_an_exported_open_lm_model_with_experts_keeps_its_balancing_loss(tmp_path: Path) -> None:
    native = small_model(moe_freq=1, moe_num_experts=4, moe_loss_weight=0.5)
    OpenLMForCausalLM.from_open_lm(native).save_pretrained(tmp_path)
    trainable = create_hf_model(ModelSettings(str(tmp_path)), for_training=True).train()
    ids = random_ids(2, SEQ_LEN)
    for model in (native.train(), trainable):
        model(ids)
    assert torch.equal(trainable.auxiliary_loss(), native.auxiliary_loss())
    assert native.auxiliary_loss() > 0.1
