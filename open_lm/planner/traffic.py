"""What a step's ranks exchange, and how long the step takes.

Bytes are what a rank sends over its links in ring algorithms (Patarasuk & Yuan 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002): (n-1)/n of a gathered or scattered buffer, twice that of a summed one.
FSDP2 and DDP exchange parameters and gradients while others are computed with; what tensor and context parallelism
exchange is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_lm.planner.memory import Job, host_bytes, muon_weights

# Usual sizes, not measured by the planner: a step of a ring, the link to the host, and its memory, for each device.
HOP_S = 3e-6
HOST_LINK = 25e9
HOST_MEMORY = 20e9
UPDATE_BYTES = 28  # that AdamW reads and writes for a parameter: value, gradient and two moments, three written
BUCKET_BYTES = 25 << 20  # of DDP
OP_SHARE = 0.15  # of a block's forward time, that goes into what --activation-checkpointing op computes again

Overlap = Literal["forward", "backward", "none"]


@dataclass(frozen=True)
class Rates:
    """matmul_flops: FLOP/s of a device's matrix products. mfu: which share of them a step on one device reaches,
    without recomputation and exchange. intra, inter: bytes/s of a device inside its node, of a node to others."""

    matmul_flops: float
    mfu: float
    intra: float
    inter: float
    per_node: int = 8

    def bandwidth(self, group: int, stride: int) -> float:
        """Bytes/s that a rank of a group has whose members are `stride` ranks apart, all such groups at work."""
        inside = max(1, self.per_node // stride)
        return self.intra if group <= inside else min(self.intra, self.inter * inside / self.per_node)


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends in a step, in so many collectives over `group` ranks that are `stride` apart. `exposed`:
    which share cannot be hidden behind what is computed in the forward or backward pass."""

    name: str
    num_bytes: float
    calls: float
    group: int
    stride: int
    overlap: Overlap
    exposed: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return self.num_bytes / rates.bandwidth(self.group, self.stride) + self.calls * (self.group - 1) * HOP_S


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. `exposed_s`: of `exchange_s` what nothing hides; `host_s`: the update in host memory."""

    compute_s: float
    exchange_s: float
    exposed_s: float
    host_s: float
    num_bytes: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.host_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def efficiency(self) -> float:
        """Which share of the step is computing."""
        return self.compute_s / self.seconds


def recomputed(job: Job) -> float:
    """Which share of the forward pass's time is spent twice."""
    modes = [job.checkpointing(block) for block in range(job.shape.n_layers)]
    share = (modes.count("full") + OP_SHARE * modes.count("op")) / len(modes)
    head = 6.0 * job.shape.vocab_size * job.shape.dim / job.shape.flops_per_token
    return share * (1 - head)


def step_time(job: Job, rates: Rates) -> StepTime:
    """How long a step takes, of all micro-batches."""
    accumulated, layout = job.config.optim.accum_freq, job.layout
    flops = job.shape.flops_per_token * job.tokens * accumulated / layout.tensor
    model_s = flops / (rates.matmul_flops * rates.mfu)
    again = recomputed(job) / 3
    passes = {"forward": model_s / 3, "backward": model_s * (2 / 3 + again), "none": 0.0}
    sums = dict.fromkeys(passes, 0.0)
    exposed = 0.0
    exchanged = exchanges(job)
    for exchange in exchanged:
        seconds = exchange.seconds(rates)
        sums[exchange.overlap] += seconds * (1 - exchange.exposed)
        exposed += seconds * exchange.exposed
    exchange_s = exposed + sum(sums.values())
    exposed += sum(max(0.0, seconds - passes[overlap]) for overlap, seconds in sums.items())
    host_s = 0.0
    if host_bytes(job):
        own = job.own(job.shape.weights)
        host_s = own * (UPDATE_BYTES / HOST_MEMORY + 3 * accumulated * job.types.stored / HOST_LINK)
    rows = job.batch * accumulated * layout.data_size
    num_bytes = sum(exchange.num_bytes for exchange in exchanged)
    return StepTime(model_s * (1 + again), exchange_s, exposed, host_s, num_bytes, rows * job.shape.seq_len)


def exchanges(job: Job) -> list[Exchange]:
    """All that a rank takes part in, in a step."""
    found = [*_of_parameters(job), *_of_activations(job)]
    return [exchange for exchange in found if exchange.group > 1]


def _of_parameters(job: Job) -> list[Exchange]:
    layout, types = job.layout, job.types
    accumulated, blocks = job.config.optim.accum_freq, job.shape.n_layers
    shards, stride = job.shards, layout.tensor
    if not job.is_sharded:
        num_bytes = job.whole_numbers * types.stored
        last = min(1.0, BUCKET_BYTES / num_bytes)
        calls = num_bytes / BUCKET_BYTES
        return [
            Exchange("sum gradients", 2 * _share(job.ranks) * num_bytes, calls, job.ranks, 1, "backward", last),
            *_of_muon(job, 1, job.ranks, 1),
        ]
    of_root = job.buffer(job.shape.by_block[None]) * _share(shards)
    whole = job.own_numbers * shards * _share(shards)
    of_blocks = whole - of_root
    root = of_root / whole if whole else 0.0  # first to be gathered and last to be reduced: nothing hides it
    again = 0 if job.keeps_gathered else accumulated
    copies = layout.replicate
    return [
        Exchange("gather, forward", whole * types.gathered * accumulated, (blocks + 1) * accumulated, shards, stride,
                 "forward", root),
        Exchange("gather, backward", of_blocks * types.gathered * again, blocks * again, shards, stride, "backward"),
        Exchange("reduce gradients", whole * types.reduced, blocks + 1, shards, stride, "backward", root),
        Exchange("sum over copies", 2 * _share(copies) * job.own_numbers * types.reduced, blocks + 1, copies,
                 stride * shards, "backward", root),
        *_of_muon(job, shards, copies, stride),
    ]  # fmt: skip


def _of_muon(job: Job, shards: int, copies: int, stride: int) -> list[Exchange]:
    """Muon's directions go to who works on them, of a copy for its share of the matrices, and come back to all."""
    numbers = job.numbers(muon_weights(job))
    if not numbers:
        return []
    own, ranks = 2 * numbers / shards, shards * copies
    return [
        Exchange("gather for Muon", own / copies * _share(shards), 1, shards, stride, "none"),
        Exchange("updates of Muon", own * _share(ranks), 1, ranks, stride, "none"),
    ]


def _of_activations(job: Job) -> list[Exchange]:
    """Twice a block and pass tensor parallelism gathers tokens and scatters sums; context parallelism gathers keys and
    values and scatters their gradients. What is recomputed exchanges again."""
    layout, c, accumulated = job.layout, job.types.compute, job.config.optim.accum_freq
    blocks = job.shape.n_layers
    full = sum(job.checkpointing(block) != "none" for block in range(blocks))
    passes = (2 * blocks + full) * accumulated
    tokens = job.tokens * job.shape.dim * c * _share(layout.tensor)
    keys = job.tokens * 2 * job.shape.width // layout.tensor * c * (layout.context - 1)
    return [
        Exchange("tokens (tensor)", 4 * tokens * passes, 4 * passes, layout.tensor, 1, "none"),
        Exchange("keys, values (context)", keys * passes, passes, layout.context, layout.tensor, "none"),
    ]


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
