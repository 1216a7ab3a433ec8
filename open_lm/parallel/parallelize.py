"""Distribute a model over ranks with FSDP2 or DDP, and enable activation checkpointing and compilation.

This is the only module that uses FSDP2, hybrid sharding and DDP. Models need no changes:
`parallelize(model, layout, cfg, …)` applies them and returns the module to train.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp_common
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import run_on_all_ranks
from open_lm.errors import ConfigError
from open_lm.model.adapters import adapters
from open_lm.model.recomputation import with_recomputation
from open_lm.model.transformer import Transformer
from open_lm.parallel.async_tensor_parallel import enable_async_tensor_parallel
from open_lm.parallel.expert_parallel import (
    apply_expert_parallel,
    check_expert_parallel,
    expert_placements,
    mixtures,
)
from open_lm.parallel.float8 import check_float8, convert_to_float8
from open_lm.parallel.tensor_parallel import apply_tensor_parallel, check_tensor_parallel

# Number of blocks whose parameters --fsdp-backward-prefetch gathers ahead; FSDP2's default is one.
PREFETCH_DEPTH = 2
# From torch 2.12 on, FSDP2 can shard the parameters of a module over different meshes. With older versions, divided
# experts need hooks inside their block, which split a compiled block into several graphs.
SHARDS_OVER_SEVERAL_MESHES = hasattr(fsdp_common, "ShardPlacementResult")
# A compiled block with checkpointing sets the loads of its mixture in the forward pass only. Older versions of torch
# lack the setting, and do not compile such blocks.
_ALLOWS_LOADS = "skip_fwd_side_effects_in_bwd_under_checkpoint"


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
    replicates: bool = True,
) -> nn.Module:
    """Move `model` to `device`, distribute it over the ranks of `layout` and return the module to train.

    With --fsdp, FSDP2 shards the parameters, one group per block; otherwise DDP replicates them. A single process
    without a process group uses neither. Tensor parallelism is applied first and always combined with FSDP2, also
    without --fsdp.

    Args:
        model: the module to distribute; it is changed in place.
        layout: the mesh of ranks.
        cfg: the flags of FSDP2 and DDP.
        device: this rank's device.
        model_cfg: the flags of activation checkpointing and compilation.
        dtype: the dtype of the stored parameters.
        fp8: whether the blocks compute matrix products in 8-bit floating point.
        initialise: fills the parameters and buffers of a model on the meta device after they have been sharded.
        replicates: use DDP for a model that is not sharded; without gradients, there is nothing to synchronize.
    """
    model_cfg = model_cfg or ModelConfig()
    blocks = find_blocks(model, model_cfg.hf_fsdp_block if model_cfg.hf_model else None)
    if fp8:
        run_on_all_ranks(lambda: check_float8(device))
        convert_to_float8(blocks, layout.tensor)
    _split(model, layout)
    if layout.tensor > 1 and cfg.async_tensor_parallel and model_cfg.torchcompile:
        assert layout.mesh is not None
        enable_async_tensor_parallel(layout.mesh["tensor"], device)
    _checkpoint_activations(model, blocks, model_cfg, layout.expert > 1)
    if model_cfg.torchcompile:
        # Compile each block in place: parameter names do not change, and equal blocks share one compilation.
        for block in blocks:
            block.compile(mode=model_cfg.torchcompile_mode)
        if model_cfg.torchcompile_mode != "default":
            # The CUDA graphs of one forward pass must stay in one step: each block reads the output of the previous.
            model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    is_meta = any(p.is_meta for p in model.parameters())
    if dtype != torch.float32:
        model.to(dtype)
        for _, layer in adapters(model):
            layer.adapter.float()  # updates of the adapters are too small for half precision
    is_sharded = layout.mesh is not None and (cfg.fsdp or layout.tensor > 1)
    if is_sharded:
        # The --fsdp-* flags have no effect without --fsdp.
        _shard(
            model, blocks, _data_mesh(layout), cfg if cfg.fsdp else ParallelConfig(), device, _expert_data_mesh(layout)
        )
    elif not is_meta:
        model.to(device)
    if is_meta:
        _materialise(model, torch.device("cpu") if _offloads(cfg, device) else device, device, initialise)
    if is_sharded or layout.mesh is None or not replicates:
        return model
    if model_cfg.torchcompile:
        # DDP's optimizer would cut each compiled block at the borders of DDP's buckets, for an overlap of computation
        # and communication that separately compiled blocks have anyway.
        torch._dynamo.config.optimize_ddp = False
    return _replicate(model, cfg, device)


def _split(model: nn.Module, layout: MeshLayout) -> None:
    """Apply tensor or expert parallelism in place."""
    if layout.tensor > 1:
        assert layout.mesh is not None
        run_on_all_ranks(lambda: check_tensor_parallel(model, layout.tensor))
        apply_tensor_parallel(model, layout.mesh["tensor"])
    if layout.expert > 1:
        assert layout.expert_mesh is not None
        run_on_all_ranks(lambda: check_expert_parallel(model, layout.expert))
        apply_expert_parallel(model, layout.expert_mesh["expert"])


def _data_mesh(layout: MeshLayout) -> DeviceMesh:
    """Return the mesh over which gradients are averaged: ("shard",) or ("replicate", "shard")."""
    assert layout.mesh is not None
    return layout.mesh["shard"] if layout.replicate == 1 else layout.mesh["replicate", "shard"]


def _expert_data_mesh(layout: MeshLayout) -> DeviceMesh | None:
    """Return the mesh over which gradients of experts are averaged, None without expert parallelism."""
    mesh = layout.expert_mesh
    if mesh is None or layout.replicate == 1:
        return None if mesh is None else mesh["expert_shard"]
    return mesh["replicate", "expert_shard"]


def find_blocks(model: nn.Module, class_name: str | None = None) -> list[nn.Module]:
    """Return the model's repeated blocks: modules whose class name contains `class_name`, by default `model.layers`."""
    if class_name is None:
        return list(getattr(model, "layers", []))
    blocks = [module for module in model.modules() if class_name in type(module).__name__]
    if not blocks:
        names = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(f"--hf-fsdp-block {class_name}: the model has no such layer, only {', '.join(names)}")
    return blocks


