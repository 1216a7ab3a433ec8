"""Functions that test_async_tensor_parallel.py runs on several ranks; their results can be serialized as JSON."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import layout_worker
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V
from torch.distributed import _symmetric_memory
from torch.nn.utils import get_total_norm

from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import init_runtime, shutdown
from open_lm.errors import ConfigError
from open_lm.model.losses import TokenLoss

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 32, "seq_len": 16}
EXCHANGES = (
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "fused_all_gather_matmul",
    "fused_matmul_reduce_scatter",
)


def compiled_step(settings: dict[str, Any]) -> dict[str, Any]:
    """Return loss and gradient norm of compiled blocks, and the exchanges in the graphs of their passes.

    The graphs go through inductor's passes and are then interpreted: generating code would be slow. torch has the
    pipelined operators for CUDA, and a reference of each, which computes the parts one after the other.
    """
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    graphs: list[dict[str, int]] = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        view_to_reshape(graph)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(graph, False)
        graph.recompile()
        names = Counter(getattr(node.target, "__name__", "").partition(".")[0] for node in graph.graph.nodes)
        graphs.append({name: names[name] for name in EXCHANGES})
        return make_boxed_func(graph.forward)

    def partition(graph: Any, inputs: Any, **options: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **options)

    backend = aot_autograd(fw_compiler=compile_graph, partition_fn=partition, decompositions=select_decomp_table())
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", _symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", _symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
    ids = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    with (
        mock.patch("torch.compile", partial(torch.compile, backend=backend)),
        mock.patch("torch.distributed.is_nccl_available", lambda: True),  # the pass needs a torch with NCCL
        mock.patch("open_lm.parallel.async_tensor_parallel.check_async_tensor_parallel", lambda places: None),
        torch._inductor.config.patch(_micro_pipeline_tp=False),  # restores what the flag sets
    ):
        model = layout_worker.new_model(runtime, cfg, SHAPE, ModelConfig(torchcompile=True))
        loss = model(ids, loss=TokenLoss(ids))[0]
        loss.backward()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    shutdown(runtime)
    return {"values": [loss.item(), getattr(norm, "full_tensor", lambda: norm)().item()], "graphs": graphs}


def error_on_cpu(settings: dict[str, Any]) -> str:
    """Return the error of --async-tensor-parallel on CPU."""
    cfg = ParallelConfig(**settings, async_tensor_parallel=True)
    runtime = init_runtime(cfg)
    try:
        layout_worker.new_model(runtime, cfg, SHAPE, ModelConfig(torchcompile=True))
    except ConfigError as error:
        return str(error)
    finally:
        shutdown(runtime)
    return ""
