"""A small model that covers difficult cases of checkpoints, and functions to train and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm.checkpoint.interchange import write_interchange
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState
from open_lm.distributed.processes import run_on_master
from open_lm.optim.averaging import ModelAverager


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 10, bias=False)
        self.out_proj = nn.Linear(10, 6, bias=False)
        self.register_buffer("inv_freq", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out_proj(torch.tanh(self.in_proj(x)))


class Net(nn.Module):
    """A small model with tied weights, sizes that are not divisible by two, and a buffer computed from the config."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.output = nn.Linear(6, 7, bias=False)
        if tied:
            self.output.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def build(seed: int, tied: bool = True) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(tied)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Train on the same batch on every rank, so that the world size does not matter; return the losses."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(
    logs: Path,
    progress: Progress,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    averagers: ModelAverager | None = None,
    scaler: Any = None,
) -> str:
    """Write the interchange files of the run logs/run from a sharded checkpoint, and return epoch_N.pt's path.

    Collective.
    """
    state = TrainingState(model, optimizer, scaler, averagers, {"progress": progress.to_json(), "name": "run"})
    sharded = str(logs / f"sharded_{progress.epoch}")
    ShardedWriter().save(state, sharded, progress.step or 0, wait=True)
    return run_on_master(lambda: write_interchange(StoredTensors(sharded), str(logs / "run" / "checkpoints"), "run"))


def shard(model: Net) -> torch.optim.Optimizer:
    """Shard the model with FSDP in place, and return its optimizer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
