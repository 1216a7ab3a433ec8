"""A small training run in any layout that resumes from the checkpoint of any other layout, for test_elastic.py."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_helpers import full_state

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
# The vocabulary is not divisible by any number of ranks, also not with tensor parallelism and FSDP2 together.
SHAPE = {"dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 29, "seq_len": SEQ_LEN, "apply_qk_norm": True}
# Dropping and balancing experts depends on each rank's tokens, so both are off.
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4, "moe_capacity_factor": 0.0, "moe_loss_weight": 0.0}
MUP = {"mup": True, "mup_base_width": 12}  # several groups of parameters with other learning rates
# Additional model settings by the optimizer's name.
MODELS: dict[str, dict[str, Any]] = {"adamw": {}, "muon": {"weight_tying": True, **MUP, **EXPERTS}}
AVERAGERS = "ema_0.5,poly_2"
SINGLE = ParallelConfig()
FSDP = ParallelConfig(fsdp=True)
TENSOR = ParallelConfig(tensor_parallel=2)
TENSOR_FSDP = ParallelConfig(fsdp=True, tensor_parallel=2)
CONTEXT = ParallelConfig(fsdp=True, context_parallel=2)
HYBRID = ParallelConfig(fsdp=True, mesh_dim="2,-1,1")
HYBRID_TENSOR = ParallelConfig(fsdp=True, mesh_dim="2,2,2")
EXPERT = ParallelConfig(fsdp=True, expert_parallel=2)
HYBRID_EXPERT = ParallelConfig(fsdp=True, mesh_dim="2,-1,1", expert_parallel=4)


class Run:
    """The live objects of a training run in the layout of `cfg`; the initial weights depend on `seed`."""

    def __init__(self, cfg: ParallelConfig, optimizer: str, seed: int) -> None:
        self.runtime = init_runtime(cfg)
        self.layout: MeshLayout = build_layout(self.runtime, cfg)
        with torch.device("meta"):
            model = Transformer(Params(**SHAPE, **MODELS[optimizer]))
        parallel_model = parallelize(
            model, self.layout, cfg, device=self.runtime.device, initialise=lambda module: init_weights(module, seed)
        )
        built = build_optimizer(parallel_model, OptimConfig(optimizer=optimizer, lr=3e-3, wd=0.1))
        if isinstance(built, Muon):
            built._dtype = torch.float32  # bfloat16 rounding would exceed the test's tolerance between layouts
        self.state = TrainingState(parallel_model, built, averagers=ModelAverager(parallel_model, AVERAGERS))

    def train(self, steps: range) -> list[float]:
        """Train on this rank's part of each batch, and return the losses."""
        assert self.state.optimizer is not None and self.state.averagers is not None
        options = StepOptions(self.runtime, self.layout, get_autocast("fp32"), grad_clip_norm=1.0)
        num_rows = ROWS // self.layout.data_size
        rows = slice(self.layout.data_rank * num_rows, (self.layout.data_rank + 1) * num_rows)
        losses = []
        for step in steps:
            tokens = torch.randint(0, 29, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))
            inputs, targets = tokens[rows, :-1].contiguous(), tokens[rows, 1:].contiguous()
            result = train_step(self.state.model, inputs, targets, self.state.optimizer, options)
            self.state.averagers.step()
            losses.append(result.values["loss"].item())
        return losses

    def save(self, folder: Path) -> None:
        progress = checkpoint.Progress(epoch=1, step=1).to_json()
        self.state.extra = {"progress": progress, "name": "run"}
        ShardedWriter().save(self.state, str(folder), 1, wait=True)
        self.check_equal(folder)
        check_written_once(folder)

    def load(self, folder: Path) -> None:
        load(self.state, str(folder))
        self.check_equal(folder)

    def load_files(self, path: Path, folder: Path) -> None:
        """Load the interchange files `path` of the sharded checkpoint in `folder`."""
        assert self.state.averagers is not None
        checkpoint.load_weights(str(path), self.state.model)
        checkpoint.load_averagers(str(path), self.state.averagers)
        assert checkpoint.load_optimizer(Namespace(resume=str(path)), self.state.model, self.state.optimizer)
        self.check_equal(folder)

    def check_equal(self, folder: Path) -> None:
        """Check that every full tensor of this run equals the one in the checkpoint, bit for bit."""
        stored, state = StoredTensors(str(folder)), full_state(self.state)
        kinds = ("model/", "optimizer/", "averager/")
        assert set(state) == {name for name in stored.names() if name.startswith(kinds)}
        for name, value in state.items():
            assert value.dtype == stored.dtype(name) and torch.equal(value, stored.read(name)), name


