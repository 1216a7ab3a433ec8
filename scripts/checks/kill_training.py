"""Kill a training at random moments, start it again, and see whether it trains as if nothing had happened.

    python scripts/kill_training.py --kills 20 --ranks 2 -- --fsdp

A small model is trained under torchrun on data made here, saving every few steps. A start is killed in one of the ways
below and then started again with --resume latest, until one lives to its end. Then the joined log must say, for every
step once, the very loss and gradient norm of an undisturbed run, and the last weights must be the same, bit for bit.

    rank         one rank gets SIGKILL: the job must end by itself, with an error
    all          launcher and ranks get SIGKILL
    checkpoint   the same, while a checkpoint is being written
    upload       the same, while a file is on its way to --remote-sync (a loopback S3 server)
    start        the same, before the first step
    signal       the launcher gets SIGTERM: the job must save, and end with exit code 0
    restart      one rank gets SIGKILL under torchrun's --max-restarts: the job must go on by itself

With --elastic every start has another number of ranks, which add in another order: losses and gradient norms are then
compared to 1e-4 of their value, far less than another batch would change. What follows `--` goes to open_lm.main.
Linux only.
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
from open_lm.errors import DataError, run_cli

WAYS = ("rank", "all", "checkpoint", "upload", "start", "signal", "restart")
VOCAB, SEQ_LEN, BATCH, STEPS, SAVE_EVERY = 4096, 32, 8, 240, 15
POLL_S, PATIENCE_S = 0.01, 120.0
ELASTIC_TOLERANCE = 1e-4
MODEL = {
    "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB,
    "post_embed_norm": False, "weight_tying": False,
}  # fmt: skip


def make_inputs(folder: Path) -> list[str]:
    """A model's file and two sources of random sequences; the flags that train on them."""
    generator = np.random.default_rng(0)
    (folder / "model.json").write_text(json.dumps(MODEL))
    manifests = []
    for source, sizes in enumerate(([300, 500, 200], [100, 250, 400, 170])):
        place = folder / f"source-{source}"
        place.mkdir()
        entries = []
        for shard, size in enumerate(sizes):
            # Few different ids, so that there is something to learn.
            rows = generator.integers(0, 64 << source, (size, SEQ_LEN + 1)).astype(token_dtype(VOCAB))
            with ShardWriter(place / f"{shard:05d}.tar", "npy") as writer:
                writer.write_numbered(0, rows)
            entries.append(ManifestEntry(f"{shard:05d}", size, {"sha256": writer.info.sha256}))
        write_manifest(place / "manifest.jsonl", entries)
        manifests.append(str(place / "manifest.jsonl"))
    tokens = STEPS * BATCH * SEQ_LEN
    return [
        "--model", str(folder / "model.json"), "--dataset-manifest", *manifests, "--data-key", "npy",
        "--train-data-mix-weights", "0.6", "0.4", "--multiple-data-passes", "--train-num-samples", str(tokens // 4),
        "--epochs", "4", "--global-batch-size", str(BATCH), "--lr", "1e-3", "--warmup", "10", "--precision", "fp32",
        "--grad-clip-norm", "1", "--log-every-n-steps", "1", "--save-every-n-steps", str(SAVE_EVERY), "--workers", "1",
        "--averagers", "ema_0.9", "--seed", "5",
    ]  # fmt: skip


@dataclass
class Run:
    """A training in a folder of its own, started as often as need be."""

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
        place = ["--logs", str(self.logs), "--name", "run", "--resume", "latest"]
        return [*launcher, "-m", "open_lm.main", *self.flags, *place, *remote]

    def rows(self) -> list[dict[str, Any]]:
        """The lines of training in metrics.jsonl that are whole."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    def last_step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def being_written(self) -> bool:
        return any(self.folder.glob("checkpoints/*.incomplete"))

    def being_sent(self) -> bool:
        return any(".open-lm-part-sync-" in path.name for path in self.folder.rglob(".*"))


@dataclass
class Start:
    """One start of a run's command."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    mark: str

    @classmethod
    def of(cls, run: Run, ranks: int, restarts: int = 0) -> Start:
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the start)
        mark = uuid.uuid4().hex
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
        process = subprocess.Popen(run.command(ranks, restarts), stdout=log, stderr=subprocess.STDOUT, env=environment)
        return cls(process, log, mark)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-6000:]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the command ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill_all()
                raise DataError(f"nothing happened for {PATIENCE_S:.0f} s:\n{self.said()}")
            time.sleep(POLL_S)
        return True

    def end(self) -> int:
        """The exit code; DataError where the command does not end."""
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise DataError(f"the command does not end:\n{self.said()}") from None
        self.kill_all()  # data workers of a killed rank, if any is left
        return code

    def ranks(self) -> list[int]:
        """The processes that the launcher has started; their data workers are not among them."""
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


