"""Kill a training run at random times, resume it, and compare it with an uninterrupted run.

    python scripts/kill_training.py --kills 20 --ranks 2 -- --fsdp

Trains a small model under torchrun on generated data, and saves every few steps. Each run is killed in one of the ways
below and resumed with --resume latest until it finishes. Its log must then contain every step once, with exactly the
loss and gradient norm of the uninterrupted run, and its final weights must be bitwise equal.

    rank         send SIGKILL to one rank; the job must exit with an error
    all          send SIGKILL to the launcher and all ranks
    checkpoint   like "all", while a checkpoint is being written
    upload       like "all", while a file is being uploaded to --remote-sync (a loopback S3 server)
    start        like "all", before the first step
    signal       send SIGTERM to the launcher; the job must save and exit with code 0
    restart      send SIGKILL to one rank with torchrun's --max-restarts; the job must continue automatically

With --elastic, every start uses a different number of ranks. Sums are then computed in a different order, so losses
and gradient norms are compared with a relative tolerance of 1e-4; a different batch would change them much more.
Arguments after `--` are passed to open_lm.main. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from marked_processes import MARK, end_all, marked

from open_lm.data.shard_format import ManifestEntry, ShardWriter, token_dtype, write_manifest
from open_lm.errors import ConfigError, DataError, run_cli

WAYS = ("rank", "all", "checkpoint", "upload", "start", "signal", "restart")
VOCAB, SEQ_LEN, BATCH, STEPS = 4096, 32, 8, 240
SAVES = 16  # per run
POLL_S, TIMEOUT_S = 0.01, 120.0
ELASTIC_TOLERANCE = 1e-4
MODEL = {
    "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB,
    "post_embed_norm": False, "weight_tying": False,
}  # fmt: skip


def make_inputs(folder: Path, steps: int) -> list[str]:
    """Write a model config and two sources of random sequences; return the flags that train `steps` steps on them."""
    generator = np.random.default_rng(0)
    (folder / "model.json").write_text(json.dumps(MODEL, allow_nan=False))
    manifests = []
    for source, sizes in enumerate(([300, 500, 200], [100, 250, 400, 170])):
        source_folder = folder / f"source-{source}"
        source_folder.mkdir()
        entries = []
        for shard, default_size in enumerate(sizes):
            size = default_size * steps // STEPS  # keep the number of passes over the source
            # Use few distinct ids, so that the model can learn their distribution.
            sequences = generator.integers(0, 64 << source, (size, SEQ_LEN + 1)).astype(token_dtype(VOCAB))
            with ShardWriter(source_folder / f"{shard:05d}.tar", "npy") as writer:
                writer.write_numbered(0, sequences)
            entries.append(ManifestEntry(f"{shard:05d}", size, {"sha256": writer.info.sha256}))
        write_manifest(source_folder / "manifest.jsonl", entries)
        manifests.append(str(source_folder / "manifest.jsonl"))
    tokens = steps * BATCH * SEQ_LEN
    return [
        "--model", str(folder / "model.json"), "--dataset-manifest", *manifests, "--data-key", "npy",
        "--train-data-mix-weights", "0.6", "0.4", "--multiple-data-passes", "--train-num-samples", str(tokens // 4),
        "--epochs", "4", "--global-batch-size", str(BATCH), "--lr", "1e-3", "--warmup", "10", "--precision", "fp32",
        "--grad-clip-norm", "1", "--log-every-n-steps", "1", "--save-every-n-steps", str(steps // SAVES),
        "--workers", "1", "--averagers", "ema_0.9", "--seed", "5",
    ]  # fmt: skip


@dataclass
class TrainingRun:
    """A training run in its own folder, which may be started several times."""

    flags: Sequence[str]
    logs: Path
    remote: str | None = None
    kills: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.logs / "run"

    def command(self, ranks: int, restarts: int) -> list[str]:
        launcher = [sys.executable, "-m", "open_lm.utils.torchrun", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", str(restarts)]
        remote = ["--remote-sync", self.remote, "--remote-sync-frequency", "1"] if self.remote else []
        run_flags = ["--logs", str(self.logs), "--name", "run", "--resume", "latest"]
        return [*launcher, "-m", "open_lm.main", *self.flags, *run_flags, *remote]

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete training lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    def last_step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def is_saving(self) -> bool:
        return any(self.folder.glob("checkpoints/*.incomplete"))

    def is_uploading(self) -> bool:
        return any(".open-lm-part-sync-" in path.name for path in self.folder.rglob(".*"))


@dataclass
class Start:
    """One execution of a run's command."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    mark: str

    @classmethod
    def of(cls, run: TrainingRun, ranks: int, restarts: int = 0) -> Start:
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        mark = uuid.uuid4().hex
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
        process = subprocess.Popen(run.command(ranks, restarts), stdout=log, stderr=subprocess.STDOUT, env=environment)
        return cls(process, log, mark)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-6000:]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until the condition is true; return False if the command exits first."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill_all()
                raise DataError(f"the command made no progress within {TIMEOUT_S:.0f} s:\n{self.output()}")
            time.sleep(POLL_S)
        return True

    def wait(self) -> int:
        """Return the exit code. Raise DataError if the command does not exit."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise DataError(f"the command did not exit within {TIMEOUT_S:.0f} s:\n{self.output()}") from None
        self.kill_all()  # data workers of a killed rank may still be running
        return code

    def ranks(self) -> list[int]:
        """Return the ranks (children of the launcher), without their data workers."""
        return [pid for pid in marked(self.mark) if _parent(pid) == self.process.pid]

    def kill_all(self) -> None:
        self.process.kill()
        self.process.wait()
        end_all(self.mark)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def interrupt(run: TrainingRun, way: str, ranks: int, steps: int, rng: random.Random) -> str:
    """Start the run and kill it in the given way; return a description, or "" if the run finished first."""
    start = Start.of(run, ranks, restarts=1 if way == "restart" else 0)
    before = run.last_step()
    target = before + rng.randint(1, 2 * (steps // SAVES))
    if way == "start":
        time.sleep(rng.uniform(0.5, 6.0))
        reached = start.process.poll() is None
    elif way == "checkpoint":
        reached = start.wait_for(lambda: run.last_step() > before and run.is_saving())
    elif way == "upload":
        reached = start.wait_for(lambda: run.last_step() > before and run.is_uploading())
    else:
        # Resuming truncates the log to the checkpoint, so the target step must be logged by this start.
        reached = start.wait_for(lambda: start.ranks() != [] and run.last_step() >= target)
    if not reached:
        _expect(start, start.wait() == 0, "failed before it was killed")
        return ""
    step, pids = run.last_step(), start.ranks()
    if way == "signal":
        start.process.send_signal(signal.SIGTERM)
        _expect(start, start.wait() == 0, "did not exit with code 0 after SIGTERM")
    elif way in ("rank", "restart") and pids:
        os.kill(rng.choice(pids), signal.SIGKILL)
        code = start.wait()
        _expect(start, (code == 0) == (way == "restart"), f"exited with code {code} after SIGKILL of one rank")
    else:
        start.kill_all()
    return f"at step {step}"


def _expect(start: Start, condition: bool, problem: str) -> None:
    if not condition:
        raise DataError(f"the training run {problem}:\n{start.output()}")


def difference(run: TrainingRun, expected: TrainingRun, tolerance: float) -> str:
    """Describe how the log and the final weights differ from the uninterrupted run; return "" if they are equal."""
    rows, expected_rows = run.rows(), expected.rows()
    steps = [row["step"] for row in rows]
    if steps != [row["step"] for row in expected_rows]:
        return f"the log has {len(steps)} steps ({len(set(steps))} distinct), expected {len(expected_rows)}"
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        errors = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-30) for a, b in zip(rows, expected_rows, strict=True)]
        if max(errors) > tolerance:
            first = steps[next(number for number, value in enumerate(errors) if value > tolerance)]
            return f"{name}: maximum relative error {max(errors):.1e}, first at step {first}"
    return "" if tolerance else _weights_differ(run.folder, expected.folder)


def _weights_differ(folder: Path, expected: Path) -> str:
    """Describe the first weights file that differs; return "" if all are equal."""
    import torch

    for path in sorted(expected.glob("checkpoints/*_4.pt")):
        if path.name.startswith(("epoch", "ema")):
            key = "state_dict" if path.name.startswith("epoch") else "av_model_sd"
            expected_state = torch.load(path, weights_only=True)[key]
            state = torch.load(folder / "checkpoints" / path.name, weights_only=True)[key]
            differing = [name for name in expected_state if not torch.equal(expected_state[name], state[name])]
            if differing:
                return f"{path.name}: {len(differing)} tensors differ, first {differing[0]}"
    return ""


def kill_many(args: argparse.Namespace, folder: Path, remote: str | None) -> int:
    """Print one line per start, and return the number of finished runs that differ from the uninterrupted one."""
    rng = random.Random(args.seed)
    flags = [*make_inputs(folder, args.steps), *args.train_args]
    expected = TrainingRun(flags, folder / "uninterrupted")
    start = Start.of(expected, args.ranks)
    _expect(start, start.wait() == 0, "failed without being killed")
    print(f"uninterrupted: {expected.last_step()} steps, loss {expected.rows()[-1]['train/loss']:.4f}", flush=True)
    ways = [way for way in args.ways if way != "upload" or remote]
    number, finished, differing = 0, 0, 0
    run = TrainingRun(flags, folder / "run-0", remote and f"{remote}/run-0")
    while number < args.kills or run.kills:
        ranks = rng.choice((1, 2, 4)) if args.elastic else args.ranks
        way = ways[number % len(ways)]
        if number < args.kills:
            description = interrupt(run, way, ranks, args.steps, rng)
            if description:
                number += 1
                run.kills.append(way)
                print(f"kill {number:3} of {args.kills}: {way:10} with {ranks} ranks {description}", flush=True)
                if way != "restart":
                    continue
        else:
            start = Start.of(run, ranks)
            _expect(start, start.wait() == 0, "failed when it resumed after a kill")
        differences = difference(run, expected, ELASTIC_TOLERANCE if args.elastic else 0.0)
        finished, differing = finished + 1, differing + bool(differences)
        result = differences or "identical to the uninterrupted run"
        print(f"  finished after {len(run.kills)} kills: {result}", flush=True)
        run = TrainingRun(flags, folder / f"run-{finished}", remote and f"{remote}/run-{finished}")
    print(json.dumps({"kills": number, "finished": finished, "differing": differing}, allow_nan=False))
    return differing


@contextlib.contextmanager
def loopback_bucket() -> Iterator[str]:
    """Start an S3 server in this process, set the AWS variables for child processes, and yield a bucket URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        os.environ |= {
            "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        boto3.client("s3").create_bucket(Bucket="trainings")
        yield "s3://trainings"
    finally:
        server.stop()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of a run, a multiple of {SAVES} (default: {STEPS})"
    )
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to kill the run (default: all)"
    )
    parser.add_argument("--elastic", action="store_true", help="start each time with 1, 2 or 4 ranks, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("train_args", nargs="*", help="after `--`: further flags of open_lm.main")
    args = parser.parse_args(argv)
    if args.steps < SAVES or args.steps % SAVES:
        raise ConfigError(f"--steps: found {args.steps}, expected a multiple of {SAVES}")
    with tempfile.TemporaryDirectory(prefix="kill-training-") as folder:
        if "upload" not in args.ways:
            differing = kill_many(args, Path(folder), None)
        else:
            with loopback_bucket() as remote:
                differing = kill_many(args, Path(folder), remote)
    if differing:
        raise DataError(f"{differing} training runs differ from the uninterrupted one")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
