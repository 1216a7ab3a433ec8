"""Predict the communication between ranks in a step, and the time of a step.

Bytes are what a rank sends over its links in ring algorithms (Patarasuk & Yuan 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002): (n-1)/n of the buffer for an all-gather or reduce-scatter, and twice that
for an all-reduce. FSDP2 and DDP overlap their collectives with computation. The collectives of tensor and context
parallelism are not overlapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from open_lm.planner.activations import expert_slots, products
from open_lm.planner.memory import host_bytes
from open_lm.planner.muon import muon_flops, muon_weights
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import ModelShape, Weight

# Typical values that the planner does not measure: the latency of a ring step, and for each device the bandwidth of the
# link to the host and of host memory.
RING_STEP_S = 3e-6
HOST_LINK_BYTES_PER_S = 25e9
HOST_MEMORY_BYTES_PER_S = 20e9
UPDATE_BYTES = 28  # per parameter: AdamW reads value, gradient and two moments, and writes three of them
ADDITION_BYTES = 12  # per parameter: gradients of a micro-batch are added to those of earlier ones
DDP_BUCKET_BYTES = 25 << 20
# The time of a recomputed forward pass as a share of what its FLOPs take at the MFU, which also pays for the optimizer.
# From two published runs that differ only in recomputation: Llama 2 13B on 64 A100 reaches 2,162 tokens/s without, and
# 1,914 with recomputation of every second block (tests/planner/published_runs.json).
RECOMPUTE_FRACTION = 0.8
OP_RECOMPUTE_FRACTION = 0.15  # of the operators between matrix products and attention

# The pass whose computation hides a collective; "last" is the backward pass of the last micro-batch.
Overlap = Literal["forward", "backward", "last", "none"]


@dataclass(frozen=True)
class Rates:
    """The speed of devices and links.

    Attributes:
        matmul_flops: FLOP/s of a device's matrix products.
        mfu: the share of `matmul_flops` that a step on one device reaches without recomputation and communication.
        intra: bytes/s of a device inside its node.
        inter: bytes/s of a node to other nodes.
        per_node: devices per node.
    """

    matmul_flops: float
    mfu: float
    intra: float
    inter: float
    per_node: int = 8

    def bandwidth(self, group: int, stride: int) -> float:
        """Return the bytes/s of each rank when all groups of `group` ranks that are `stride` apart communicate."""
        inside = max(1, self.per_node // stride)
        return self.intra if group <= inside else min(self.intra, self.inter * inside / self.per_node)

    def direct_bandwidth(self, group: int, stride: int) -> float:
        """Return the bytes/s of each rank when it sends the same amount to every other rank of its group.

        All devices of a node share its links to other nodes, over which a rank sends to all ranks outside of its node.
        """
        inside = max(1, self.per_node // stride)
        if group <= inside:
            return self.intra
        outside = (group - inside) / (group - 1)
        return 1 / max(outside * self.per_node / self.inter, (1 - outside) / self.intra)


@dataclass(frozen=True)
class Collective:
    """A kind of collective of a step.

    Attributes:
        name: what it exchanges.
        num_bytes: bytes that a rank sends in a step.
        calls: number of collectives in a step.
        group: number of participating ranks.
        stride: distance between neighboring ranks of the group.
        overlap: the pass whose computation overlaps it.
        exposed: the share that cannot overlap with computation.
        direct: whether each rank sends to every other rank (all-to-all), instead of to its neighbor in a ring.
    """

    name: str
    num_bytes: float
    calls: float
    group: int
    stride: int
    overlap: Overlap
    exposed: float = 0.0
    direct: bool = False

    def seconds(self, rates: Rates) -> float:
        """Return the seconds that these collectives take in a step."""
        if self.direct:
            return self.num_bytes / rates.direct_bandwidth(self.group, self.stride) + self.calls * RING_STEP_S
        return self.num_bytes / rates.bandwidth(self.group, self.stride) + self.calls * (self.group - 1) * RING_STEP_S


@dataclass(frozen=True)
class StepTime:
    """The time of a step.

    Attributes:
        compute_s: computation, including recomputation.
        exchange_s: communication.
        exposed_s: the part of `exchange_s` that does not overlap with computation.
        host_s: the update in host memory.
        muon_s: the orthogonalization of Muon's updates.
        num_bytes: bytes that a rank sends.
        tokens: tokens of the step on all ranks.
    """

    compute_s: float
    exchange_s: float
    exposed_s: float
    host_s: float
    num_bytes: float
    tokens: int
    muon_s: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        return self.compute_s + self.exposed_s + self.host_s + self.muon_s

    @property
    def tokens_per_s(self) -> float:
        """The tokens per second of all ranks."""
        return self.tokens / self.seconds

    @property
    def efficiency(self) -> float:
        """The share of the step that computes."""
        return self.compute_s / self.seconds


def recomputed_fraction(setup: TrainingSetup) -> float:
    """Return the time of recomputation as a share of the forward pass."""
    blocks = range(setup.shape.n_layers)
    share = sum(_recomputed_fraction_of_block(setup.shape, block, setup.checkpointing(block)) for block in blocks)
    head = 6.0 * setup.shape.vocab_size * setup.shape.dim / setup.shape.flops_per_token
    return share / len(blocks) * (1 - head)


def _recomputed_fraction_of_block(shape: ModelShape, block: int, mode: str) -> float:
    if mode in ("none", "full"):
        return RECOMPUTE_FRACTION if mode == "full" else 0.0
    if mode == "op":
        return OP_RECOMPUTE_FRACTION
    counts = [product.multiplications for product in products(shape, block)]
    attention = shape.attention_flops_per_token / 6 / shape.n_layers
    again = sum(counts[1:-1:2])  # nothing needs the result of the last product
    return OP_RECOMPUTE_FRACTION + (RECOMPUTE_FRACTION - OP_RECOMPUTE_FRACTION) * again / (sum(counts) + attention)


def step_time(setup: TrainingSetup, rates: Rates) -> StepTime:
    """Return the time of a step with all its micro-batches."""
    micro_batches, layout = setup.config.optim.accum_freq, setup.layout
    flops = setup.shape.flops_per_token * setup.tokens * micro_batches / layout.tensor
    model_s = flops / (rates.matmul_flops * rates.mfu)
    recomputation = recomputed_fraction(setup) / 3
    forward_s, backward_s = model_s / 3, model_s * (2 / 3 + recomputation)
    sums: dict[Overlap, float] = {"forward": 0.0, "backward": 0.0, "last": 0.0, "none": 0.0}
    exposed = 0.0
    all_collectives = collectives(setup)
    for collective in all_collectives:
        seconds = collective.seconds(rates)
        sums[collective.overlap] += seconds * (1 - collective.exposed)
        exposed += seconds * collective.exposed
    exchange_s = exposed + sum(sums.values())
    exposed += sums["none"] + max(0.0, sums["forward"] - forward_s)
    spare = (backward_s - sums["backward"]) / micro_batches  # time of a backward pass that hides no collective yet
    exposed += (micro_batches - 1) * max(0.0, -spare) + max(0.0, sums["last"] - spare)
    host_s = 0.0
    if host_bytes(setup):
        update_s = UPDATE_BYTES / HOST_MEMORY_BYTES_PER_S
        update_s += (setup.reductions - 1) * ADDITION_BYTES / HOST_MEMORY_BYTES_PER_S
        transfer_s = (2 * micro_batches + setup.reductions) * setup.sizes.stored / HOST_LINK_BYTES_PER_S
        host_s = setup.local_numel(setup.shape.weights) * (update_s + transfer_s)
    return StepTime(
        compute_s=model_s * (1 + recomputation),
        exchange_s=exchange_s,
        exposed_s=exposed,
        host_s=host_s,
        num_bytes=sum(collective.num_bytes for collective in all_collectives),
        tokens=setup.batch * micro_batches * layout.data_size * setup.shape.seq_len,
        muon_s=muon_flops(setup) / (rates.matmul_flops * rates.mfu),
    )


def collectives(setup: TrainingSetup) -> list[Collective]:
    """Return the collectives of a rank in a step."""
    candidates = [*_parameter_collectives(setup), *_activation_collectives(setup)]
    return [collective for collective in candidates if collective.group > 1]


def _parameter_collectives(setup: TrainingSetup) -> list[Collective]:
    layout, sizes = setup.layout, setup.sizes
    shards, stride = setup.shards, layout.tensor
    if not setup.is_sharded:
        num_bytes = setup.unsharded_trained * sizes.stored
        last_bucket = min(1.0, DDP_BUCKET_BYTES / num_bytes)
        calls = num_bytes / DDP_BUCKET_BYTES
        sent = 2 * _ring_fraction(setup.ranks) * num_bytes
        return [
            Collective("all-reduce gradients", sent, calls, setup.ranks, 1, "last", last_bucket),
            *_muon_collectives(setup, 1, setup.ranks, 1),
        ]
    return [*_sharding_collectives(setup), *_muon_collectives(setup, shards, layout.replicate, stride)]


def _sharding_collectives(setup: TrainingSetup) -> list[Collective]:
    """Return the collectives of FSDP2. With expert parallelism, the experts have separate groups and ranks."""
    layout, shape = setup.layout, setup.shape
    outer = list(setup.outer_groups)
    blocks = [shape.by_block[number] for number in range(shape.n_layers)]
    if layout.expert == 1:
        return _group_collectives(setup, outer, blocks, setup.shards, layout.tensor)
    experts = [[weight for weight in weights if weight.role == "expert"] for weights in blocks]
    others = [[weight for weight in weights if weight.role != "expert"] for weights in blocks]
    divided = _group_collectives(setup, [], [group for group in experts if group], layout.expert_shard_ranks,
                                 layout.expert)  # fmt: skip
    named = [replace(collective, name=f"{collective.name} (experts)") for collective in divided]
    return [*_group_collectives(setup, outer, others, setup.shards, layout.tensor), *named]


def _group_collectives(
    setup: TrainingSetup,
    outer: Sequence[Sequence[Weight]],
    blocks: Sequence[Sequence[Weight]],
    shards: int,
    stride: int,
) -> list[Collective]:
    """Return the collectives of FSDP2's groups outside of the blocks and in the blocks, over `shards` ranks."""
    sizes, micro_batches, replicas = setup.sizes, setup.config.optim.accum_freq, setup.layout.replicate
    groups = [*outer, *blocks]
    gathered = [setup.buffer_numel(weights) for weights in groups]
    reduced = [setup.buffer_numel(setup.trained(weights)) for weights in groups]
    sent = _ring_fraction(shards)
    # The first group is gathered first and reduced last, so that no computation overlaps it.
    gather_exposed = gathered[0] / sum(gathered) if outer else 0.0
    reduce_exposed = reduced[0] / sum(reduced) if outer else 0.0
    # The last block and what is outside of the blocks are not gathered again.
    regathers = 0 if setup.keeps_unsharded else micro_batches
    regathered = sum(gathered[len(outer) : -1]) * regathers
    reductions = setup.reductions
    overlap: Overlap = "last" if reductions == 1 else "backward"
    return [
        Collective("all-gather, forward", sent * sum(gathered) * sizes.gathered * micro_batches,
                   len(groups) * micro_batches, shards, stride, "forward", gather_exposed),
        Collective("all-gather, backward", sent * regathered * sizes.gathered, (len(blocks) - 1) * regathers, shards,
                   stride, "backward"),
        Collective("reduce-scatter gradients", sent * sum(reduced) * sizes.reduced * reductions,
                   len(groups) * reductions, shards, stride, overlap, reduce_exposed),
        Collective("all-reduce over replicas", 2 * _ring_fraction(replicas) * sum(reduced) / shards * sizes.reduced,
                   len(groups), replicas, setup.layout.tensor * setup.shards, "last", reduce_exposed),
    ]  # fmt: skip