@contextmanager
def gradient_sync(model: nn.Module, is_last: bool, every_pass: bool = False) -> Iterator[None]:
    """Reduce the gradients of the forward and backward pass in the `with` block over the ranks if `is_last`.

    Earlier passes accumulate unsharded gradients locally, and the last one reduces the sum. With `every_pass`, FSDP2
    reduces the gradients of each pass over the ranks that shard them and accumulates the shards; replicas are still
    reduced only in the last pass.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or every_pass)
        model.set_requires_all_reduce(is_last)
        yield
    elif isinstance(model, DistributedDataParallel) and not is_last and not model.static_graph:
        # With a static graph, DDP must see the reductions in the first pass, so every pass reduces its gradients.
        with model.no_sync():
            yield
    else:
        yield


def unsharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the trainable parameters that a forward pass uses; FSDP2 creates them in the first pass, or here."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        return {p for p in model.parameters() if p.requires_grad}
    found: set[nn.Parameter] = set()
    for module in sharded:  # one at a time, to limit the memory
        module.unshard()
        found.update(p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor))
        module.reshard()
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the `with` block in evaluation mode without gradients and restore the previous mode afterwards.

    Parameters that FSDP2 left gathered after a forward pass are resharded at the end, so that the next pass uses
    weights that have changed in the meantime.
    """
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
    """Return the model inside the wrappers of DDP and torch.compile, or the model itself."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def ineffective_settings(cfg: ParallelConfig, device: torch.device) -> list[str]:
    """Return a message for each setting that has no effect on this device."""
    messages = []
    if cfg.fsdp_cpu_offload and device.type == "cpu":
        messages.append("--fsdp-cpu-offload has no effect: parameters on CPU devices are in host memory already")
    if cfg.ddp_static_graph and (cfg.fsdp or cfg.tensor_parallel > 1):
        messages.append(f"--ddp-static-graph has no effect with {'--fsdp' if cfg.fsdp else '--tensor-parallel'}")
    if device.type == "cpu" and cfg.dist_backend not in ("nccl", "gloo"):
        messages.append(f"--dist-backend {cfg.dist_backend} has no effect: ranks on CPU use gloo")
    return messages


def _checkpoint_activations(
    model: nn.Module, blocks: list[nn.Module], cfg: ModelConfig, divides_experts: bool = False
) -> None:
    """Enable activation checkpointing of every block, of every K-th block, or of inexpensive operators."""
    policy = "full" if cfg.grad_checkpointing else cfg.activation_checkpointing
    if policy == "none":
        return
    set_grad_checkpointing = getattr(model, "set_grad_checkpointing", None)
    if set_grad_checkpointing is None:
        raise ConfigError(f"--grad-checkpointing: {type(model).__name__} does not support it; remove the flag")
    if policy == "full":
        set_grad_checkpointing()
    elif policy.isdecimal():
        set_grad_checkpointing(every=int(policy))
    elif cfg.torchcompile:
        # A policy cannot see the operators of a compiled block, so the block is compiled with its checkpointing.
        if divides_experts and not SHARDS_OVER_SEVERAL_MESHES:
            raise ConfigError(
                f"--activation-checkpointing {policy} with --torchcompile and --expert-parallel needs torch 2.12 or "
                f"newer, found {torch.__version__}; use --activation-checkpointing full, or remove one of the flags"
            )
        if hasattr(torch._dynamo.config, _ALLOWS_LOADS):
            setattr(torch._dynamo.config, _ALLOWS_LOADS, True)
        for block in blocks:
            base: Any = type(block)
            block.__class__ = _checkpointed_class(base, policy, getattr(block, "has_dropout", False))
    else:
        set_grad_checkpointing(policy=policy)


@functools.cache  # torch.compile reuses the graph of a block only for blocks of the same class
def _checkpointed_class(base: Any, policy: str, has_dropout: bool) -> type:
    """Return a subclass of a block's class whose forward pass is checkpointed by `policy`."""

    def forward(block: nn.Module, *args: Any) -> Any:
        return with_recomputation(base.forward, policy, has_dropout)(block, *args)

    return type(base.__name__, (base,), {"forward": forward})


