"""The progress of a run, which every checkpoint contains in addition to its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Progress:
    """The progress of a run at a checkpoint.

    epoch: completed epochs. step: completed optimizer steps. samples_seen: sequences trained on.
    samples_per_source: sequences trained on by source name. seed: the seed of the data order. data_state: the loader
    state for the next sequence. A value is None if the checkpoint does not contain it.
    """

    epoch: int = 0
    step: int | None = None
    samples_seen: int | None = None
    samples_per_source: dict[str, int] | None = None
    seed: int | None = None
    global_batch_size: int | None = None
    evaluation_metrics: list[dict[str, Any]] = field(default_factory=list)
    is_final: bool = False
    percentage_of_data_seen: float = -1.0
    next_shard_per_source: list[int] | None = None
    train_data_string: list[str] | None = None
    data_state: dict[str, Any] | None = None

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Progress:
        """Create from the second result of `read_model_state`; a file of weights only has step 0 and epoch 0."""
        if "epoch" not in meta:
            return cls(epoch=0, step=0)
        known = {item.name: meta[item.name] for item in fields(cls) if item.name in meta}
        return cls(**{**known, "seed": meta.get("shard_shuffle_seed")})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Create from the result of `to_json`; ignore fields that this version does not know."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        values: dict[str, Any] = plain(asdict(self))
        return values

    def common_entries(self, name: str) -> dict[str, Any]:
        """Return the entries that all interchange files of the run `name` contain."""
        return {"epoch": self.epoch, "name": name, "evaluation_metrics": plain(self.evaluation_metrics)}

    def shared_entries(self) -> dict[str, Any]:
        """Return the known entries that both epoch_N.pt and stats_N.pt contain."""
        entries = {
            "next_shard_per_source": self.next_shard_per_source,
            "samples_seen": self.samples_seen,
            "samples_per_source": self.samples_per_source,
            "step": self.step,
            "shard_shuffle_seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "data_state": self.data_state,
        }
        return {key: plain(value) for key, value in entries.items() if value is not None}


def plain(value: Any) -> Any:
    """Convert numpy scalars in `value` to Python numbers, which JSON and torch.load(weights_only=True) accept."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if not isinstance(value, torch.Tensor) and hasattr(value, "item") and hasattr(value, "dtype"):
        return value.item()
    return value
