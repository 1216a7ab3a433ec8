"""Predict the memory of one rank in every phase of a training step. The largest phase is what must fit on the device.

Mirrors parallel/parallelize.py, kernels/linear_loss.py and the modules of optim. Checked by scripts/check_plan.py.
Legend: N ranks that shard the parameters, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from open_lm.config.memory_limits import LOSS_CHUNK_TOKENS
from open_lm.config.registry import OPTIMIZERS
from open_lm.planner.activations import (
    SavedActivations,
    backward_transients,
    saved_by_block,
    saved_by_head,
    saved_with_op_checkpointing,
    total_bytes,
)
from open_lm.planner.muon import block_matrices, muon_update_bytes
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import Weight

# Memory outside of our tensors: the CUDA context with its kernels, NCCL's buffers, and the share of short-lived tensors
# that the allocator loses to fragmentation. These are typical values; the planner does not measure them.
CONTEXT_BYTES = 600 << 20
NCCL_BYTES = 1 << 30
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """The bytes of a rank in one phase of a step.

    Attributes:
        parameters: the local shards of the parameters.
        gathered: unsharded or cast parameters in use, and the buffers of their all-gather.
        gradients: gradients, and the buffers of their reduction.
        optimizer: optimizer state and averaged weights.
        activations: saved activations, and what a block's backward pass needs in addition.
        loss: logits of a chunk, and the gradients that the loss computes.
        reserve: memory outside of our tensors (CUDA, NCCL, fragmentation).
        phase: the phase of the step.
    """

    parameters: int = 0
    gathered: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    reserve: int = 0
    phase: str = ""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(value for value in vars(self).values() if isinstance(value, int))

    def items(self) -> list[tuple[str, int]]:
        """Return the (name, bytes) pairs of all parts."""
        return [(item.name, getattr(self, item.name)) for item in fields(self) if item.name != "phase"]


@dataclass(frozen=True)
class _Group:
    """The bytes of parameters that are gathered and reduced together.

    Attributes:
        gathered: the unsharded parameters.
        buffer: the buffers of their all-gather.
        gradients: their unsharded gradients.
        reduce: the buffer of the reduction of these.
        growth: the reduced gradients of the last micro-batch, less the accumulated ones of earlier micro-batches that
            they replace.
    """

    gathered: int
    buffer: int
    gradients: int
    reduce: int
    growth: int


@dataclass(frozen=True)
class _Block(_Group):
    """The bytes of one block on a rank.

    Attributes:
        casts: copies of its matrices in autocast's dtype.
        recasts: whether the backward pass casts again instead of keeping `casts`.
        saved: activations that stay until its backward pass, given the checkpointing mode.
        recomputed: activations in addition to `saved` while its backward pass runs.
    """

    casts: int
    recasts: bool
    saved: int
    recomputed: int

    @property
    def saved_casts(self) -> int:
        """The bytes of the cast matrices that stay until the backward pass."""
        return 0 if self.recasts else self.casts


def peak(setup: TrainingSetup) -> Memory:
    """Return the memory of the phase that needs most on the device."""
    return max(phases(setup), key=lambda memory: memory.total)


def add_reserve(memory: Memory, setup: TrainingSetup) -> Memory:
    """Return `memory` with the memory outside of our tensors added."""
    short_lived = memory.gathered + memory.activations + memory.loss
    reserve = CONTEXT_BYTES + (NCCL_BYTES if setup.ranks > 1 else 0) + round(FRAGMENTATION * short_lived)
    return replace(memory, reserve=reserve)


def optimizer_bytes(setup: TrainingSetup) -> int:
    """Return the bytes of moments, as many as the optimizer's entry declares, and of averaged weights."""
    averagers, name = setup.config.optim.averagers, setup.config.optim.optimizer
    moments = OPTIMIZERS.required_fact(name, "moments")
    matrix_moments = OPTIMIZERS.fact(name, "matrix_moments", moments)
    copies = len(averagers.split(",")) if averagers else 0
    elements = (len(moments) + copies) * setup.local_trained
    elements += (len(matrix_moments) - len(moments)) * setup.local_numel(block_matrices(setup))
    return setup.sizes.stored * elements


def host_bytes(setup: TrainingSetup) -> int:
    """Return the host memory of a rank with --fsdp-cpu-offload: parameters, gradients and moments."""
    if not setup.config.parallel.fsdp_cpu_offload:
        return 0
    return setup.parameter_bytes + setup.local_trained * setup.sizes.stored + optimizer_bytes(setup)