def disturb(run: Run, way: str, ranks: int, chance: random.Random) -> str:
    """Start the run and kill it in the given way; says what happened. "" where it was over before."""
    start = Start.of(run, ranks, restarts=1 if way == "restart" else 0)
    before = run.last_step()
    target = before + chance.randint(1, 2 * SAVE_EVERY)
    if way == "start":
        time.sleep(chance.uniform(0.5, 6.0))
        reached = start.process.poll() is None
    elif way == "checkpoint":
        reached = start.wait_for(lambda: run.last_step() > before and run.being_written())
    elif way == "upload":
        reached = start.wait_for(lambda: run.last_step() > before and run.being_sent())
    else:
        # A resumed log is cut back to its checkpoint first: the step has to come anew.
        reached = start.wait_for(lambda: start.ranks() != [] and run.last_step() >= target)
    if not reached:
        _expect(start, start.end() == 0, "ended with an error before it was killed")
        return ""
    step, pids = run.last_step(), start.ranks()
    if way == "signal":
        start.process.send_signal(signal.SIGTERM)
        _expect(start, start.end() == 0, "did not end with exit code 0 after SIGTERM")
    elif way in ("rank", "restart") and pids:
        os.kill(chance.choice(pids), signal.SIGKILL)
        code = start.end()
        _expect(start, (code == 0) == (way == "restart"), f"ended with exit code {code}")
    else:
        start.kill_all()
    return f"at step {step}"


def _expect(start: Start, holds: bool, words: str) -> None:
    if not holds:
        raise DataError(f"the training {words}:\n{start.said()}")


def difference(run: Run, expected: Run, tolerance: float) -> str:
    """How the joined log and the last weights differ from the undisturbed run's; empty where they do not."""
    found, wanted = run.rows(), expected.rows()
    steps = [row["step"] for row in found]
    if steps != [row["step"] for row in wanted]:
        return f"the log has {len(steps)} steps ({len(set(steps))} different), expected {len(wanted)}"
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        apart = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-30) for a, b in zip(found, wanted, strict=True)]
        if max(apart) > tolerance:
            first = steps[next(number for number, value in enumerate(apart) if value > tolerance)]
            return f"{name} differs by up to {max(apart):.1e} of its value, first at step {first}"
    return "" if tolerance else _weights_differ(run.folder, expected.folder)


def _weights_differ(found: Path, expected: Path) -> str:
    import torch

    for path in sorted(expected.glob("checkpoints/*_4.pt")):
        if path.name.startswith(("epoch", "ema")):
            key = "state_dict" if path.name.startswith("epoch") else "av_model_sd"
            theirs = torch.load(path, weights_only=True)[key]
            ours = torch.load(found / "checkpoints" / path.name, weights_only=True)[key]
            other = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
            if other:
                return f"{path.name}: {len(other)} tensors differ, first {other[0]}"
    return ""


def kill_many(args: argparse.Namespace, folder: Path, remote: str | None) -> int:
    """Print a line for every start; returns how many finished runs differed from the undisturbed one."""
    chance = random.Random(args.seed)
    flags = [*make_inputs(folder), *args.more]
    expected = Run(flags, folder / "undisturbed")
    start = Start.of(expected, args.ranks)
    _expect(start, start.end() == 0, "failed without being killed")
    print(f"undisturbed: {expected.last_step()} steps, loss {expected.rows()[-1]['train/loss']:.4f}", flush=True)
    ways = [way for way in args.ways if way != "upload" or remote]
    number, finished, differing = 0, 0, 0
    run = Run(flags, folder / "run-0", remote and f"{remote}/run-0")
    while number < args.kills or run.kills:
        ranks = chance.choice((1, 2, 4)) if args.elastic else args.ranks
        way = ways[number % len(ways)]
        if number < args.kills:
            words = disturb(run, way, ranks, chance)
            if words:
                number += 1
                run.kills.append(way)
                print(f"kill {number:3} of {args.kills}: {way:10} with {ranks} ranks {words}", flush=True)
                if way != "restart":
                    continue
        else:
            start = Start.of(run, ranks)
            _expect(start, start.end() == 0, "failed on what a killed one had left")
        words = difference(run, expected, ELASTIC_TOLERANCE if args.elastic else 0.0)
        finished, differing = finished + 1, differing + bool(words)
        print(f"  finished after {len(run.kills)} kills: {words or 'every step as undisturbed'}", flush=True)
        run = Run(flags, folder / f"run-{finished}", remote and f"{remote}/run-{finished}")
    print(json.dumps({"kills": number, "finished": finished, "differing": differing}))
    return differing


@contextlib.contextmanager
def loopback_bucket() -> Iterator[str]:
    """The address of a bucket on an S3 server of this process, which what is started here is pointed at."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
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
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training (default: 2)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of killing (default: all)")
    parser.add_argument("--elastic", action="store_true", help="start with 1, 2 or 4 ranks, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("more", nargs="*", help="after `--`: further flags of open_lm.main")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kill-training-") as folder:
        if "upload" not in args.ways:
            differing = kill_many(args, Path(folder), None)
        else:
            with loopback_bucket() as remote:
                differing = kill_many(args, Path(folder), remote)
    if differing:
        raise DataError(f"{differing} trainings differ from the undisturbed one")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
