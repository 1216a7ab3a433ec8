"""What only a CUDA device can show: kernels, half precision, NCCL."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_helpers import random_ids, small_model

from open_lm.attention import get_attn_func, torch_attn, xformers_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="needs xformers")


@needs_xformers
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (1, 37), (16, 53)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_attention_equals_torch_s(queries: int, keys: int, padded: bool, dtype: torch.dtype) -> None:
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
    seen = slice(None) if mask is None else mask[:, -queries:]
    torch.testing.assert_close(found[seen], expected[seen], atol=tolerance, rtol=tolerance)


@needs_xformers
def test_auto_attention_trains_through_xformers() -> None:
    assert get_attn_func("auto").__name__ == "auto_attn"
    ids = random_ids(2, 32).cuda()
    gradients = []
    for name in ("auto", "torch_attn"):
        model = small_model(attn_name=name).cuda()
        model(ids)[0].square().mean().backward()
        gradients.append(model.tok_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("flags", [[], ["--fsdp", "--fsdp-amp"], ["--fsdp", "--fsdp-cpu-offload"], ["--torchcompile"]])
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
