"""A small training in any layout that goes on from the checkpoint of any other, for test_elastic.py."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_helpers import whole_state

from open_lm import checkpoint
from open_lm.checkpoint.interchange import write_interchange
from open_lm.checkpoint.sharded import ShardedWriter, StoredTensors, TrainingState, load
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import OptimConfig, ParallelConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, run_on_master
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.build import build_optimizer
from open_lm.optim.muon import Muon
from open_lm.parallel.parallelize import parallelize
from open_lm.training.step import StepOptions, train_step

ROWS, SEQ_LEN = 8, 12
# A vocabulary that no number of ranks divides, tensor parallelism and FSDP2 together neither.
SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 29, "seq_len": SEQ_LEN, "apply_qk_norm": True}
# Experts that drop nothing and are not balanced, which ranks do among their own tokens.
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4, "moe_capacity_factor": 0.0, "moe_loss_weight": 0.0}
# The settings of the model by the optimizer's name.
MODELS: dict[str, dict[str, Any]] = {"adamw": {}, "muon": {"weight_tying": True, **EXPERTS}}
AVERAGERS = "ema_0.5,poly_2"
ALONE = ParallelConfig()
FSDP = ParallelConfig(fsdp=True)
TENSOR = ParallelConfig(tensor_parallel=2)
SHARDED_TENSOR = ParallelConfig(fsdp=True, tensor_parallel=2)
CONTEXT = ParallelConfig(fsdp=True, context_parallel=2)
HYBRID = ParallelConfig(fsdp=True, mesh_dim="2,-1,1")
HYBRID_TENSOR = ParallelConfig(fsdp=True, mesh_dim="2,2,2")


class Run:
    """The live objects of a training in the layout of `cfg`, with weights that no other run has."""

    def __init__(self, cfg: ParallelConfig, optimizer: str, seed: int) -> None:
        self.runtime = init_runtime(cfg)
        self.layout: MeshLayout = build_layout(self.runtime, cfg)
        with torch.device("meta"):
            model = Transformer(Params(**SHAPE, **MODELS[optimizer]))
        trained = parallelize(
            model, self.layout, cfg, device=self.runtime.device, initialise=lambda made: init_weights(made, seed)
        )
        made = build_optimizer(trained, OptimConfig(optimizer=optimizer, lr=3e-3, wd=0.1))
        if isinstance(made, Muon):
            made._dtype = torch.float32  # what bfloat16 rounds differs by more than layouts may
        self.state = TrainingState(trained, made, averagers=ModelAverager(trained, AVERAGERS))

    def train(self, steps: range) -> list[float]:
        assert self.state.optimizer is not None and self.state.averagers is not None
        options = StepOptions(self.runtime, self.layout, get_autocast("fp32"), grad_clip_norm=1.0)
        share = ROWS // self.layout.data_size
        own = slice(self.layout.data_rank * share, (self.layout.data_rank + 1) * share)
        losses = []
        for step in steps:
            tokens = torch.randint(0, 29, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))
            inputs, targets = tokens[own, :-1].contiguous(), tokens[own, 1:].contiguous()
            result = train_step(self.state.model, inputs, targets, self.state.optimizer, options)
            self.state.averagers.step()
            losses.append(result.values["loss"].item())
        return losses

    def save(self, folder: Path) -> None:
        progress = checkpoint.Progress(epoch=1, step=1).to_json()
        self.state.extra = {"progress": progress, "name": "run"}
        ShardedWriter().save(self.state, str(folder), 1, wait=True)
        self.holds(folder)
        written_once(folder)

    def load(self, folder: Path) -> None:
        load(self.state, str(folder))
        self.holds(folder)

    def load_files(self, path: Path, folder: Path) -> None:
        """Those made of the checkpoint in `folder`."""
        assert self.state.averagers is not None
        checkpoint.load_weights(str(path), self.state.model)
        checkpoint.load_averagers(str(path), self.state.averagers)
        assert checkpoint.load_optimizer(Namespace(resume=str(path)), self.state.model, self.state.optimizer)
        self.holds(folder)

    def holds(self, folder: Path) -> None:
        """Every tensor of this run, whole, is bit for bit what the checkpoint in `folder` has stored."""
        stored, found = StoredTensors(str(folder)), whole_state(self.state)
        kinds = ("model/", "optimizer/", "averager/")
        assert set(found) == {name for name in stored.names() if name.startswith(kinds)}
        for name, value in found.items():
            assert value.dtype == stored.dtype(name) and torch.equal(value, stored.read(name)), name


def written_once(folder: Path) -> None:
    index = StoredTensors(str(folder))._index
    for name, tensor in index.tensors.items():
        expected = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        assert sum(chunk.length for chunk in tensor.chunks) == expected, name
    once = {name: tensor for name, tensor in index.tensors.items() if name not in index.aliases}
    assert sum(chunk.length for tensor in once.values() for chunk in tensor.chunks) == sum(index.files.values())
    state = [chunk for name, tensor in once.items() if not name.startswith("rng/") for chunk in tensor.chunks]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for rank in range(ranks):
        share = sum(chunk.length for chunk in state if f"rank_{rank:05d}_" in chunk.file)
        total = sum(chunk.length for chunk in state)
        assert 0.5 * total < ranks * share < 1.5 * total, "no rank writes more than its part"


# ---------------------------------------------------------------------------------------------- on one rank of several
@dataclass(frozen=True)
class Job:
    """Go on from a checkpoint (None: begin), and save another (None: do not). files: load the interchange files too."""

    cfg: ParallelConfig
    before: str | None
    steps: range
    after: str | None = None
    files: bool = False


OPTIMIZERS = ("adamw", "muon")
JOBS: dict[int, list[Job]] = {
    4: [
        Job(SHARDED_TENSOR, None, range(2), "four"),
        Job(TENSOR, "four", range(2, 4)),
        Job(CONTEXT, "four", range(2, 4)),
    ],
    2: [Job(FSDP, "four", range(2, 4)), Job(TENSOR, "four", range(2, 4)), Job(ALONE, "four", range(2, 4), "two")],
    1: [Job(ALONE, "two", range(4, 5), "one", files=True)],
    8: [Job(HYBRID, "one", range(5, 6), files=True), Job(HYBRID_TENSOR, "one", range(5, 6), "eight", files=True)],
}


def do_jobs(rank: int, folder: Path) -> None:
    """JOBS of this number of ranks; rank 0 writes the losses of each to losses_RANKS_OPTIMIZER.pt."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for optimizer in OPTIMIZERS:
        place = folder / optimizer
        losses = [do_job(job, optimizer, place) for job in JOBS[ranks]]
        if rank == 0:
            torch.save(losses, place / f"losses_{ranks}.pt")


def do_job(job: Job, optimizer: str, place: Path) -> list[float]:
    run = Run(job.cfg, optimizer, seed=2 if job.before else 1)
    if job.files:
        run.load_files(place / "epoch_1.pt", place / "four")
    if job.before:
        run.load(place / job.before)
    losses = run.train(job.steps)
    if job.after:
        run.save(place / job.after)
    if job.after == "four":
        run_on_master(lambda: write_interchange(StoredTensors(str(place / "four")), str(place), "run"))
    return losses
