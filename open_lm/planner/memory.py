"""Bytes of one rank at each phase of a training step, by what they are for; the largest sum is what has to fit.

Mirrors parallelize.py, linear_loss.py, optim.py and muon.py. Checked by scripts/check_plan.py.
Legend: N ranks that share parameters, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from open_lm.config.layout import Layout
from open_lm.config.sections import Config
from open_lm.planner.activations import (
    Kept,
    Types,
    kept_at_the_end,
    kept_by_block,
    kept_by_op,
    total_bytes,
    transient_of_block,
    types_of,
)
from open_lm.planner.shapes import ModelShape, Weight

# What is no tensor of ours: the CUDA context with its kernels, NCCL's buffers, and what the allocator cannot reuse of
# what comes and goes. Usual sizes, not measured by the planner.
CONTEXT_BYTES = 600 << 20
NCCL_BYTES = 1 << 30
FRAGMENTATION = 0.05
CHUNK_TOKENS = 2048  # whose logits the loss holds at a time (linear_loss.py)
MUON_BATCH = 1 << 26  # numbers of matrices that are made orthogonal together (muon.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. `gathered`: parameters as they are used, gathered or cast, and their buffers on the way;
    `gradients` with theirs; `activations` with what a block needs in its backward pass; `reserve`: see above."""

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
        return sum(value for value in vars(self).values() if isinstance(value, int))

    def items(self) -> list[tuple[str, int]]:
        return [(item.name, getattr(self, item.name)) for item in fields(self) if item.name != "phase"]


