"""The files of a run: their paths, the lock of the run folder, params.txt and the copy of the source.

{logs}/{name}/out.log params.txt data.json tokenizer/ text_index/ environment.json metrics.jsonl icl.jsonl
samples.jsonl report.html tensorboard/ wandb/ code/ diagnostics/ checkpoints/ checkpoints_failed/. With
--checkpoint-dir, which may be remote, the last two are in {checkpoint_dir}/{name}/, with copies of data.json and
tokenizer/.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.storage.paths import is_open_at
from open_lm.storage.redaction import redact, redacted
from open_lm.system.names import escape_line, setting_text

_CHECKPOINT_NAME = re.compile(r"(step_\d+|epoch_(\d+|latest)\.pt)")
# What a start writes to the run's folder before its first step.
_START_FILE = re.compile(
    r"out\.log|out-\d+|params\.txt|model\.json|data\.json|environment\.json|report\.html|tokenizer|tensorboard|wandb|code"
    r"|\.run.*"
)
_LOCK_WAIT_S, _LOCK_POLL_S = 30.0, 0.2  # ranks that have lost their launcher end within this time


@dataclass(frozen=True)
class RunPaths:
    """The paths of the run `name` in the folder `logs`; nothing is written if `logs` is "none" or empty."""

    logs: str
    name: str
    checkpoint_dir: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether the run writes any files."""
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
    def icl(self) -> str:
        return storage.join(self.root, "icl.jsonl")

    @property
    def samples(self) -> str:
        return storage.join(self.root, "samples.jsonl")

    @property
    def tensorboard(self) -> str:
        return storage.join(self.root, "tensorboard")

    @property
    def data(self) -> str:
        return storage.join(self.root, "data.json")

    @property
    def diagnostics(self) -> str:
        return storage.join(self.root, "diagnostics")

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
        """results.jsonl; always local, because lines are appended to it."""
        return storage.join(self.root, "checkpoints", "results.jsonl")

    @property
    def roots(self) -> list[str]:
        """The folders of the run: its folder, and the one in --checkpoint-dir, which may be remote."""
        return list(dict.fromkeys([self.root, self._checkpoint_root]))

    def local_roots(self) -> list[str]:
        """Return the local folders of the run: its folder, and the one in --checkpoint-dir if it is local too."""
        return [root for root in self.roots if not storage.is_remote(root)]

    @contextmanager
    def claim(self, resume: str | None) -> Iterator[None]:
        """Create the run's folder and lock it until the block or the process ends.

        If the block fails before the run has results, what it has added to the folder is removed, so that its name
        remains free. See `prepare` and `lock` for the errors.
        """
        existing = set(self._entries()) if self.enabled else set()
        try:
            self.prepare(resume)
        except BaseException:
            if self.enabled and not storage.is_remote(self.logs) and not self.has_results():
                self._remove_empty_folders()
            raise
        with self.lock():
            self.prepare(resume)  # again: another process may have used the folder until now
            try:
                yield
            except BaseException:
                if self.enabled and not self.has_results():
                    self._remove_start(existing)
                raise

    def prepare(self, resume: str | None) -> None:
        """Create the run's folders.

        Raises:
            ConfigError: the run has results and is not resumed with `--resume latest`.
        """
        if not self.enabled:
            return
        if storage.is_remote(self.logs):
            raise ConfigError(
                f"--logs {self.logs}: expected a local folder; set one, and --remote-sync {self.logs} to copy the run "
                "there"
            )
        if resume != "latest" and self.has_results():
            raise ConfigError(
                f"--name {self.name}: the run already exists at {self.root}; resume its training with --resume latest, "
                "or choose another --name (an evaluation and --resume PATH need a new name)"
            )
        for folder in (self.root, os.path.dirname(self.results), self.checkpoints, self.failed):
            storage.makedirs(folder)

    def has_results(self) -> bool:
        """Return whether the run has trained a step or evaluated. Reads local files only."""
        if any(os.path.isfile(path) and os.path.getsize(path) for path in (self.metrics, self.results)):
            return True
        for folder in {os.path.dirname(self.results), self.checkpoints, self.failed}:
            if os.path.isdir(folder) and any(_CHECKPOINT_NAME.match(name) for name in os.listdir(folder)):
                return True
        if not os.path.isfile(self.log):
            return False
        with open(self.log, encoding="utf-8", errors="replace") as log:  # the original OpenLM has no metrics.jsonl
            return any("| Train Epoch: " in line for line in log)

    def _entries(self) -> list[Path]:
        """Return the files and folders directly in the local folders of the run."""
        return [path for root in map(Path, self.local_roots()) if root.is_dir() for path in root.iterdir()]

    def _remove_start(self, existing: Set[Path]) -> None:
        """Remove what a start writes before its first step, except the `existing` files, and empty folders."""
        for path in set(self._entries()) - existing:
            if _START_FILE.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self._remove_empty_folders()

    def _remove_empty_folders(self) -> None:
        for folder in (
            self.diagnostics,
            os.path.dirname(self.results),
            self.checkpoints,
            self.failed,
            *self.local_roots(),
        ):
            with suppress(OSError):  # not empty, or already removed
                os.rmdir(folder)

    def check_checkpoint_dir(self) -> None:
        """Raise ConfigError if the existing run was started with another --checkpoint-dir, whose checkpoints would be
        missed."""
        if not self.enabled or not os.path.exists(self.params):
            return
        saved = dict(line.partition(": ")[::2] for line in storage.read_lines(self.params))
        expected, current = saved.get("checkpoint_dir", "None"), escape_line(redact(str(self.checkpoint_dir)))
        if expected != current:
            raise ConfigError(
                f"--resume latest finds no checkpoint: the run in {self.root} was started with --checkpoint-dir "
                f"{expected}, but now it is {current}; set the same folder, or choose another --name"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run's folder against other processes until the block or the process ends.

        Wait for a process that is about to end; raise ConfigError naming the process if it does not. Nothing is locked
        if the run writes no files, or on a file system without locks.
        """
        if not self.enabled:
            yield
            return
        with self._open_locked() as file:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _open_locked(self) -> IO[str]:
        """Return the lock file, locked by this process."""
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            storage.makedirs(self.root)
            file = open(self._lock_file, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller, or below
            if _try_lock(file):
                if is_open_at(file, self._lock_file):
                    return file
                file.close()  # the process that held the lock has removed the file
                continue
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"--name {self.name}: {holder} is using {self.root}; wait until it has ended, stop it, or "
                    "choose another --name"
                )
            time.sleep(_LOCK_POLL_S)

    @property
    def _lock_file(self) -> str:
        return storage.temporary_name(storage.join(self.root, "run"), "lock")


def _try_lock(file: IO[str]) -> bool:
    """Return whether this process acquired the lock. Forked data workers do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def write_params(path: str, params: Mapping[str, Any] | object) -> None:
    """Write params.txt: one "key: value" line per parameter, sorted, with secrets redacted.

    Control characters and bytes that are not UTF-8 are escaped (`names.escape_line`).
    """
    mapping = params if isinstance(params, Mapping) else vars(params)
    lines = [escape_line(f"{key}: {setting_text(value)}") for key, value in sorted(redacted(mapping).items())]
    storage.write_text(path, "\n".join(lines) + "\n")


def copy_codebase(paths: RunPaths) -> str:
    """Copy the package's source to the run's code/ folder and return that folder; keep an existing copy."""
    package = Path(__file__).resolve().parents[1]
    target = Path(paths.code) / package.name
    if not target.exists():
        temporary = target.with_name(target.name + ".copying")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(package, temporary, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        temporary.rename(target)
    return paths.code