def check_written_once(folder: Path) -> None:
    """Check that every byte of a checkpoint is stored once, and that the ranks wrote similar amounts."""
    index = StoredTensors(str(folder))._index
    for name, tensor in index.tensors.items():
        expected = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        assert sum(chunk.length for chunk in tensor.chunks) == expected, name
    unaliased = {name: tensor for name, tensor in index.tensors.items() if name not in index.aliases}
    assert sum(chunk.length for tensor in unaliased.values() for chunk in tensor.chunks) == sum(index.files.values())
    state = [chunk for name, tensor in unaliased.items() if not name.startswith("rng/") for chunk in tensor.chunks]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for rank in range(ranks):
        rank_bytes = sum(chunk.length for chunk in state if f"rank_{rank:05d}_" in chunk.file)
        total_bytes = sum(chunk.length for chunk in state)
        assert 0.5 * total_bytes < ranks * rank_bytes < 1.5 * total_bytes, "each rank writes about 1/n"


# ---------------------------------------------------------------------------------------------- jobs of each rank
@dataclass(frozen=True)
class Job:
    """Resume from the checkpoint `before` (None: start a new run), train `steps`, and save `after` (None: do not).

    files: load the interchange files too.
    """

    cfg: ParallelConfig
    before: str | None
    steps: range
    after: str | None = None
    files: bool = False


OPTIMIZERS = ("adamw", "muon")
JOBS: dict[int, list[Job]] = {
    4: [
        Job(TENSOR_FSDP, None, range(2), "four"),
        Job(TENSOR, "four", range(2, 4)),
        Job(CONTEXT, "four", range(2, 4)),
        Job(EXPERT, "four", range(2, 4), "experts"),
    ],
    2: [
        Job(FSDP, "experts", range(4, 5)),
        Job(EXPERT, "experts", range(4, 5)),
        Job(FSDP, "four", range(2, 4)),
        Job(TENSOR, "four", range(2, 4)),
        Job(SINGLE, "four", range(2, 4), "two"),
    ],
    1: [Job(SINGLE, "two", range(4, 5), "one", files=True)],
    8: [
        Job(HYBRID, "one", range(5, 6), files=True),
        Job(HYBRID_EXPERT, "one", range(5, 6), files=True),
        Job(HYBRID_TENSOR, "one", range(5, 6), "eight", files=True),
    ],
}


def do_jobs(rank: int, folder: Path) -> None:
    """Run the JOBS of this world size for each optimizer; rank 0 writes their losses to OPTIMIZER/losses_RANKS.pt."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for optimizer in OPTIMIZERS:
        optimizer_folder = folder / optimizer
        losses = [do_job(job, optimizer, optimizer_folder) for job in JOBS[ranks]]
        if rank == 0:
            torch.save(losses, optimizer_folder / f"losses_{ranks}.pt")


def do_job(job: Job, optimizer: str, folder: Path) -> list[float]:
    run = Run(job.cfg, optimizer, seed=2 if job.before else 1)
    if job.files:
        run.load_files(folder / "epoch_1.pt", folder / "four")
    if job.before:
        run.load(folder / job.before)
    losses = run.train(job.steps)
    if job.after:
        run.save(folder / job.after)
    if job.after == "four":
        run_on_master(lambda: write_interchange(StoredTensors(str(folder / "four")), str(folder), "run"))
    return losses
