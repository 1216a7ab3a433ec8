"""Functions that test_layouts.py runs on several ranks; their results can be serialized as JSON."""

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
from open_lm.parallel.parallelize import evaluation_mode, gradient_sync, parallelize, unwrap

SMALL = {"dim": 76, "n_layers": 2, "n_heads": 12, "vocab_size": 31, "seq_len": 12, "apply_qk_norm": True}
# The collective of FSDP2; older versions of torch have the second name only.
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
LARGE = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 4096, "seq_len": 16}


def new_model(
    runtime: Runtime, cfg: ParallelConfig, shape: dict[str, Any], model_cfg: ModelConfig | None = None
) -> Any:
    """Return a new initialised model in this layout."""
    with torch.device("meta"):
        model = Transformer(Params(**shape))
    layout = build_layout(runtime, cfg)
    options = {"device": runtime.device, "model_cfg": model_cfg}
    return parallelize(model, layout, cfg, initialise=lambda sharded: init_weights(sharded, seed=5), **options)


def initialise(settings: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Return the sums of a new model's weights by name, its local bytes and the largest growth of a rank's memory."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model: nn.Module = new_model(runtime, cfg, shape)
    growth = torch.tensor((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    if dist.is_initialized():
        dist.all_reduce(growth, dist.ReduceOp.MAX)
    parts = sharded_tensor.fused_weight_parts(model)
    sums = {}
    for name, parameter in model.named_parameters():
        full = sharded_tensor.full_tensor(parameter, parts.get(name, 1)).double().flatten()
        sums[name] = [full.sum().item(), (full * torch.arange(len(full))).sum().item()]
    local_bytes = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in model.parameters())
    shutdown(runtime)
    return {"sums": sums, "growth_bytes": growth.item(), "local_bytes": local_bytes}


def logits(settings: dict[str, Any]) -> dict[str, Any]:
    """Return logits in evaluation mode for every kind of call of the model."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    model = new_model(runtime, cfg, SMALL)
    ids = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(1))
    padding = torch.ones(3, 7, dtype=torch.int64)
    padding[1, :4] = 0
    documents = torch.tensor([0, 0, 1, 1, 1, 2, 2]).expand(3, 7)
    embeddings = torch.randn(3, 7, 76, generator=torch.Generator().manual_seed(2))
    with evaluation_mode(model):
        results: dict[str, Tensor] = {
            "causal": model(ids)[0],
            "padded": model(ids, attention_mask=padding)[0][:, 4:],
            "documents": model(ids, document_ids=documents)[0],
            "embeddings": model(inputs_embeds=embeddings)[0],
            "hidden": model(ids)[1],
            "losses": model(ids, loss=TokenLoss(ids, 1e-3, per_token=True))[0],
        }
        _, _, cache = model(ids[:, :4], use_cache=True)
        results["cached"] = torch.cat([model(ids[:, 4:6], past_key_values=cache, use_cache=True)[0]], dim=1)
    shutdown(runtime)
    return {name: value.tolist() for name, value in results.items()}


def compiled(settings: dict[str, Any], checkpointing: str, **shape: Any) -> dict[str, Any]:
    """Return loss and gradient norm with eager and with compiled blocks, and the number of compiled graphs.

    The backend traces and partitions graphs like the default one but generates no code, which would be slow.
    """
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(1))
    results: dict[str, Any] = {}
    for mode in ("eager", "compiled"):
        torch._dynamo.reset()
        counters.clear()
        model_cfg = ModelConfig(torchcompile=mode == "compiled", activation_checkpointing=checkpointing)
        with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
            model = new_model(runtime, cfg, {**SMALL, "n_layers": 4, **shape}, model_cfg)
        loss = model(ids, loss=TokenLoss(ids))[0] + (unwrap(model).auxiliary_loss() or 0.0)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        results[mode] = [loss.item(), getattr(norm, "full_tensor", lambda n=norm: n)().item()]
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    shutdown(runtime)
    return {**results, "graphs": graphs, "graph_breaks": breaks}


def reductions(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the collectives of two backward passes, the first of which is not the last one of a step, and the share of
    the gradients of all parameters that this rank has as shards after each.
    """
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    model = new_model(runtime, cfg, {**SMALL, "dim": 48, "vocab_size": 32})
    parameters = list(model.parameters())
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(runtime.rank))
    passes = []
    for is_last in (False, True):
        with (
            gradient_sync(model, is_last, cfg.reduces_every_micro_batch),
            mock.patch.object(dist, SCATTER, wraps=getattr(dist, SCATTER)) as reduce_scatter,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        ):
            model(ids, loss=TokenLoss(ids))[0].backward()
        held = sum(sharded_tensor.local_tensor(p.grad).numel() for p in parameters if p.grad is not None)
        share = held / sum(p.numel() for p in parameters)
        passes.append([reduce_scatter.call_count, all_reduce.call_count, share])
    shutdown(runtime)
    return {"passes": passes}
