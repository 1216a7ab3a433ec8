"""Functions that test_expert_parallel.py runs on several ranks; their results can be serialized as JSON."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, build_layout, init_runtime, shutdown
from open_lm.distributed.sharded_tensor import full_tensor, local_tensor
from open_lm.errors import ConfigError
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.build import build_optimizer
from open_lm.parallel.parallelize import evaluation_mode, parallelize
from open_lm.training.step import StepOptions, train_step

EXPERTS = {"moe_freq": 1, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.1}
# 24 is divisible by 2 and 4 ranks, 31 is not.
SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 31, "seq_len": 8, "moe_ffn_type": "swiglu", **EXPERTS}
ROWS, STEPS = 8, 3


def new_model(
    runtime: Runtime, settings: dict[str, Any], model_cfg: ModelConfig | None = None, **shape: Any
) -> tuple[Any, Any]:
    """Return a new initialized model in the layout of `settings`, and the layout."""
    cfg = ParallelConfig(**settings)
    with torch.device("meta"):
        model = Transformer(Params(**{**SHAPE, **shape}))
    layout = build_layout(runtime, cfg)
    options = {"device": runtime.device, "model_cfg": model_cfg}
    return parallelize(model, layout, cfg, initialise=lambda sharded: init_weights(sharded, seed=5), **options), layout


def train(settings: dict[str, Any], shape: dict[str, Any] | None = None, **optim: Any) -> dict[str, Any]:
    """Train a few steps with dropped tokens and the balancing loss on each rank's own sequences.

    Return the loss and gradient norm of each step, and the sums of all weights by name.
    """
    runtime = init_runtime(ParallelConfig(**settings))
    model, layout = new_model(runtime, settings, **{"moe_capacity_factor": 1.0, **(shape or {})})
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, wd=0.1, **optim))
    options = StepOptions(runtime, layout, get_autocast("fp32"), grad_clip_norm=0.5)
    rows = ROWS // layout.data_size
    local = slice(layout.data_rank * rows, (layout.data_rank + 1) * rows)
    steps = []
    for step in range(STEPS):
        tokens = torch.randint(0, 31, (ROWS, 9), generator=torch.Generator().manual_seed(step))
        result = train_step(model, tokens[local, :-1].contiguous(), tokens[local, 1:].contiguous(), optimizer, options)
        steps.append([result.values["loss"].item(), result.grad_norm.item()])
    sums = {name: full_tensor(value).double().square().sum().item() for name, value in model.named_parameters()}
    local_values = {name: local_tensor(value).numel() for name, value in model.named_parameters() if "mlp" in name}
    shutdown(runtime)
    return {"steps": steps, "sums": sums, "local_values": local_values}


def uneven_evaluation() -> list[float]:
    """Return the sum of squared logits of rank r's r + 1 sequences, on each of the ranks, with expert parallelism.

    All tokens choose the same two experts, so that some ranks receive no token.
    """
    settings = {"fsdp": True, "expert_parallel": 4}
    runtime = init_runtime(ParallelConfig(**settings))
    model, _ = new_model(runtime, settings)
    sums = torch.zeros(runtime.world_size, dtype=torch.float64)
    with torch.no_grad():
        for block in model.layers:
            local_tensor(block.feed_forward.router.layer.weight).zero_()  # top-k chooses experts 0 and 1 of equals
    with evaluation_mode(model):
        sums[runtime.rank] = model(sequences(runtime.rank + 1))[0].double().square().sum()
    dist.all_reduce(sums)
    shutdown(runtime)
    return sums.tolist()


def sequences(count: int) -> torch.Tensor:
    return torch.randint(0, 31, (count, 8), generator=torch.Generator().manual_seed(count))


def unbounded_gradients(settings: dict[str, Any]) -> dict[str, float]:
    """Return the norm of each gradient of one pass without capacity, in which rank 3 receives no token."""
    runtime = init_runtime(ParallelConfig(**settings))
    model, layout = new_model(runtime, settings, moe_capacity_factor=0.0, moe_loss_weight=0.0)
    with torch.no_grad():
        for block in model.layers:
            local_tensor(block.feed_forward.router.layer.weight).zero_()
    ids = sequences(4)
    rows = 4 // layout.data_size
    local = ids[layout.data_rank * rows : (layout.data_rank + 1) * rows]
    model(local, loss=TokenLoss(local))[0].mul(layout.gradient_ranks).backward()
    norms = {name: full_tensor(value.grad).norm().item() for name, value in model.named_parameters()}
    shutdown(runtime)
    return norms


def train_nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `train` with the groups of FSDP2 that older versions of torch need."""
    with mock.patch("open_lm.parallel.parallelize.SHARDS_OVER_SEVERAL_MESHES", False):
        return train(settings)


def compiled(policy: str, nested: bool = False) -> dict[str, Any]:
    """Return loss and gradient norm with eager and with compiled blocks, the number of compiled graphs, and that of
    exchanges in the forward and backward pass of two compiled blocks; or the error of a layout that is not supported.
    """
    settings = {"fsdp": True, "expert_parallel": 2}
    runtime = init_runtime(ParallelConfig(**settings))
    results: dict[str, Any] = {}
    for mode in ("eager", "compiled"):
        torch._dynamo.reset()
        counters.clear()
        config = ModelConfig(torchcompile=mode == "compiled", activation_checkpointing=policy)
        with (
            mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")),
            mock.patch("open_lm.parallel.parallelize.SHARDS_OVER_SEVERAL_MESHES", not nested),
        ):
            try:
                model, _ = new_model(runtime, settings, config)
            except ConfigError as error:
                shutdown(runtime)
                return {"error": str(error)}
        model(sequences(2), loss=TokenLoss(sequences(2)))[0].backward()  # compiles
        model.zero_grad()
        with _Exchanges() as counter:
            counter.phase = "forward"
            loss = model(sequences(2), loss=TokenLoss(sequences(2)))[0] + model.auxiliary_loss()
            counter.phase = "backward"
            loss.backward()
        norm = nn.utils.get_total_norm([full_tensor(p.grad) for p in model.parameters()])
        results[mode] = [loss.item(), norm.item()]
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    shutdown(runtime)
    return {**results, "graphs": graphs, "graph_breaks": breaks, "exchanges": dict(counter.counts)}


class _Exchanges(TorchDispatchMode):
    """Count the exchanges of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in func.name():
            self.counts[self.phase] += 1
        return func(*args, **(kwargs or {}))


def exchanges(policy: str) -> dict[str, int]:
    """Return the number of exchanges in the forward and backward pass of two blocks with activation checkpointing."""
    settings = {"fsdp": True, "expert_parallel": 2}
    runtime = init_runtime(ParallelConfig(**settings))
    model, _ = new_model(runtime, settings, ModelConfig(activation_checkpointing=policy))
    with _Exchanges() as counter:
        counter.phase = "forward"
        loss = model(sequences(2), loss=TokenLoss(sequences(2)))[0]
        counter.phase = "backward"
        loss.backward()
    shutdown(runtime)
    return dict(counter.counts)


def indivisible() -> str:
    """Return the error of more ranks than the experts can be divided over."""
    settings = {"fsdp": True, "expert_parallel": 4}
    runtime = init_runtime(ParallelConfig(**settings))
    try:
        new_model(runtime, settings, moe_num_experts=6)
    except ConfigError as error:
        return str(error)
    finally:
        shutdown(runtime)
    return ""
