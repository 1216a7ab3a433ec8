"""What each way to start does to each part of a run's state, as one table with a test for each cell."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_shard, write_source

from open_lm.checkpoint.sharded import StoredTensors, TrainingState, _tensors
from open_lm.distributed.rng import rng_state, rng_state_to_tensors
from open_lm.main import main
from open_lm.training import run as run_module
from open_lm.training.build import RunParts
from open_lm.training.run import Training
from open_lm.training.trainer import Trainer

BATCH = 4
PARTS = ("model", "optimizer", "scaler", "schedule", "averagers", "guard", "data", "rng", "metrics")
# new: as in a run from scratch. saved: as in the checkpoint. weights: the averages equal the loaded weights.
# mean: the mean of both checkpoints. no losses: as saved, without the usual level of the loss. start: the beginning of
# the other data. later: behind the spike. -: an evaluation has no such part.
TABLE = {
    #                      model    optimizer scaler   schedule averagers  guard        data     rng      metrics
    "new":                ("new",   "new",   "new",   "new",   "new",     "new",       "new",   "new",   "new"),
    "pretrained":         ("saved", "new",   "new",   "new",   "weights", "new",       "new",   "new",   "new"),
    "average":            ("mean",  "new",   "new",   "new",   "weights", "new",       "new",   "new",   "new"),
    "pretrained state":   ("saved", "saved", "saved", "saved", "saved",   "saved",     "saved", "saved", "saved"),
    "... of other data":  ("saved", "saved", "saved", "saved", "saved",   "no losses", "start", "saved", "saved"),
    "resume sharded":     ("saved", "saved", "saved", "saved", "saved",   "saved",     "saved", "saved", "saved"),
    "resume interchange": ("saved", "saved", "saved", "saved", "saved",   "new",       "saved", "saved", "saved"),
    "... no averages":    ("saved", "saved", "saved", "saved", "weights", "new",       "saved", "saved", "saved"),
    "evaluate":           ("saved", "-",     "-",     "-",     "saved",   "-",         "-",     "-",     "-"),
    "restart":            ("saved", "saved", "saved", "saved", "saved",   "saved",     "saved", "saved", "saved"),
    "restart, --resume":  ("saved", "saved", "saved", "saved", "saved",   "saved",     "saved", "saved", "saved"),
    "rollback":           ("saved", "saved", "saved", "saved", "saved",   "saved",     "later", "saved", "saved"),
}  # fmt: skip
CELLS = [(way, part, cell) for way, row in TABLE.items() for part, cell in zip(PARTS, row, strict=True)]
State = dict[str, Any]


class Observed(Exception):
    """Ends a run whose state was observed."""


# --- states ----------------------------------------------------------------------------------------------------------
def live_state(parts: RunParts, trainer: Trainer | None) -> State:
    """Copy the parts of the state of a live run."""
    state = TrainingState(parts.model, averagers=parts.averagers)
    found: State = {}
    if trainer is not None:
        state.optimizer, scaler, kept = trainer.optimizer, trainer.scaler, trainer.state()
        assert scaler is not None
        kept["samples_per_source"] = {name: number for name, number in kept["samples_per_source"].items() if number}
        found = {
            "scaler": scaler.state_dict(),
            "schedule": trainer.step,
            "guard": kept.pop("guard"),
            "data": trainer.loader.state,
            "rng": rng_state_to_tensors(rng_state()),
            "metrics": kept,
        }
        assert trainer.scheduler(trainer.step) == trainer.optimizer.param_groups[0]["lr"]
    tensors = {name: value.detach().clone() for name, value in _tensors(state)[0].items()}
    averagers = {} if parts.averagers is None else parts.averagers.avgs_dict
    return {**found, **_by_part(tensors, {name: averager.counters() for name, averager in averagers.items()})}


def stored_state(folder: Path) -> State:
    """Read the parts of the state of a sharded checkpoint."""
    stored = StoredTensors(str(folder))
    extra = stored.extra
    tensors = {name: stored.read(name) for name in stored.names("")}
    kept = dict(extra["trainer"])
    return {
        "scaler": extra["scaler"],
        "schedule": stored.step,
        "guard": kept.pop("guard"),
        "data": extra["progress"]["data_state"],
        "rng": {name.rpartition("/")[2]: value for name, value in tensors.items() if name.startswith("rng/0/")},
        "metrics": kept,
        **_by_part(tensors, extra["averagers"]),
    }


def _by_part(tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> State:
    prefixes = {"model": "model/", "optimizer": "optimizer/", "averagers": "averager/"}
    state: State = {
        part: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    state["averagers"]["counters"] = counters
    return state


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    return bool(first == second)


# --- runs ------------------------------------------------------------------------------------------------------------
def observe(flags: list[str], patches: pytest.MonkeyPatch) -> State:
    """Start a run and return its state before its first step (or its evaluation), where it ends."""
    states: list[State] = []

    def at_first_epoch(training: Training) -> None:
        states.append(live_state(training.parts, training.trainer))
        raise Observed

    def at_evaluation(parts: RunParts, *_: object) -> None:
        states.append(live_state(parts, None))
        raise Observed

    patches.setattr(Training, "_run_epochs", at_first_epoch)
    patches.setattr(run_module, "evaluate", at_evaluation)
    with pytest.raises(Observed):
        main(flags)
    return states[0]


def draw_random_numbers(patches: pytest.MonkeyPatch) -> None:
    """Make each training step change the random generators, as dropout would."""
    original = Trainer._train_step

    def train_step(trainer: Trainer, batch: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return original(trainer, batch)

    patches.setattr(Trainer, "_train_step", train_step)


def roll_back(flags: list[str], folder: Path, patches: pytest.MonkeyPatch) -> tuple[State, State]:
    """Return the state after a rollback and that of its checkpoint, whose data position is that before the rollback."""
    original, states = Training._roll_back, []

    def rolled_back(training: Training) -> None:
        position = training.trainer.data_state
        original(training)
        states.append(live_state(training.parts, training.trainer))
        states.append({**stored_state(folder / "rollback/checkpoints/step_00000040"), "data": position})
        raise Observed

    patches.setattr(Training, "_roll_back", rolled_back)
    noise = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH, SEQ_LEN + 1))
    (folder / "spiky").mkdir()
    sequences = [noise[n % BATCH] if n // BATCH == 44 else sequence(1, 2, 3) for n in range(60 * BATCH)]
    data = ["--train-data", write_shard(folder / "spiky/00000.tar", sequences), "--disable-buffer"]
    with pytest.raises(Observed):
        main([*flags, *data, *epochs(50, 1), "--rollback-loss-spikes", "6", "--name", "rollback"])
    return states[0], states[1]


def epochs(steps: int, number: int) -> list[str]:
    every = ["--save-every-n-steps", "7" if steps < 40 else "20", "--keep-last", "0"]
    return ["--train-num-samples", str(steps * BATCH * SEQ_LEN), "--epochs", str(number), *every]


class Runs:
    """A finished run of 10 steps, with checkpoints within its epoch and at its end, and the states of other starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.states = folder, dict[str, tuple[State, State]]()
        shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
        (folder / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
        self.common = [
            "--model", str(folder / "model.json"), "--data-key", "npy", "--global-batch-size", str(BATCH),
            "--warmup", "2", "--precision", "fp32", "--lr", "3e-2", "--workers", "0", "--logs", str(folder),
            "--averagers", "ema_0.9,poly_8_1",
        ]  # fmt: skip
        self.data = write_source(folder / "data", [40, 40])
        self.other_data = write_source(folder / "other", [60, 60])
        self.checkpoints = folder / "run/checkpoints"
        with pytest.MonkeyPatch.context() as patches:
            self.patch(patches)
            main(self.flags("run"))
        self.within, self.end = self.checkpoints / "step_00000007", self.checkpoints / "step_00000010"
        self.new = self.start([])

    def patch(self, patches: pytest.MonkeyPatch) -> None:
        patches.setattr("open_lm.training.build.build_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=8.0))
        draw_random_numbers(patches)

    def flags(self, name: str, data: str | None = None) -> list[str]:
        flags = [*self.common, "--dataset-manifest", data or self.data, "--skip-loss-spikes", "6", "--name", name]
        return [*flags, *epochs(10, 2 if name != "run" else 1)]

    def start(self, more: list[str], name: str = "", data: str | None = None) -> State:
        name = name or f"observed-{len(self.states)}"
        with pytest.MonkeyPatch.context() as patches:
            self.patch(patches)
            return observe([*self.flags(name, data), *more], patches)

    def restart(self, *more: str) -> State:
        """Observe ranks that torchrun has restarted."""
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("TORCHELASTIC_RESTART_COUNT", "1")
            return self.start([*more, "--epochs", "2"], name="run")

    def evaluate(self) -> State:
        flags = [*self.common, "--val-data", str(self.folder / "data/00000.tar"), "--val-data-key", "npy"]
        with pytest.MonkeyPatch.context() as patches:
            return observe([*flags, "--name", "evaluated", "--resume", str(self.within)], patches)

    def resume_without_averages(self) -> State:
        folder = self.folder / "without"
        folder.mkdir()
        for kind in ("epoch", "optimizer", "stats"):
            (folder / f"{kind}_1.pt").write_bytes((self.checkpoints / f"{kind}_1.pt").read_bytes())
        return self.start(["--resume", str(folder / "epoch_1.pt")])

    def roll_back(self) -> tuple[State, State]:
        with pytest.MonkeyPatch.context() as patches:
            self.patch(patches)
            return roll_back(self.common, self.folder, patches)

    def state(self, way: str) -> tuple[State, State]:
        """Return the state after starting in this way, and that of the checkpoint."""
        epoch, within = str(self.checkpoints / "epoch_1.pt"), str(self.within)
        ways: dict[str, tuple[Callable[[], State], Path]] = {
            "new": (lambda: self.new, self.within),
            "pretrained": (partial(self.start, ["--pretrained", within]), self.within),
            "average": (partial(self.start, ["--average", within, epoch]), self.within),
            "pretrained state": (partial(self.start, ["--pretrained", within, "--load-pretrained-state"]), self.within),
            "... of other data": (
                partial(self.start, ["--pretrained", within, "--load-pretrained-state"], data=self.other_data),
                self.within,
            ),
            "resume sharded": (partial(self.start, ["--resume", within]), self.within),
            "resume interchange": (partial(self.start, ["--resume", epoch]), self.end),
            "... no averages": (self.resume_without_averages, self.end),
            "evaluate": (self.evaluate, self.within),
            "restart": (self.restart, self.end),
            "restart, --resume": (partial(self.restart, "--resume", within), self.end),
        }
        if way not in self.states:
            if way == "rollback":
                self.states[way] = self.roll_back()
            else:
                observed, folder = ways[way]
                self.states[way] = observed(), stored_state(folder)
        return self.states[way]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


# --- tests -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", PARTS)
def test_saved_part_differs_from_a_new_one(part: str, runs: Runs) -> None:
    """Without this, a cell could not tell whether the part was loaded."""
    for folder in (runs.within, runs.end):
        assert not equal(stored_state(folder)[part], runs.new[part])


@pytest.mark.parametrize(("way", "part", "cell"), CELLS, ids=[f"{way}-{part}" for way, part, _ in CELLS])
def test_each_way_to_start_restores_each_part_of_the_state(way: str, part: str, cell: str, runs: Runs) -> None:
    found, saved = runs.state(way)
    if cell == "-":
        assert part not in found or found[part] == {}
        return
    expected = {"new": runs.new, "saved": saved, "later": saved}.get(cell, {}).get(part)
    if cell == "mean":
        both = [stored_state(folder)["model"] for folder in (runs.within, runs.end)]
        for name, value in found["model"].items():
            torch.testing.assert_close(value, sum(state[name] for state in both) / 2)
        return
    if cell == "start":
        (source,) = found["data"]["sources"]
        assert source["num_sequences"] == 120 and found["data"]["seed"] == saved["data"]["seed"]
        assert [source[name] for name in ("pass", "fixed", "shared", "samples")] == [0, 0, 0, 0]
        return
    if cell == "no losses":
        assert saved["guard"]["losses"]
        expected = {**saved["guard"], "losses": []}
    if cell == "weights":
        counters = runs.new["averagers"]["counters"]
        weights = {f"{name}/{key}": value for name in counters for key, value in found["model"].items()}
        expected = {**{key: weights[key] for key in found["averagers"] if key in weights}, "counters": counters}
    assert equal(found[part], expected)


def test_moments_of_a_broken_checkpoint_do_not_remain(runs: Runs, tmp_path: Path) -> None:
    """The newest checkpoint is broken and the older one has no optimizer: training starts without moments."""
    checkpoints = tmp_path / "source/checkpoints"
    (checkpoints / "step_00000010").mkdir(parents=True)
    for path in runs.end.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".bin":
            data[len(data) // 2] ^= 4
        (checkpoints / "step_00000010" / path.name).write_bytes(data)
    (checkpoints / "epoch_1.pt").write_bytes((runs.checkpoints / "epoch_1.pt").read_bytes())
    found = runs.start(["--resume", str(tmp_path / "source")])
    assert equal(found["model"], stored_state(runs.end)["model"])
    assert found["optimizer"] == {}