@dataclass(frozen=True)
class Job:
    """A model trained as `config` says by ranks laid out so, each with micro-batches of `batch` sequences."""

    shape: ModelShape
    config: Config
    layout: Layout
    batch: int
    device_type: str = "cuda"

    @cached_property
    def types(self) -> Types:
        return types_of(self.config, self.device_type)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank, before tensor parallelism divides them."""
        return self.batch * -(-self.shape.seq_len // self.layout.context)

    @property
    def ranks(self) -> int:
        layout = self.layout
        return layout.replicate * layout.shard * layout.context * layout.tensor

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the parameters; tensor parallelism always goes through it."""
        return self.config.parallel.fsdp or self.layout.tensor > 1

    @property
    def shards(self) -> int:
        """N."""
        return self.layout.shard * self.layout.context if self.is_sharded else 1

    @property
    def keeps_gathered(self) -> bool:
        """Whether blocks stay gathered from forward to backward (ZeRO-2)."""
        parallel = self.config.parallel
        return parallel.fsdp_zero2 or parallel.fsdp_hybrid_o2

    def checkpointing(self, block: int) -> str:
        """none, full or op: what --activation-checkpointing does to a block."""
        model = self.config.model
        mode = "full" if model.grad_checkpointing else model.activation_checkpointing
        if mode.isdigit():
            return "full" if block % int(mode) == 0 else "none"
        return mode

    def numbers(self, weights: Iterable[Weight]) -> int:
        """Parameters of a rank before FSDP shards them."""
        return sum(math.prod(weight.part(self.layout.tensor)) for weight in weights)

    def own(self, weights: Iterable[Weight]) -> int:
        """Parameters that a rank holds: its rows of each, rounded up."""
        parts = (weight.part(self.layout.tensor) for weight in weights)
        return sum(-(-part[0] // self.shards) * math.prod(part[1:]) for part in parts)

    @cached_property
    def own_numbers(self) -> int:
        """Parameters of the model that a rank holds."""
        return sum(count * self.own(weights) for weights, count in self.shape.kinds)

    @cached_property
    def whole_numbers(self) -> int:
        """Parameters of the model on a rank before FSDP shards them."""
        return sum(count * self.numbers(weights) for weights, count in self.shape.kinds)

    def buffer(self, weights: Iterable[Weight]) -> int:
        """Numbers of a flat buffer that is gathered or reduced: all ranks' parts, rounded up."""
        return self.own(weights) * self.shards if self.is_sharded else 0


@dataclass(frozen=True)
class _Block:
    """Bytes of one block on a rank. `casts`: its matrices in autocast's type, which stay for the backward pass unless
    they are `cast_again`; `kept` as checkpointing leaves it; `again` beside that while its backward pass runs.
    `summed`: gradients of earlier micro-batches, which go when the last one's are reduced."""

    gathered: int
    buffer: int
    casts: int
    cast_again: bool
    kept: int
    again: int
    gradients: int
    reduce: int
    own_gradients: int
    summed: int

    @property
    def casts_kept(self) -> int:
        return 0 if self.cast_again else self.casts


def peak(job: Job) -> Memory:
    """The phase of a step that needs most on the device."""
    return max(phases(job), key=lambda memory: memory.total)


def with_reserve(memory: Memory, job: Job) -> Memory:
    """The same with what a device needs beside tensors."""
    comes_and_goes = memory.gathered + memory.activations + memory.loss
    reserve = CONTEXT_BYTES + (NCCL_BYTES if job.ranks > 1 else 0) + round(FRAGMENTATION * comes_and_goes)
    return replace(memory, reserve=reserve)


def optimizer_bytes(job: Job) -> int:
    """Moments, and averages of the weights: two numbers for each parameter, one where Muon updates it."""
    averagers = job.config.optim.averagers
    copies = len(averagers.split(",")) if averagers else 0
    return job.types.stored * ((2 + copies) * job.own_numbers - job.own(muon_weights(job)))


def host_bytes(job: Job) -> int:
    """What --fsdp-cpu-offload keeps in host memory for a rank: parameters, gradients and moments."""
    if not job.config.parallel.fsdp_cpu_offload:
        return 0
    return 2 * job.own_numbers * job.types.stored + optimizer_bytes(job)


def phases(job: Job) -> Iterator[Memory]:
    """A step's memory: while the loss is computed, in each block's backward pass, in the last one, in the update."""
    offloads = job.config.parallel.fsdp_cpu_offload
    types = job.types
    resident = Memory(
        parameters=0 if offloads else job.own_numbers * types.stored,
        optimizer=0 if offloads else optimizer_bytes(job),
    )
    blocks = _blocks(job)
    root = job.shape.by_block[None]
    before = _gradients_before(job)
    gathered = job.numbers(root) * types.gathered if job.is_sharded else 0
    yield replace(
        resident,
        phase="loss",
        gathered=gathered
        + blocks[-1].buffer
        + sum(b.casts + (b.gathered if job.keeps_gathered else 0) for b in blocks),
        gradients=before,
        activations=sum(block.kept for block in blocks)
        + total_bytes(kept_at_the_end(job.shape, types), job.tokens, job.layout.tensor),
        loss=_loss_bytes(job),
    )
    # From the last block to the first; of those behind it gradients are what is left.
    fresh = _fresh_bytes(job)
    done = before + (job.numbers([_head(root)]) * fresh if job.is_sharded or not before else 0)
    kept, casts = sum(block.kept for block in blocks), sum(block.casts_kept for block in blocks)
    whole, reducing = sum(block.gathered for block in blocks), 0
    for number in reversed(range(len(blocks))):
        block, ahead = blocks[number], blocks[number - 1].buffer if number else 0  # FSDP2 gathers the next meanwhile
        kept, casts, whole = kept - block.kept, casts - block.casts_kept, whole - block.gathered
        yield replace(
            resident,
            phase=f"backward of block {number}",
            gathered=gathered + block.gathered + (whole if job.keeps_gathered else ahead) + block.casts + casts,
            gradients=done + reducing + (0 if before else block.gradients),
            activations=kept + block.kept + block.again,
        )
        reducing = block.reduce
        done += block.own_gradients - block.summed
    yield replace(
        resident,
        phase="backward of the embedding",
        gathered=gathered,
        gradients=done + reducing + job.numbers(root[:1]) * fresh,
    )
    if job.is_sharded:  # nothing is gathered any more; gradients have been added to those of earlier micro-batches
        both = {weight.name: weight for weight in (root[0], _head(root))}.values()
        others = done - job.numbers([_head(root)]) * fresh + (0 if before else job.numbers(both) * fresh)
        yield replace(resident, phase="reduction of the embedding", gradients=others + job.buffer(root) * types.reduced)
    yield replace(
        resident,
        phase="update",
        gradients=0 if offloads else job.own_numbers * types.stored,
        activations=_muon_bytes(job),
    )


def _head(root: Sequence[Weight]) -> Weight:
    """The weight that logits are made with; with tied weights the embedding."""
    return next((weight for weight in root if weight.role == "head"), root[0])


def _blocks(job: Job) -> list[_Block]:
    """All of them; equal ones are worked out once."""
    kinds = [(job.shape.has_experts(number), job.checkpointing(number)) for number in range(job.shape.n_layers)]
    made = {kind: _block(job, kinds.index(kind)) for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def _block(job: Job, number: int) -> _Block:
    shape, types, tensor = job.shape, job.types, job.layout.tensor
    weights = shape.by_block[number]
    sharded, offloads, before = job.is_sharded, job.config.parallel.fsdp_cpu_offload, _gradients_before(job)
    whole, buffer = job.numbers(weights), job.buffer(weights)
    cast = types.autocast and types.gathered != types.compute
    casts = job.numbers(w for w in weights if len(w.shape) > 1) * types.compute if cast else 0
    everything = total_bytes(kept_by_block(shape, types, number, job.layout.context), job.tokens, tensor)
    transient = total_bytes(transient_of_block(shape, types, number), job.tokens, tensor)
    mode, kept = job.checkpointing(number), everything
    if mode == "op":
        kept = total_bytes(kept_by_op(shape, types, number), job.tokens, tensor)
    elif mode == "full":
        kept = total_bytes([Kept("input", shape.dim, types.residual, "tokens")], job.tokens, tensor)
    return _Block(
        gathered=whole * types.gathered if sharded else 0,
        # A single rank has nothing to gather.
        buffer=(job.shards > 1) * (buffer * types.gathered + (job.own(weights) * types.stored if offloads else 0)),
        casts=casts,
        cast_again=mode != "none",
        kept=kept,
        again=everything - kept + transient,
        gradients=whole * _fresh_bytes(job),
        reduce=buffer * types.reduced,
        own_gradients=0 if offloads or (before and not sharded) else job.own(weights) * types.stored,
        summed=_summed(job, whole),
    )


def _gradients_before(job: Job) -> int:
    """Gradients that are there when the last micro-batch's backward pass begins: sums of earlier ones, and DDP's
    buckets, which take them in only in that pass."""
    whole = job.whole_numbers
    if job.is_sharded:  # whole ones, in the type of the reduction
        return whole * job.types.reduced if job.config.optim.accum_freq > 1 else 0
    return ((job.config.optim.accum_freq > 1) + (job.ranks > 1)) * whole * job.types.stored


def _summed(job: Job, whole: int) -> int:
    """What of these goes, for `whole` parameters, once the last micro-batch's gradients are there and reduced."""
    if job.config.optim.accum_freq == 1:
        return 0
    if job.is_sharded:
        return whole * job.types.reduced
    return whole * job.types.stored if job.ranks > 1 else 0


def _fresh_bytes(job: Job) -> int:
    """Of a gradient's number as the backward pass gives it."""
    return job.types.gathered if job.is_sharded else job.types.stored


def _loss_bytes(job: Job) -> int:
    """What linear_loss.py holds while it computes: the last chunk's logits, and all gradients that it gives."""
    types, tokens, dim = job.types, job.tokens, job.shape.dim
    rows = job.numbers([_head(job.shape.by_block[None])]) // dim
    cast = rows * dim * types.compute if types.gathered != types.compute else 0
    logits = min(CHUNK_TOKENS, tokens) * rows * (types.compute + 4)  # and in float32
    hidden = tokens * dim * (2 * types.compute + 4)  # two copies, and the gradient
    return rows * dim * 4 + cast + logits + hidden


def muon_weights(job: Job) -> list[Weight]:
    if job.config.optim.optimizer != "muon":
        return []
    return [w for w in job.shape.weights if w.block is not None and len(w.shape) > 1]


def _muon_bytes(job: Job) -> int:
    """Directions of all matrices in bfloat16, and what a rank works with: copies of its share of them while they are
    made orthogonal, and what ranks send and receive. Mirrors muon.py and matrix_shares.py."""
    weights = muon_weights(job)
    if not weights:
        return 0
    numbers = job.numbers(weights)
    held, share = numbers, 0
    if job.is_sharded:
        held = numbers // job.shards
        share = held // job.layout.replicate
    exchanged = 2 * held if job.ranks > 1 else 0
    counts: dict[tuple[int, ...], int] = {}
    for weight in weights:
        count, *sides = weight.matrices
        counts[tuple(sorted(sides))] = counts.get(tuple(sorted(sides)), 0) + count
    working = 0
    for (m, n), count in counts.items():
        together = min(-(-count // job.ranks), max(1, MUON_BATCH // (m * n)))
        working = max(working, together * (3 * m * n + 2 * m * m))
    own = 0 if job.config.parallel.fsdp_cpu_offload else job.own(weights)
    return 2 * (own + share + max(working, exchanged))