def phases(setup: TrainingSetup) -> Iterator[Memory]:
    """Yield the memory of each phase of a step: loss, backward pass of each block and of the embedding, update."""
    offloads = setup.config.parallel.fsdp_cpu_offload
    sizes = setup.sizes
    resident = Memory(
        parameters=0 if offloads else setup.parameter_bytes,
        optimizer=0 if offloads else optimizer_bytes(setup),
    )
    blocks = _blocks(setup)
    embedding, *others = (_group(setup, weights) for weights in setup.outer_groups)
    accumulated = accumulated_gradient_bytes(setup)
    adds_in_place = accumulated > 0 and setup.reductions == 1
    # The embedding stays gathered only with ZeRO-2, or in a group with the head.
    gathered = embedding.gathered if setup.keeps_unsharded or not others else 0
    kept = blocks if setup.keeps_unsharded else blocks[-1:]
    yield replace(
        resident,
        phase="loss",
        gathered=gathered
        + sum(head.gathered for head in others)
        + (others or blocks)[-1].buffer
        + sum(block.gathered for block in kept)
        + sum(block.casts for block in blocks),
        gradients=accumulated,
        activations=sum(block.saved for block in blocks)
        + total_bytes(saved_by_head(setup.shape, sizes), setup.tokens, setup.layout.tensor),
        loss=_loss_bytes(setup),
    )
    # The backward pass visits the head, then the blocks from last to first. Each leaves only its gradients. The head's
    # remain unsharded if they are reduced together with the embedding's.
    weights = setup.trained([_head(setup.shape.by_block[None])])
    head_gradient = setup.unsharded_numel(weights) * _gradient_element_size(setup) if not others else 0
    finished = accumulated + sum(head.growth for head in others)
    finished += head_gradient if setup.is_sharded or not accumulated else 0
    saved, casts = sum(block.saved for block in blocks), sum(block.saved_casts for block in blocks)
    unsharded, reducing = sum(block.gathered for block in blocks), sum(head.reduce for head in others)
    for number in reversed(range(len(blocks))):
        block = blocks[number]
        prefetch = blocks[number - 1].buffer if number else 0  # FSDP2 gathers the next block meanwhile
        saved, casts, unsharded = saved - block.saved, casts - block.saved_casts, unsharded - block.gathered
        yield replace(
            resident,
            phase=f"backward of block {number}",
            gathered=gathered
            + block.gathered
            + (unsharded if setup.keeps_unsharded else prefetch)
            + block.casts
            + casts,
            gradients=finished + reducing + (0 if adds_in_place else block.gradients),
            activations=saved + block.saved + block.recomputed,
        )
        reducing = block.reduce
        finished += block.growth
    own = setup.unsharded_numel(setup.trained(setup.outer_groups[0][:1])) * _gradient_element_size(setup)
    yield replace(
        resident,
        phase="backward of the embedding",
        gathered=gathered,
        gradients=finished + reducing + own,
    )
    if setup.is_sharded:  # all parameters are resharded; gradients have been added to those of earlier micro-batches
        yield replace(
            resident,
            phase="reduction of the embedding",
            gradients=finished - head_gradient + embedding.reduce + (0 if adds_in_place else embedding.gradients),
        )
    yield replace(
        resident,
        phase="update",
        gradients=0 if offloads else setup.local_trained * sizes.stored,
        activations=muon_update_bytes(setup),
    )


def _head(root: Sequence[Weight]) -> Weight:
    """Return the weight of the output projection; the embedding where weights are tied."""
    return next((weight for weight in root if weight.role == "head"), root[0])


def _blocks(setup: TrainingSetup) -> list[_Block]:
    """Return the bytes of every block; equal blocks are computed once."""
    kinds = [(setup.shape.has_experts(number), setup.checkpointing(number)) for number in range(setup.shape.n_layers)]
    by_kind = {kind: _block(setup, kinds.index(kind)) for kind in set(kinds)}
    return [by_kind[kind] for kind in kinds]


