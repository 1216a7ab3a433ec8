"""What ranks do in test_layouts.py; results are what JSON can hold."""

from __future__ import annotations

import resource
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed import sharded_tensor
from open_lm.distributed.processes import Runtime, build_layout, init_runtime, shutdown
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss
from open_lm.model.transformer import Params, Transformer
from open_lm.parallel.parallelize import parallelize, evaluation_mode

SMALL = {"dim": 76, "n_layers": 2, "n_heads": 12, "vocab_size": 31, "seq_len": 12, "apply_qk_norm": True}
LARGE = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 4096, "seq_len": 16}


def spread(runtime: Runtime, cfg: ParallelConfig, shape: dict[str, Any], model_cfg: ModelConfig | None = None) -> Any:
    """A new model in this layout."""
    with torch.device("meta"):
        model = Transformer(Params(**shape))
    layout = build_layout(runtime, cfg)
    options = {"device": runtime.device, "model_cfg": model_cfg}
    return parallelize(model, layout, cfg, initialise=lambda made: init_weights(made, seed=5), **options)


def start(settings: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """A new model's weights, as sums by name, and how many bytes the largest rank's memory grew at the most."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model: nn.Module = spread(runtime, cfg, shape)
    growth = torch.tensor((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    if dist.is_initialized():
        dist.all_reduce(growth, dist.ReduceOp.MAX)
    parts = sharded_tensor.fused_weight_parts(model)
    sums = {}
    for name, parameter in model.named_parameters():
        full_tensor = sharded_tensor.full_tensor(parameter, parts.get(name, 1)).double().flatten()
        sums[name] = [full_tensor.sum().item(), (full_tensor * torch.arange(len(full_tensor))).sum().item()]
    held = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in model.parameters())
    shutdown(runtime)
    return {"sums": sums, "growth_bytes": growth.item(), "held_bytes": held}


def logits(settings: dict[str, Any]) -> dict[str, Any]:
    """Logits of an evaluation in the ways in which a model is called."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    model = spread(runtime, cfg, SMALL)
    ids = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    padding = torch.ones(3, 7, dtype=torch.int64)
    padding[1, :4] = 0
    documents = torch.tensor([0, 0, 1, 1, 1, 2, 2]).expand(3, 7)
    embeddings = torch.randn(3, 7, 76, generator=torch.Generator().manual_seed(2))
    with evaluation_mode(model):
        found: dict[str, Tensor] = {
            "whole": model(ids)[0],
            "padded": model(ids, attention_mask=padding)[0][:, 4:],
            "documents": model(ids, document_ids=documents)[0],
            "embeddings": model(inputs_embeds=embeddings)[0],
            "hidden": model(ids)[1],
            "losses": model(ids, loss=TokenLoss(ids, 1e-3, per_token=True))[0],
        }
        _, _, cache = model(ids[:, :4], use_cache=True)
        found["cached"] = torch.cat([model(ids[:, 4:6], past_key_values=cache, use_cache=True)[0]], dim=1)
    shutdown(runtime)
    return {name: value.tolist() for name, value in found.items()}


def compiled(settings: dict[str, Any], checkpointing: str) -> dict[str, Any]:
    """Loss and the gradients' norm with compiled blocks and without, and how often a block was compiled, by a backend
    that traces and divides as the usual one does and makes no machine code, which takes long."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    numbers = []
    for compile_blocks in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model_cfg = ModelConfig(torchcompile=compile_blocks, activation_checkpointing=checkpointing)
        with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
            model = spread(runtime, cfg, {**SMALL, "n_layers": 4}, model_cfg)
        loss = model(ids, loss=TokenLoss(ids))[0]
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        numbers.append([loss.item(), getattr(norm, "full_tensor", lambda n=norm: n)().item()])
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    shutdown(runtime)
    return {"numbers": numbers, "graphs": graphs, "graph_breaks": breaks}
