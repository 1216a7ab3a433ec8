"""How a model is spread over ranks, checkpointed and compiled: the only file that knows FSDP2, hybrid sharding and DDP.

A model knows nothing of them: `parallelize(model, layout, cfg, …)` applies them from outside and returns what to train.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import run_on_all_ranks
from open_lm.errors import ConfigError
from open_lm.model.recomputation import recomputed
from open_lm.parallel.float8 import check_float8, convert_to_float8
from open_lm.parallel.tensor_parallel import check_tensor_parallel, apply_tensor_parallel

# Blocks whose parameters --fsdp-backward-prefetch gathers ahead; FSDP2 by itself is one block ahead.
PREFETCH_DEPTH = 2


def parallelize(
    model: nn.Module,
    layout: MeshLayout,
    cfg: ParallelConfig,
    *,
    device: torch.device,
    model_cfg: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    initialise: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Place `model` on `device` and spread it over the ranks of `layout`; the result is called and trained as the model
    was. With --fsdp by FSDP2, one group of parameters for each block; else by DDP; in a single process without a group
    not at all. Tensor parallelism splits matrices first, and leaves the rest to FSDP2 with or without --fsdp.

    dtype: what parameters are stored in. fp8: multiply in 8-bit floating point in the blocks. initialise: fills the
    parameters and buffers of a model made on the meta device, once each rank has its part of them.
    """
    model_cfg = model_cfg or ModelConfig()
    blocks = find_blocks(model, model_cfg.hf_fsdp_block if model_cfg.hf_model else None)
    if fp8:
        run_on_all_ranks(lambda: check_float8(device))
        convert_to_float8(blocks, layout.tensor)
    if layout.tensor > 1:
        assert layout.mesh is not None
        run_on_all_ranks(lambda: check_tensor_parallel(model, layout.tensor))
        apply_tensor_parallel(model, layout.mesh["tensor"])
    _checkpoint_activations(model, blocks, model_cfg)
    if model_cfg.torchcompile:
        # In place and a block at a time: parameter names stay, and equal blocks share one compilation.
        for block in blocks:
            block.compile(mode=model_cfg.torchcompile_mode)
        if model_cfg.torchcompile_mode != "default":
            # CUDA graphs of one forward pass belong together: each block reads what the one before has written.
            model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    is_meta = any(p.is_meta for p in model.parameters())
    if dtype != torch.float32:
        model.to(dtype)
    is_sharded = layout.mesh is not None and (cfg.fsdp or layout.tensor > 1)
    if is_sharded:
        # Without --fsdp its flags say nothing, here as elsewhere.
        _shard(model, blocks, _data_mesh(layout), cfg if cfg.fsdp else ParallelConfig(), device)
    elif not is_meta:
        model.to(device)
    if is_meta:
        _materialise(model, torch.device("cpu") if _offloads(cfg, device) else device, device, initialise)
    if is_sharded or layout.mesh is None:
        return model
    return _replicate(model, cfg, device)


def _data_mesh(layout: MeshLayout) -> DeviceMesh:
    """The ranks that gradients are averaged over: ("shard",) or ("replicate", "shard")."""
    assert layout.mesh is not None
    return layout.mesh["shard"] if layout.replicate == 1 else layout.mesh["replicate", "shard"]