def _block(setup: TrainingSetup, number: int) -> _Block:
    shape, sizes, tensor = setup.shape, setup.sizes, setup.layout.tensor
    weights = shape.by_block[number]
    cast = sizes.autocast and sizes.gathered != sizes.compute
    casts = setup.unsharded_numel(w for w in weights if len(w.shape) > 1) * sizes.compute if cast else 0
    compiled = setup.config.model.torchcompile
    everything = total_bytes(saved_by_block(shape, sizes, number, setup.layout.context, compiled), setup.tokens, tensor)
    transient = total_bytes(backward_transients(shape, sizes, number), setup.tokens, tensor)
    mode, saved = setup.checkpointing(number), everything
    if mode in ("op", "half-op"):
        every, exchanges = 2 if mode == "half-op" else 1, setup.layout.expert > 1
        saved = total_bytes(saved_with_op_checkpointing(shape, sizes, number, every, exchanges), setup.tokens, tensor)
    elif mode == "full":
        saved = total_bytes([SavedActivations("input", shape.dim, sizes.residual, "tokens")], setup.tokens, tensor)
    return _Block(
        **vars(_group(setup, weights)),
        casts=casts,
        recasts=mode != "none",
        saved=saved,
        recomputed=everything - saved + transient,
    )


def _group(setup: TrainingSetup, weights: Sequence[Weight]) -> _Group:
    sizes, offloads = setup.sizes, setup.config.parallel.fsdp_cpu_offload
    trained, local = setup.trained(weights), setup.local_numel(weights)
    gradients = setup.unsharded_numel(trained)
    if setup.is_sharded:
        final = 0 if offloads else setup.local_numel(trained) * sizes.stored
    else:  # DDP's buckets exist from the start
        final = gradients * sizes.stored if setup.ranks == 1 else 0
    return _Group(
        gathered=setup.unsharded_numel(weights) * sizes.gathered if setup.is_sharded else 0,
        # A single rank has nothing to gather.
        buffer=(setup.shards > 1)
        * (setup.buffer_numel(weights) * sizes.gathered + (local * sizes.stored if offloads else 0)),
        gradients=gradients * _gradient_element_size(setup),
        reduce=setup.buffer_numel(trained) * sizes.reduced,
        growth=final - _accumulated_bytes(setup, gradients, setup.local_numel(trained)),
    )


def accumulated_gradient_bytes(setup: TrainingSetup) -> int:
    """Return the gradient bytes that exist before the last micro-batch's backward pass.

    These are the accumulated gradients of earlier micro-batches, and DDP's buckets, which receive them only in the
    last backward pass.
    """
    buckets = setup.unsharded_trained * setup.sizes.stored if setup.ranks > 1 and not setup.is_sharded else 0
    return buckets + _accumulated_bytes(setup, setup.unsharded_trained, setup.local_trained)


def _accumulated_bytes(setup: TrainingSetup, unsharded: int, local: int) -> int:
    """Return the bytes of gradients that earlier micro-batches leave on the device, given their elements."""
    if setup.config.optim.accum_freq == 1:
        return 0
    if not setup.is_sharded:
        return unsharded * setup.sizes.stored
    if not setup.config.parallel.reduces_every_micro_batch:
        return unsharded * setup.sizes.reduced  # in the dtype of the reduction
    if setup.layout.replicate > 1:
        return local * setup.sizes.reduced  # the shards, to be reduced over the replicas
    return 0 if setup.config.parallel.fsdp_cpu_offload else local * setup.sizes.stored


def _gradient_element_size(setup: TrainingSetup) -> int:
    """Return the bytes per gradient element that the backward pass produces."""
    return setup.sizes.gathered if setup.is_sharded else setup.sizes.stored


def _loss_bytes(setup: TrainingSetup) -> int:
    """Return what linear_loss.py allocates: the logits of a chunk, and the gradients of hidden states and head."""
    sizes, tokens, dim = setup.sizes, setup.tokens, setup.shape.dim
    rows = setup.unsharded_numel([_head(setup.shape.by_block[None])]) // dim
    cast = rows * dim * sizes.compute if sizes.gathered != sizes.compute else 0
    # Where the Triton kernel works in place, there is no copy in float32.
    logits = min(LOSS_CHUNK_TOKENS, tokens) * rows * (sizes.compute + (0 if setup.device_type == "cuda" else 4))
    hidden = tokens * dim * (2 * sizes.compute + 4)  # two copies, and the gradient
    gradient = rows * dim * 4 if setup.trained([_head(setup.shape.by_block[None])]) else 0
    return gradient + cast + logits + hidden
