"""A planned training run: the sizes that follow from the model, its configuration and the layout of the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from open_lm.config.layout import MeshLayout, expert_shard_dim
from open_lm.config.sections import Config
from open_lm.planner.activations import ElementSizes, element_sizes
from open_lm.planner.adapters import QUANTIZED_BITS, is_quantized, trained_weights
from open_lm.planner.shapes import ModelShape, Weight


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

    @property
    def reductions(self) -> int:
        """The number of reduce-scatters of each gradient in a step."""
        return self.config.optim.accum_freq if self.config.parallel.reduces_every_micro_batch else 1

    @cached_property
    def outer_groups(self) -> tuple[tuple[Weight, ...], ...]:
        """The groups in which FSDP2 gathers the parameters outside of the blocks: the embedding, and the last norm with
        the head; a single one where weights are tied or no other rank exists.
        """
        outer = self.shape.by_block[None]
        is_split = any(weight.role == "head" for weight in outer) and self.ranks > self.layout.tensor
        return (outer[:1], outer[1:]) if is_split else (outer,)

    def checkpointing(self, block: int) -> str:
        """Return how --activation-checkpointing treats a block: "none", "full", "op" or "half-op"."""
        model = self.config.model
        mode = "full" if model.grad_checkpointing else model.activation_checkpointing
        if mode.isdigit():
            return "full" if block % int(mode) == 0 else "none"
        return mode

    def unsharded_numel(self, weights: Iterable[Weight]) -> int:
        """Return the elements of `weights` on a rank before FSDP shards them."""
        return sum(math.prod(self._unsharded_shape(weight)) for weight in weights)

    def local_numel(self, weights: Iterable[Weight]) -> int:
        """Return the elements of `weights` in a rank's local shards: its rows of each weight, rounded up."""
        return sum(self._local_size(weight) for weight in weights)

    def shards_of(self, weight: Weight) -> int:
        """Return the number of ranks over which FSDP shards a weight; fewer for experts with expert parallelism."""
        return self.shards // self.layout.expert if weight.role == "expert" else self.shards

    def _unsharded_shape(self, weight: Weight) -> tuple[int, ...]:
        return weight.local_shape(self.layout.tensor, self.layout.expert)

    def _local_size(self, weight: Weight) -> int:
        """Return the elements of a rank's shard of a weight. Mirrors parallel.expert_parallel.expert_placements."""
        shape, shards = self._unsharded_shape(weight), self.shards_of(weight)
        dim = expert_shard_dim(shape, shards) if weight.role == "expert" and self.layout.tensor == 1 else 0
        return -(-shape[dim] // shards) * (math.prod(shape) // shape[dim])

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
        return sum(self._local_size(weight) * self.shards_of(weight) for weight in weights) if self.is_sharded else 0
