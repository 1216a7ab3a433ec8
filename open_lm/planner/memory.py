"""Predict the memory of one rank in every phase of a training step. The largest phase is what must fit on the device.

Mirrors parallel/parallelize.py, kernels/linear_loss.py and the modules of optim. Checked by scripts/check_plan.py.
Legend: N ranks that shard the parameters, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from open_lm.config.layout import MeshLayout
from open_lm.config.memory_limits import LOSS_CHUNK_TOKENS
from open_lm.config.registry import OPTIMIZERS
from open_lm.config.sections import Config
from open_lm.planner.activations import (
    ElementSizes,
    SavedActivations,
    backward_transients,
    element_sizes,
    saved_by_block,
    saved_by_head,
    saved_with_op_checkpointing,
    total_bytes,
)
from open_lm.planner.adapters import QUANTIZED_BITS, is_quantized, trained_weights
from open_lm.planner.muon import block_matrices, muon_update_bytes
from open_lm.planner.shapes import ModelShape, Weight

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
class TrainingSetup:
    """A model, its training configuration, the layout of the ranks, and the micro-batch size in sequences."""

    shape: ModelShape
    config: Config
    layout: MeshLayout
    batch: int
    device_type: str = "cuda"

    @cached_property
    def sizes(self) -> ElementSizes:
        """The bytes per element of each kind of tensor."""
        return element_sizes(self.config, self.device_type)

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch on this rank, before tensor parallelism divides them."""
        return self.batch * -(-self.shape.seq_len // self.layout.context)

    @property
    def ranks(self) -> int:
        """The world size."""
        layout = self.layout
        return layout.replicate * layout.shard * layout.context * layout.tensor

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 manages the parameters. Tensor parallelism always uses FSDP2."""
        return self.config.parallel.fsdp or self.layout.tensor > 1

    @property
    def shards(self) -> int:
        """N, the number of ranks that shard the parameters."""
        return self.layout.shard * self.layout.context if self.is_sharded else 1

    @property
    def keeps_unsharded(self) -> bool:
        """Whether blocks stay unsharded between forward and backward pass (ZeRO-2)."""
        parallel = self.config.parallel
        return parallel.fsdp_zero2 or parallel.fsdp_hybrid_o2

    def checkpointing(self, block: int) -> str:
        """Return how --activation-checkpointing treats a block: "none", "full", "op" or "half-op"."""
        model = self.config.model
        mode = "full" if model.grad_checkpointing else model.activation_checkpointing
        if mode.isdigit():
            return "full" if block % int(mode) == 0 else "none"
        return mode

    def unsharded_numel(self, weights: Iterable[Weight]) -> int:
        """Return the elements of `weights` on a rank before FSDP shards them."""
        return sum(math.prod(weight.local_shape(self.layout.tensor)) for weight in weights)

    def local_numel(self, weights: Iterable[Weight]) -> int:
        """Return the elements of `weights` in a rank's local shards: its rows of each weight, rounded up."""
        shapes = (weight.local_shape(self.layout.tensor) for weight in weights)
        return sum(-(-shape[0] // self.shards) * math.prod(shape[1:]) for shape in shapes)

    @cached_property
    def local_params(self) -> int:
        """The parameters of the model in a rank's local shards."""
        return sum(count * self.local_numel(weights) for weights, count in self.shape.kinds)

    def trained(self, weights: Iterable[Weight]) -> list[Weight]:
        """Return those parameters of `weights` that have a gradient: with --lora their adapters, else all."""
        return trained_weights(weights, self.config.adapters)

    @cached_property
    def local_trained(self) -> int:
        """The trained parameters in a rank's local shards."""
        return sum(count * self.local_numel(self.trained(weights)) for weights, count in self.shape.kinds)

    @cached_property
    def unsharded_trained(self) -> int:
        """The trained parameters on a rank before FSDP shards them."""
        return sum(count * self.unsharded_numel(self.trained(weights)) for weights, count in self.shape.kinds)

    @cached_property
    def parameter_bytes(self) -> int:
        """The bytes of a rank's local shards of all parameters; adapters are in float32."""
        adapters, stored = self.config.adapters, self.sizes.stored
        num_bytes = float(self.local_params * stored) + (4 * self.local_trained if adapters.lora else 0)
        quantized = self.local_numel(w for w in self.shape.weights if is_quantized(w, adapters))
        return round(num_bytes - quantized * (stored - QUANTIZED_BITS / 8))

    def buffer_numel(self, weights: Iterable[Weight]) -> int:
        """Return the elements of the flat buffer that gathers or reduces `weights`: the padded shards of all ranks."""
        return self.local_numel(weights) * self.shards if self.is_sharded else 0


@dataclass(frozen=True)
class _Block:
    """The bytes of one block on a rank.

    Attributes:
        gathered: its unsharded parameters.
        buffer: the buffers of their all-gather.
        casts: copies of its matrices in autocast's dtype.
        recasts: whether the backward pass casts again instead of keeping `casts`.
        saved: activations that stay until its backward pass, given the checkpointing mode.
        recomputed: activations in addition to `saved` while its backward pass runs.
        gradients: its unsharded gradients.
        reduce: the buffer of their reduction.
        local_gradients: its reduced gradients.
        freed: accumulated gradients of earlier micro-batches, freed when those of the last micro-batch are reduced.
    """

    gathered: int
    buffer: int
    casts: int
    recasts: bool
    saved: int
    recomputed: int
    gradients: int
    reduce: int
    local_gradients: int
    freed: int

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
    root = setup.shape.by_block[None]
    accumulated = _accumulated_gradient_bytes(setup)
    gathered = setup.unsharded_numel(root) * sizes.gathered if setup.is_sharded else 0
    yield replace(
        resident,
        phase="loss",
        gathered=gathered
        + blocks[-1].buffer
        + sum(b.casts + (b.gathered if setup.keeps_unsharded else 0) for b in blocks),
        gradients=accumulated,
        activations=sum(block.saved for block in blocks)
        + total_bytes(saved_by_head(setup.shape, sizes), setup.tokens, setup.layout.tensor),
        loss=_loss_bytes(setup),
    )
    # The backward pass visits the blocks from last to first. Visited blocks leave only their gradients.
    grad_size = _gradient_element_size(setup)
    head_gradient = setup.unsharded_numel(setup.trained([_head(root)])) * grad_size
    finished = accumulated + (head_gradient if setup.is_sharded or not accumulated else 0)
    saved, casts = sum(block.saved for block in blocks), sum(block.saved_casts for block in blocks)
    unsharded, reducing = sum(block.gathered for block in blocks), 0
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
            gradients=finished + reducing + (0 if accumulated else block.gradients),
            activations=saved + block.saved + block.recomputed,
        )
        reducing = block.reduce
        finished += block.local_gradients - block.freed
    yield replace(
        resident,
        phase="backward of the embedding",
        gathered=gathered,
        gradients=finished + reducing + setup.unsharded_numel(setup.trained(root[:1])) * grad_size,
    )
    if setup.is_sharded:  # all parameters are resharded; gradients have been added to those of earlier micro-batches
        both = {weight.name: weight for weight in (root[0], _head(root))}.values()
        both_gradients = setup.unsharded_numel(setup.trained(both)) * grad_size
        others = finished - head_gradient + (0 if accumulated else both_gradients)
        yield replace(
            resident,
            phase="reduction of the embedding",
            gradients=others + setup.buffer_numel(setup.trained(root)) * sizes.reduced,
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
    sharded, offloads = setup.is_sharded, setup.config.parallel.fsdp_cpu_offload
    accumulated = _accumulated_gradient_bytes(setup)
    unsharded, buffer, local = setup.unsharded_numel(weights), setup.buffer_numel(weights), setup.local_numel(weights)
    trained = setup.trained(weights)
    gradients, local_gradients = setup.unsharded_numel(trained), setup.local_numel(trained)
    cast = sizes.autocast and sizes.gathered != sizes.compute
    casts = setup.unsharded_numel(w for w in weights if len(w.shape) > 1) * sizes.compute if cast else 0
    compiled = setup.config.model.torchcompile
    everything = total_bytes(saved_by_block(shape, sizes, number, setup.layout.context, compiled), setup.tokens, tensor)
    transient = total_bytes(backward_transients(shape, sizes, number), setup.tokens, tensor)
    mode, saved = setup.checkpointing(number), everything
    if mode in ("op", "half-op"):
        every = 2 if mode == "half-op" else 1
        saved = total_bytes(saved_with_op_checkpointing(shape, sizes, number, every), setup.tokens, tensor)
    elif mode == "full":
        saved = total_bytes([SavedActivations("input", shape.dim, sizes.residual, "tokens")], setup.tokens, tensor)
    return _Block(
        gathered=unsharded * sizes.gathered if sharded else 0,
        # A single rank has nothing to gather.
        buffer=(setup.shards > 1) * (buffer * sizes.gathered + (local * sizes.stored if offloads else 0)),
        casts=casts,
        recasts=mode != "none",
        saved=saved,
        recomputed=everything - saved + transient,
        gradients=gradients * _gradient_element_size(setup),
        reduce=setup.buffer_numel(trained) * sizes.reduced,
        local_gradients=0 if offloads or (accumulated and not sharded) else local_gradients * sizes.stored,
        freed=_freed_accumulation_bytes(setup, gradients),
    )


def _accumulated_gradient_bytes(setup: TrainingSetup) -> int:
    """Return the gradient bytes that exist before the last micro-batch's backward pass.

    These are the accumulated gradients of earlier micro-batches, and DDP's buckets, which receive them only in the
    last backward pass.
    """
    unsharded = setup.unsharded_trained
    if setup.is_sharded:  # accumulated unsharded, in the dtype of the reduction
        return unsharded * setup.sizes.reduced if setup.config.optim.accum_freq > 1 else 0
    return ((setup.config.optim.accum_freq > 1) + (setup.ranks > 1)) * unsharded * setup.sizes.stored


def _freed_accumulation_bytes(setup: TrainingSetup, unsharded: int) -> int:
    """Return the accumulated bytes of `unsharded` parameters that their last reduction frees."""
    if setup.config.optim.accum_freq == 1:
        return 0
    if setup.is_sharded:
        return unsharded * setup.sizes.reduced
    return unsharded * setup.sizes.stored if setup.ranks > 1 else 0


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
