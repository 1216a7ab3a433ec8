"""Find the checkpoints for `--resume`: in the run folder, in --checkpoint-dir and in the --remote-sync copy."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from open_lm import storage
from open_lm.checkpoint import files
from open_lm.checkpoint.folders import INDEX, is_transformers_folder, step_folders, step_number
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors, incomplete_reason
from open_lm.config.sections import CheckpointConfig, LoggingConfig
from open_lm.distributed.processes import run_on_master
from open_lm.errors import CheckpointError, ConfigError, join_problems
from open_lm.monitor.run_folder import RunPaths
from open_lm.storage.remote_sync import fetch_logs, remote_folder

_MAX_CANDIDATES = 4  # if the newest 4 are all broken, resuming from an even older one would be wrong


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that looks complete: a step_N folder if `sharded`, else an epoch_N.pt.

    It was saved after `step` optimizer steps and `epoch` completed epochs; 0 if an old file does not contain them.
    """

    url: str
    step: int
    epoch: int
    sharded: bool
    remote: bool

    @property
    def preference(self) -> tuple[int, int, bool, bool]:
        """A sort key, larger is better: newer, then sharded, then local."""
        return self.step, 0 if self.step else self.epoch, self.sharded, not self.remote


def find_candidates(cfg: CheckpointConfig, logging_cfg: LoggingConfig, paths: RunPaths) -> list[Candidate]:
    """Return the newest few checkpoints for `--resume`, the best one first; the same on all ranks. Collective.

    "latest": search the run folder, --checkpoint-dir and the --remote-sync copy; the result may be empty. Logs that
    are longer in the copy are downloaded. A path: that checkpoint, or the newest ones of that run folder. Broken and
    incomplete checkpoints are skipped with a warning; weights without an optimizer come last. Only listings and small
    files are read.

    Raises:
        CheckpointError: the path has no checkpoint; "latest": checkpoints exist, but all are broken.
        ConfigError: without "latest", if the copy already contains a run of this name.
    """
    return run_on_master(lambda: _find_candidates(cfg.resume, remote_folder(logging_cfg, paths.name), paths))


def _find_candidates(resume: str | None, remote: str | None, paths: RunPaths) -> list[Candidate]:
    if resume != "latest":
        if remote is not None:
            _check_new_name(remote, paths)
        return [] if resume is None else candidates_at(resume)
    folders = [paths.checkpoints, storage.join(paths.root, "checkpoints")] if paths.enabled else []
    if remote is not None:
        folders.append(storage.join(remote, "checkpoints"))
        if paths.enabled and (fetched := fetch_logs(remote, paths.root)):
            logging.info(f"downloaded {', '.join(fetched)} from {remote}")
    broken: list[str] = []
    candidates = newest_candidates(folders, broken)
    if broken and not candidates:
        advice = "restore or remove them, or start under another --name"
        raise CheckpointError(
            join_problems(broken, f"--resume latest: all checkpoints of this run are broken; {advice}")
        )
    searched = " or ".join(dict.fromkeys(folders)) or "--logs none"
    no_checkpoint = f"no complete checkpoint in {searched}, starting from scratch"
    logging.info(f"--resume latest: {candidates[0].url if candidates else no_checkpoint}")
    return candidates


def candidates_at(path: str) -> list[Candidate]:
    """Return the candidates of a path: a step_N folder, an epoch_N.pt or other file of weights, or a run folder."""
    path = path.rstrip("/")
    if step_number(path) is not None:
        if problem := incomplete_reason(path):
            raise CheckpointError(f"cannot resume from {path}: {problem}")
        return [_sharded_candidate(path)]
    if storage.info(path) is not None or is_transformers_folder(path):
        return [_interchange_candidate(path)]
    candidates = newest_candidates([path, storage.join(path, "checkpoints")])
    if not candidates:
        raise CheckpointError(
            f"{path}: no such checkpoint{files.existing_hint(path)}; expected an epoch_N.pt, a step_N folder, or "
            "a run folder with checkpoints"
        )
    return candidates


def newest_candidates(folders: list[str], broken: list[str] | None = None) -> list[Candidate]:
    """Return the newest few complete checkpoints of some folders, the best one first.

    Error messages of skipped checkpoints are added to `broken`, except for those that were never completed.
    """
    weights_only: list[Candidate] = []
    problems: list[str] = [] if broken is None else broken
    iterators = []
    for folder in dict.fromkeys(folders):  # search each folder once
        iterators += [_sharded_in(folder, problems), _interchange_in(folder, problems, weights_only)]
        iterators += [_latest_in(folder, problems)]
    merged = heapq.merge(*iterators, key=lambda candidate: candidate.preference, reverse=True)
    return [*itertools.islice(merged, _MAX_CANDIDATES), *weights_only]


# ---------------------------------------------------------------------------------------------- one folder
# These generators read a checkpoint only on demand: a run may have hundreds, and usually the newest one is used.
def _sharded_in(folder: str, broken: list[str]) -> Iterator[Candidate]:
    for url in reversed(step_folders(folder).values()):
        if problem := incomplete_reason(url):
            _skip(url, problem, broken if storage.exists(storage.join(url, INDEX)) else [])
        else:
            yield _sharded_candidate(url)


def _interchange_in(folder: str, broken: list[str], weights_only: list[Candidate]) -> Iterator[Candidate]:
    """Yield the epoch_N.pt files with an optimizer file, and add those without to `weights_only`."""
    for url in reversed(files.epoch_files(folder).values()):
        if problem := files.incomplete_reason(url):
            _skip(url, problem, broken)
        elif files.has_optimizer(url):
            yield _interchange_candidate(url)
        else:
            _skip(url, "its optimizer file is missing or broken", broken)
            weights_only.append(_interchange_candidate(url))


def _latest_in(folder: str, broken: list[str]) -> Iterator[Candidate]:
    url = storage.join(folder, files.file_name("epoch", files.LATEST))
    if storage.info(url) is None:
        return
    if problem := files.incomplete_reason(url):
        _skip(url, problem, broken)
    else:
        yield _interchange_candidate(url)


def _skip(url: str, problem: str, broken: list[str]) -> None:
    broken.append(f"{url}: {problem}")
    logging.warning(f"skipped checkpoint {url}: {problem}")


def _sharded_candidate(url: str) -> Candidate:
    progress = saved_progress(url, sharded=True)
    return Candidate(url, progress.step or 0, progress.epoch, sharded=True, remote=storage.is_remote(url))


def _interchange_candidate(url: str) -> Candidate:
    progress = saved_progress(url, sharded=False)
    return Candidate(url, progress.step or 0, progress.epoch, sharded=False, remote=storage.is_remote(url))


def saved_progress(url: str, sharded: bool) -> Progress:
    """Return the progress that a checkpoint contains, without reading tensors."""
    if not sharded:
        return Progress.from_meta(files.read_meta(url))
    stored = StoredTensors(url)
    return Progress.from_json({"step": stored.step, **stored.extra.get("progress", {})})


def _check_new_name(remote: str, paths: RunPaths) -> None:
    has_metrics = storage.exists(storage.join(remote, os.path.basename(paths.metrics)))  # else a start that failed
    if has_metrics or storage.list_files(storage.join(remote, "checkpoints")):
        raise ConfigError(
            f"--remote-sync: a run of this name already exists at {remote}; "
            "continue it with --resume latest, or choose another --name"
        )
