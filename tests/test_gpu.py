"""Tests that need a CUDA device: kernels, half precision, NCCL."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import random_ids, small_model
from torch import Tensor
from torch._dynamo.utils import counters

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig, ValidationConfig
from open_lm.data.masking import document_ids
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.evaluate.validation import EvaluationOptions, token_losses
from open_lm.generate.sampling import Sampling, generate_ids
from open_lm.kernels import document_attention
from open_lm.kernels.document_attention import (
    DocumentMask,
    dense_document_mask,
    document_positions,
    is_document_start,
    supports_flex_attention,
)
from open_lm.model.attention import (
    backend_problem,
    create_document_mask,
    get_attn_func,
    has_xformers,
    torch_attn,
    xformers_attn,
)
from open_lm.model.losses import TokenLoss
from open_lm.optim.adamw import AdamW
from open_lm.optim.build import gradient_norm, step_unless_skipped
from open_lm.parallel.parallelize import evaluation_mode, parallelize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_xformers = pytest.mark.skipif(not has_xformers(), reason="needs xformers with loadable kernels")


@needs_xformers
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 37), (16, 53)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_attention_equals_torch(queries: int, keys: int, padded: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(3, queries, 4, 32, device="cuda", dtype=dtype, generator=generator)
    k, v = (torch.randn(3, keys, 4, 32, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    mask = None
    if padded:
        mask = torch.ones(3, keys, dtype=torch.bool, device="cuda")
        mask[0, : keys // 3] = False
    found = xformers_attn(q, k, v, is_causal=True, attention_mask=mask)
    expected = torch_attn(q, k, v, is_causal=True, attention_mask=mask)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    unpadded = slice(None) if mask is None else mask[:, -queries:]
    torch.testing.assert_close(found[unpadded], expected[unpadded], atol=tolerance, rtol=tolerance)


@needs_xformers
def test_auto_attention_uses_xformers() -> None:
    assert get_attn_func("auto").__name__ == "auto_attn"
    ids = random_ids(2, 32).cuda()
    gradients = []
    for name in ("auto", "torch_attn"):
        model = small_model(attn_name=name).cuda()
        model(ids)[0].square().mean().backward()
        gradients.append(model.tok_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


@needs_xformers
def test_compiled_blocks_are_one_graph_with_xformers() -> None:
    model, ids = small_model(attn_name="auto").cuda(), random_ids(2, 32).cuda()
    expected = model(ids)[0]
    counters.clear()
    for block in model.layers:
        block.compile(fullgraph=True)
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-3, rtol=1e-3)
    assert not counters["graph_break"]


# --------------------------------------------------------------------------------------------------- documents
def packed_ids(rows: int, length: int, probability: float = 0.01, seed: int = 3) -> Tensor:
    """Return (rows, length) ids on the device; the id 0 ends a document."""
    ids = random_ids(rows, length, seed=seed).clamp(min=1)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < probability] = 0
    return ids.cuda()


def with_gradients(attn: Any, qkv: Tensor, documents: DocumentMask) -> list[Tensor]:
    """Return the result and the gradient of qkv (3,B,T,H,K)."""
    qkv = qkv.detach().requires_grad_()
    out = attn(*qkv, is_causal=True, attention_mask=documents)
    (gradient,) = torch.autograd.grad(out.float().sin().sum(), qkv)
    return [out.detach(), gradient]


@pytest.mark.parametrize("name", ["flex", pytest.param("xformers", marks=needs_xformers)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 64, 80])
@pytest.mark.parametrize(("length", "probability"), [(256, 0.0), (300, 0.02), (1024, 0.005), (256, 1.0)])
def test_document_kernels_equal_the_dense_mask(
    length: int, probability: float, width: int, dtype: torch.dtype, name: str
) -> None:
    attn = torch_attn if name == "flex" else xformers_attn
    document_index = document_ids(packed_ids(2, length, probability), 0)
    documents = create_document_mask(document_index, attn)
    if name == "flex":
        assert supports_flex_attention(document_index.device) and documents.block_mask is not None
    is_start = is_document_start(document_index)
    dense_mask = DocumentMask(document_positions(is_start), dense=dense_document_mask(is_start))
    qkv = torch.randn(3, 2, length, 2, width, generator=torch.Generator().manual_seed(1)).cuda()
    expected = with_gradients(torch_attn, qkv, dense_mask)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for found, exact in zip(with_gradients(attn, qkv.to(dtype), documents), expected, strict=True):
        torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["torch_attn", "auto"])
def test_packed_sequences_equal_the_cpu(name: str, compiled: bool) -> None:
    """Training with activation checkpointing equals the CPU, and other documents cause no recompilation."""
    model = small_model(seq_len=300, apply_qk_norm=True, weight_tying=True, attn_name=name).train()
    reference = copy.deepcopy(model)
    model.cuda().set_grad_checkpointing()
    if compiled:
        for block in model.layers:
            block.compile()
    for number, seed in enumerate((3, 4, 5)):
        ids = packed_ids(2, 300, seed=seed)
        before = counters["stats"]["unique_graphs"]
        logits = model(ids, document_ids=document_ids(ids, 0))[0]
        gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()))
        assert number == 0 or counters["stats"]["unique_graphs"] == before
        expected_logits = reference(ids.cpu(), document_ids=document_ids(ids.cpu(), 0))[0]
        torch.testing.assert_close(logits.cpu(), expected_logits, atol=1e-3, rtol=1e-3)
        expected = torch.autograd.grad(expected_logits.sin().sum(), list(reference.parameters()))
        for found, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found.cpu(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("policy", ["op", "full"])
def test_recomputation_with_documents_repeats_attention_only_if_it_must(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = document_attention._compiled_flex_attention()
    monkeypatch.setattr(
        document_attention, "_compiled_flex_attention", lambda: lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    ids = packed_ids(2, 300)
    gradients = []
    for recomputes in (False, True):
        model = small_model(seq_len=300).cuda().train()
        if recomputes:
            model.set_grad_checkpointing(policy=policy)
        calls.clear()
        loss = model(ids, document_ids=document_ids(ids, 0))[0].sin().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(calls) == (2 if policy == "op" else 4)  # two layers
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- evaluation and generation
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"n_kv_heads": 2},
        {"n_kv_heads": 2, "attn_window": 150, "attn_window_pattern": [True, False]},
        {"n_kv_heads": 1, "attn_soft_cap": 2.0, "attn_scale": 0.2, "attn_window": 40},
        {"head_dim": 24, "logit_soft_cap": 3.0, "head_bias": True, "norm_position": "both"},
    ],
)
def test_keys_of_configurations_equal_the_cpu(keys: dict[str, Any], packed: bool, compiled: bool) -> None:
    host = small_model(seq_len=300, **keys).train()
    device = copy.deepcopy(host).cuda()
    if compiled:
        for block in device.layers:
            block.compile()
    ids = random_ids(2, 300)
    documents = document_ids(ids, 5) if packed else None
    results = []
    for model, where in ((host, "cpu"), (device, "cuda")):
        masks = {} if documents is None else {"document_ids": documents.to(where)}
        loss = model(ids.to(where), loss=TokenLoss(ids.to(where)), **masks)[0]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3 * expected.abs().max().item(), rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_equal_repeated_heads(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 256, 8, 64, device="cuda", dtype=dtype, generator=generator)
    k, v = torch.randn(2, 2, 256, 2, 64, device="cuda", dtype=dtype, generator=generator)
    expected = torch_attn(q, *(x.repeat_interleave(4, 2) for x in (k, v)), is_causal=True)
    torch.testing.assert_close(torch_attn(q, k, v, is_causal=True), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("end_of_text_id", [None, 0])
def test_token_losses_equal_the_cpu(end_of_text_id: int | None) -> None:
    model, ids = small_model(seq_len=300), packed_ids(2, 300)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    runtime, cfg = Runtime(device=torch.device("cuda")), ValidationConfig()
    single = EvaluationOptions(runtime, MeshLayout(), get_autocast("fp32"), cfg, "small", end_of_text_id=end_of_text_id)
    with torch.no_grad():
        expected = token_losses(model, inputs.cpu(), targets.cpu(), single)
        model.cuda()
        found = token_losses(model, inputs, targets, single)
        half = token_losses(model, inputs, targets, replace(single, autocast=get_autocast("amp_bf16", "cuda")))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(half.cpu(), expected, atol=0.1, rtol=0.1)


def test_greedy_generation_equals_the_cpu() -> None:
    """Prompts of different lengths cover padding, the KV cache, and one query for many keys."""
    model, sampling = small_model(), Sampling(max_new_tokens=20, temperature=0)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 7, 12)]
    expected = list(generate_ids(model, prompts, sampling))
    assert list(generate_ids(model.cuda(), prompts, sampling)) == expected


# ------------------------------------------------------------------------------------------------------- training
DOCUMENT_MASK = ["--document-mask", "--end-of-text-id", "10"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--fsdp", "--fsdp-amp"],
        ["--fsdp", "--fsdp-cpu-offload"],
        ["--torchcompile"],
        [*DOCUMENT_MASK, "--fsdp", "--grad-checkpointing"],
        [*DOCUMENT_MASK, "--torchcompile"],
    ],
)
def test_training_on_the_device_lowers_the_loss(
    flags: list[str], shared_dir: Path, tmp_path: Path, torchrun: Callable[..., object]
) -> None:
    run = shared_dir / "compat" / "run"
    torchrun(
        1,
        "open_lm.main",
        *("--model", str(run / "tiny_bytes.json"), "--dataset-manifest", str(run / "data" / "manifest.jsonl")),
        *("--data-key", "json.gz", "--train-num-samples", "32768", "--epochs", "2", "--global-batch-size", "8"),
        *("--precision", "amp_bfloat16", "--lr", "3e-3", "--warmup", "8", "--grad-clip-norm", "1"),
        *("--log-every-n-steps", "8", "--name", "run", "--force-distributed", *flags),
    )
    rows = [json.loads(line) for line in (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] > 5.5 and losses[-1] < 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_in_the_fused_step_equals_a_separate_pass(dtype: torch.dtype) -> None:
    results = []
    for in_step in (True, False):
        params = [torch.nn.Parameter(torch.ones(size, device="cuda", dtype=dtype)) for size in (1000, 7)]
        optimizer = AdamW(params, lr=0.1, fused=True)
        for number in range(3):
            for param in params:
                param.grad = torch.linspace(-1, 2 + number, len(param), device="cuda").to(dtype)
            norm = gradient_norm(params)
            if not in_step:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            step_unless_skipped(optimizer, ~norm.isfinite(), norm if in_step else None, 0.5)
        results.append(torch.cat(params).float())
    torch.testing.assert_close(*results, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-5)


def test_cuda_graphs_give_the_same_losses() -> None:
    results = []
    for mode in (None, "reduce-overhead"):
        cfg = ModelConfig() if mode is None else ModelConfig(torchcompile=True, torchcompile_mode=mode)
        model = small_model(seq_len=64)
        trained = parallelize(model, MeshLayout(), ParallelConfig(), device=torch.device("cuda"), model_cfg=cfg)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        losses = []
        for step in range(6):
            ids = random_ids(2, 64, seed=step).cuda()
            optimizer.zero_grad(set_to_none=True)
            loss = trained(ids, loss=TokenLoss(ids))[0] / ids.numel()
            loss.backward()
            optimizer.step()
            with evaluation_mode(trained):
                losses += [loss.item(), trained(ids, loss=TokenLoss(ids))[0].item() / ids.numel()]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------- named kernels
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "flash_attn_3"])
@pytest.mark.parametrize("length", [64, 300])
def test_sdpa_backends_equal_torch_attn(name: str, length: int) -> None:
    if backend_problem(name) is not None:
        pytest.skip(str(backend_problem(name)))
    attn = get_attn_func(name)
    qkv = torch.randn(3, 2, length, 4, 64, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for function, dtype in ((torch_attn, torch.float32), (attn, torch.bfloat16)):
        leaf = qkv.to(dtype).requires_grad_()
        out = function(*leaf, is_causal=True)
        results.append((out.float(), torch.autograd.grad(out.float().sin().sum(), leaf)[0].float()))
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("policy", ["full", "op"])
@pytest.mark.parametrize("name", ["torch_attn", "auto"])
def test_steps_do_not_wait_for_the_device(name: str, policy: str) -> None:
    """With and without documents, and with activation checkpointing."""
    model = small_model(seq_len=300, attn_name=name).cuda().train()
    model.set_grad_checkpointing(policy=policy)
    ids = packed_ids(2, 300)
    for sync in ("default", "error"):  # the first step may compile, load and wait
        torch.cuda.set_sync_debug_mode(sync)
        try:
            for documents in (None, document_ids(ids, 0)):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(ids, document_ids=documents)[0].square().mean()
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