def _muon_collectives(setup: TrainingSetup, shards: int, replicas: int, stride: int) -> list[Collective]:
    """Return Muon's collectives: directions go to the ranks that orthogonalize them, and the results to all ranks.

    Each replica orthogonalizes its share of the matrices.
    """
    local_bytes, ranks = 2 * setup.local_numel(muon_weights(setup)), shards * replicas
    if not local_bytes:
        return []
    return [
        Collective("gather for Muon", local_bytes / replicas * _ring_fraction(shards), 1, shards, stride, "none"),
        Collective("updates of Muon", local_bytes * _ring_fraction(ranks), 1, ranks, stride, "none"),
    ]


def _activation_collectives(setup: TrainingSetup) -> list[Collective]:
    """Return the collectives of tensor, context and expert parallelism.

    Tensor parallelism gathers tokens and reduce-scatters sums twice per block and pass. Context parallelism gathers
    keys and values and reduce-scatters their gradients. Recomputed blocks repeat their collectives. Expert parallelism
    sends the slots of a mixture's experts there and back in each pass; only full recomputation repeats that.
    """
    layout, c, micro_batches = setup.layout, setup.sizes.compute, setup.config.optim.accum_freq
    blocks = setup.shape.n_layers
    recomputed = sum(setup.checkpointing(block) != "none" for block in range(blocks))
    passes = (2 * blocks + recomputed) * micro_batches
    tokens = setup.tokens * setup.shape.dim * c * _ring_fraction(layout.tensor)
    keys = setup.tokens * 2 * setup.shape.kv_width // layout.tensor * c * (layout.context - 1)
    return [
        Collective("tokens (tensor)", 4 * tokens * passes, 4 * passes, layout.tensor, 1, "none"),
        Collective("keys, values (context)", keys * passes, passes, layout.context, layout.tensor, "none"),
        *_expert_collectives(setup),
    ]


def _expert_collectives(setup: TrainingSetup) -> list[Collective]:
    layout, shape = setup.layout, setup.shape
    if layout.expert == 1:
        return []
    mixtures = [block for block in range(shape.n_layers) if shape.has_experts(block)]
    recomputed = sum(setup.checkpointing(block) == "full" for block in mixtures)
    exchanges = 2 * (2 * len(mixtures) + recomputed) * setup.config.optim.accum_freq
    slots = setup.tokens * expert_slots(shape) * shape.dim * setup.sizes.compute
    sent = slots * _ring_fraction(layout.expert) * exchanges
    return [Collective("tokens (experts)", sent, exchanges, layout.expert, 1, "none", direct=True)]


def _ring_fraction(ranks: int) -> float:
    """Return the share of a buffer that a rank sends in an all-gather or reduce-scatter."""
    return (ranks - 1) / ranks
