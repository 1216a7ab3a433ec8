"""Where a run keeps its files, and what it writes about itself there: params.txt and a copy of the source.

{logs}/{name}/out.log params.txt data.json metrics.jsonl tensorboard/ wandb/ code/ stacks/ checkpoints/
checkpoints_failed/; the last two are in {checkpoint_dir}/{name}/ where that is given, which may be remote.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.storage.redaction import redact, redacted

_LOCK_WAIT_S, _LOCK_POLL_S = 30.0, 0.2  # ranks that have lost their launcher save and end within a step


@dataclass(frozen=True)
class RunPaths:
    """The files of the run `name` below the folder `logs`; nothing is written where `logs` is "none" or empty."""

    logs: str
    name: str
    checkpoint_dir: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether the run writes anything at all."""
        return bool(self.logs) and self.logs.lower() != "none"

    @property
    def root(self) -> str:
        return storage.join(self.logs, self.name)

    @property
    def log(self) -> str:
        return storage.join(self.root, "out.log")

    @property
    def params(self) -> str:
        return storage.join(self.root, "params.txt")

    @property
    def model(self) -> str:
        return storage.join(self.root, "model.json")

    @property
    def metrics(self) -> str:
        return storage.join(self.root, "metrics.jsonl")

    @property
    def tensorboard(self) -> str:
        return storage.join(self.root, "tensorboard")

    @property
    def data(self) -> str:
        return storage.join(self.root, "data.json")

    @property
    def stacks(self) -> str:
        return storage.join(self.root, "stacks")

    @property
    def code(self) -> str:
        return storage.join(self.root, "code")

    @property
    def checkpoints(self) -> str:
        return storage.join(self._checkpoint_root, "checkpoints")

    @property
    def failed(self) -> str:
        return storage.join(self._checkpoint_root, "checkpoints_failed")

    @property
    def _checkpoint_root(self) -> str:
        return self.root if self.checkpoint_dir is None else storage.join(self.checkpoint_dir, self.name)

    @property
    def results(self) -> str:
        """Lines are added to it, so that it is always local."""
        return storage.join(self.root, "checkpoints", "results.jsonl")

    def local_roots(self) -> list[str]:
        """The local folders that together are the run: one, and --checkpoint-dir's where that is another local one."""
        roots = [self.root, self._checkpoint_root]
        return [root for root in dict.fromkeys(roots) if not storage.is_remote(root)]

    def prepare(self, resume: str | None) -> None:
        """Make the run's folders; ConfigError where the run exists and is not continued with `--resume latest`."""
        if not self.enabled:
            return
        if storage.is_remote(self.logs):
            raise ConfigError(
                f"--logs {self.logs}: expected a local folder; give one, "
                f"and --remote-sync {self.logs} to have the run copied there"
            )
        if os.path.exists(self.log) and resume != "latest":
            raise ConfigError(
                f"--name {self.name}: the run exists already at {self.root}; "
                "continue its training with --resume latest, or choose another --name "
                "(an evaluation and --resume PATH need one of their own)"
            )
        for folder in (self.root, os.path.dirname(self.results), self.checkpoints, self.failed):
            storage.makedirs(folder)

    def check_checkpoint_dir(self) -> None:
        """ConfigError where the run that is here keeps its checkpoints in another place, which would be overlooked."""
        if not self.enabled or not os.path.exists(self.params):
            return
        known = dict(line.partition(": ")[::2] for line in storage.read_text(self.params).splitlines())
        before, now = known.get("checkpoint_dir", "None"), redact(str(self.checkpoint_dir))
        if before != now:
            raise ConfigError(
                f"--resume latest finds no checkpoint: the run in {self.root} was started with --checkpoint-dir "
                f"{before}, now it is {now}; give the same, or another --name"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the run's folder, until the block or the process ends, however it does.

        Waits for one that is about to end; ConfigError that names it where it does not. Nothing is locked where
        nothing is written, nor on a file system without locks.
        """
        if not self.enabled:
            yield
            return
        with open(storage.temporary_name(storage.join(self.root, "run"), "lock"), "a+", encoding="utf-8") as file:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not _lock(file):
                file.seek(0)
                holder = file.read().strip()
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"--name {self.name}: {holder} is working in {self.root}; wait until it has ended, end it, "
                        "or choose another --name"
                    )
                time.sleep(_LOCK_POLL_S)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def _lock(file: IO[str]) -> bool:
    """Whether this process has the file for itself now; data workers, which are forked, have no part in that."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def write_params(path: str, params: Mapping[str, Any] | object) -> None:
    """Write params.txt: a "key: value" line for each parameter, sorted, without secrets."""
    mapping = params if isinstance(params, Mapping) else vars(params)
    lines = [f"{key}: {value}" for key, value in sorted(redacted(mapping).items())]
    storage.write_text(path, "\n".join(lines) + "\n")


def copy_codebase(paths: RunPaths) -> str:
    """Copy the package's source into the run's code/ folder and return that folder; a copy already there is kept."""
    package = Path(__file__).resolve().parents[1]
    target = Path(paths.code) / package.name
    if not target.exists():
        unfinished = target.with_name(target.name + ".copying")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(package, unfinished, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        unfinished.rename(target)
    return paths.code