def _shard(  # noqa: PLR0917 - the meshes of one layout
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    cfg: ParallelConfig,
    device: torch.device,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Apply fully_shard to every block, the embedding, and the last norm with the head, so that each is gathered while
    another computes. The remaining parameters are one more group: tied embeddings, and on a mesh of one rank, which
    gathers nothing, all parameters outside of the blocks.

    What the backward pass needs first stays gathered after the forward pass: the last block, the last norm and the
    head. The reduced gradient is the mean over ranks, as with DDP, so the trainer scales the loss equally for both.

    With expert parallelism, the experts of a block are a separate group over `expert_mesh`. It is gathered and reduced
    together with the block's other group where torch supports that.
    """
    reduce_dtype = {(True, False): torch.float32, (False, True): torch.bfloat16}
    flags = (cfg.fsdp_amp, cfg.fsdp_pure_bf16)
    policy = MixedPrecisionPolicy()
    if flags in reduce_dtype:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype[flags])
    offload = CPUOffloadPolicy() if _offloads(cfg, device) else OffloadPolicy()
    placement: Callable[[nn.Parameter], Any] | None = expert_placements(model, expert_mesh or mesh)
    nested_mesh = None if SHARDS_OVER_SEVERAL_MESHES else expert_mesh
    if placement is not None and expert_mesh is not None and nested_mesh is None:
        placement = _over_mesh(placement, expert_mesh)
    shard = functools.partial(fully_shard, mesh=mesh, offload_policy=offload, shard_placement_fn=placement)
    reshards = not (cfg.fsdp_hybrid_o2 or cfg.fsdp_zero2)
    for number, block in enumerate(blocks, start=1):
        reshards_block = reshards and number < len(blocks)
        for network in mixtures(block) if nested_mesh is not None else ():
            shard(network.experts.mlp, mesh=nested_mesh, mp_policy=policy, reshard_after_forward=reshards_block)
        shard(block, mp_policy=policy, reshard_after_forward=reshards_block)
    if isinstance(model, Transformer) and not model.weight_tying and mesh.size() > 1:
        shard(model.tok_embeddings, mp_policy=policy, reshard_after_forward=reshards)
        if isinstance(model.tok_embeddings, FSDPModule):
            model.tok_embeddings.set_unshard_in_backward(False)  # the gradient does not depend on the embeddings
        # The head's input keeps the dtype of the norm's output.
        head_policy = replace(policy, cast_forward_inputs=False)
        shard([model.norm, model.output], mp_policy=head_policy, reshard_after_forward=False)
    shard(model, mp_policy=policy, reshard_after_forward=False)
    # By default FSDP2 gathers one group ahead, but a block with divided experts has two groups.
    depth = PREFETCH_DEPTH if cfg.fsdp_backward_prefetch else int(expert_mesh is not None)
    if depth:
        for index, block in enumerate(blocks):
            assert isinstance(block, FSDPModule)
            earlier = reversed(blocks[max(0, index - depth) : index])
            groups = [module for each in earlier for module in each.modules()]
            block.set_modules_to_backward_prefetch([group for group in groups if isinstance(group, FSDPModule)])


def _over_mesh(placement: Callable[[nn.Parameter], Shard | None], mesh: DeviceMesh) -> Callable[[nn.Parameter], object]:
    """Return a function with which FSDP2 shards the parameters that have a `placement` over `mesh`."""
    mesh_info = (
        fsdp_common.FSDPMeshInfo(mesh, shard_mesh_dim=0)
        if mesh.ndim == 1
        else fsdp_common.HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    )

    def over_mesh(parameter: nn.Parameter) -> object:
        shard = placement(parameter)
        return None if shard is None else fsdp_common.ShardPlacementResult(shard, mesh_info)

    return over_mesh


def _offloads(cfg: ParallelConfig, device: torch.device) -> bool:
    return cfg.fsdp and cfg.fsdp_cpu_offload and device.type != "cpu"


def _materialise(
    model: nn.Module,
    parameter_device: torch.device,
    device: torch.device,
    initialise: Callable[[nn.Module], object] | None,
) -> None:
    """Allocate the parameters and buffers of a model on the meta device and initialise them.

    Offloaded parameters are allocated in host memory, from where FSDP2 copies them to the device. Buffers are allocated
    on the device, because FSDP2 never moves them.
    """
    if initialise is None:
        raise ConfigError(
            "--experimental-meta-device: this model has no function to initialise its weights after sharding; remove "
            "the flag"
        )
    model.to_empty(device=parameter_device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))
    initialise(model)


def _replicate(model: nn.Module, cfg: ParallelConfig, device: torch.device) -> DistributedDataParallel:
    # Buffers are constants of the architecture and need no synchronization. torch 2.13 renamed the argument and warns
    # about the old name.
    signature = inspect.signature(DistributedDataParallel.__init__).parameters
    argument = "forward_sync_buffers" if "forward_sync_buffers" in signature else "broadcast_buffers"
    options: dict[str, Any] = {argument: False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        static_graph=cfg.ddp_static_graph,
        gradient_as_bucket_view=True,
        **options,
    )