def find_blocks(model: nn.Module, class_name: str | None = None) -> list[nn.Module]:
    """The model's repeated layers: those whose class name contains `class_name`, or the members of `model.layers`."""
    if class_name is None:
        return list(getattr(model, "layers", []))
    blocks = [module for module in model.modules() if class_name in type(module).__name__]
    if not blocks:
        found = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(f"--hf-fsdp-block {class_name}: the model has no such layer; it has {', '.join(found)}")
    return blocks


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """A forward and backward pass inside reduces its gradients over the ranks only if `enabled`; else they pile up
    locally and the next enabled pass reduces the sum."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled and not model.static_graph:
        # A static graph has to be seen with its reductions first; there each pass reduces what has piled up.
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards the model is in the mode it was in, and sharded parameters that
    the forward passes left gathered are given up, so that a change of the weights is seen by the next pass."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train(was_training)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that hold a whole copy of it (DDP, torch.compile), or the model itself."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def notes(cfg: ParallelConfig, device: torch.device) -> list[str]:
    """A sentence for each setting that changes nothing on this device."""
    sentences = []
    if cfg.fsdp_cpu_offload and device.type == "cpu":
        sentences.append("--fsdp-cpu-offload has no effect: parameters on CPU devices are in host memory already")
    if cfg.ddp_static_graph and (cfg.fsdp or cfg.tensor_parallel > 1):
        sentences.append(f"--ddp-static-graph has no effect with {'--fsdp' if cfg.fsdp else '--tensor-parallel'}")
    if device.type == "cpu" and cfg.dist_backend not in ("nccl", "gloo"):
        sentences.append(f"--dist-backend {cfg.dist_backend} has no effect: ranks on CPU use gloo")
    return sentences


def _checkpoint_activations(model: nn.Module, blocks: list[nn.Module], cfg: ModelConfig) -> None:
    """Switch recomputation on, by the model's own means: of every block, of every K-th, or of cheap operators."""
    policy = "full" if cfg.grad_checkpointing else cfg.activation_checkpointing
    if policy == "none":
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(f"--grad-checkpointing: {type(model).__name__} does not offer it; leave the flag out")
    if policy == "full":
        switch()
    elif policy != "op":
        switch(every=int(policy))
    elif cfg.torchcompile:
        # Operators of a compiled block cannot be told apart from outside: it is compiled with what is recomputed.
        for block in blocks:
            own: Any = type(block)
            block.__class__ = _recomputing(own, policy)
    else:
        switch(policy=policy)


@functools.cache  # equal blocks are compiled once, if they are of the same class
def _recomputing(own: Any, policy: str) -> type:
    """A subclass of a block's class whose forward is recomputed by `policy`."""

    def forward(block: nn.Module, *args: Any) -> Any:
        return recomputed(own.forward, policy)(block, *args)

    return type(own.__name__, (own,), {"forward": forward})


def _shard(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, cfg: ParallelConfig, device: torch.device
) -> None:
    """fully_shard on every block and on the rest (embeddings, last norm, head) as one more group, in place.

    The reduced gradient is the mean over ranks, as with DDP: the trainer scales its loss for both alike.
    """
    reduce_dtype = {(True, False): torch.float32, (False, True): torch.bfloat16}
    flags = (cfg.fsdp_amp, cfg.fsdp_pure_bf16)
    policy = MixedPrecisionPolicy()
    if flags in reduce_dtype:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype[flags])
    offload = CPUOffloadPolicy() if _offloads(cfg, device) else OffloadPolicy()
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not (cfg.fsdp_hybrid_o2 or cfg.fsdp_zero2),
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    if cfg.fsdp_backward_prefetch:
        for index, block in enumerate(blocks):
            assert isinstance(block, FSDPModule)
            earlier = reversed(blocks[max(0, index - PREFETCH_DEPTH) : index])
            block.set_modules_to_backward_prefetch([b for b in earlier if isinstance(b, FSDPModule)])


def _offloads(cfg: ParallelConfig, device: torch.device) -> bool:
    return cfg.fsdp and cfg.fsdp_cpu_offload and device.type != "cpu"


def _materialise(
    model: nn.Module,
    home: torch.device,
    device: torch.device,
    initialise: Callable[[nn.Module], object] | None,
) -> None:
    """Give the parameters memory at `home`, from where FSDP2 takes them to the device, and buffers, which it never
    moves, on the device; and fill them."""
    if initialise is None:
        raise ConfigError("--experimental-meta-device: this model has no initialisation that could fill it afterwards")
    model.to_empty(device=home)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))
    initialise(model)


def _replicate(model: nn.Module, cfg: ParallelConfig, device: torch.device) -> DistributedDataParallel:
    # Buffers are constants of the architecture, equal on all ranks from the start. torch names the switch anew from
    # 2.13 on and warns of the old name.
    signature = inspect.signature(DistributedDataParallel.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in signature else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        static_graph=cfg.ddp_static_graph,
        gradient_as_bucket_view=True,
        **options,
    )
