"""Which checkpoints `--resume` can mean: those of the run's folder, of --checkpoint-dir and of its copy elsewhere."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from open_lm import storage
from open_lm.checkpoint import files
from open_lm.checkpoint.folders import INDEX, step_folders, step_number
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors, incompleteness
from open_lm.config.sections import CheckpointConfig, LoggingConfig
from open_lm.distributed.processes import run_on_master
from open_lm.errors import CheckpointError, ConfigError, join_problems
from open_lm.monitor.run_folder import RunPaths
from open_lm.storage.remote_sync import fetch_logs, remote_folder

_ENOUGH = 4  # of the newest: where all of them turn out to be broken, an older one is not what is needed


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that looks complete: a step_N folder if `sharded`, else an epoch_N.pt. It was saved after `step`
    optimizer steps, in which `epoch` epochs were completed; 0 where an old file does not say."""

    url: str
    step: int
    epoch: int
    sharded: bool
    remote: bool

    @property
    def rank(self) -> tuple[int, int, bool, bool]:
        """The larger is preferred: what is newer, then what is sharded, then what is at hand."""
        return self.step, 0 if self.step else self.epoch, self.sharded, not self.remote


def candidates(cfg: CheckpointConfig, logging_cfg: LoggingConfig, paths: RunPaths) -> list[Candidate]:
    """The newest few checkpoints that `--resume` means, the one to prefer first; the same on all ranks. Collective.

    "latest": of the run's folder, of --checkpoint-dir and of the copy at --remote-sync; none where there is none yet.
    Logs that are further on in the copy are fetched from there. A path: that checkpoint, or the newest of the run's
    folder that it names. Those that are broken or incomplete are stepped over with a warning; weights without their
    optimizer come last. Only listings and small files are read.

    Raises:
        CheckpointError: a path where there is no checkpoint; "latest" where all that there are are broken.
        ConfigError: without "latest", where the copy holds a run of this name already.
    """
    return run_on_master(lambda: _candidates(cfg.resume, remote_folder(logging_cfg, paths.name), paths))


def _candidates(resume: str | None, remote: str | None, paths: RunPaths) -> list[Candidate]:
    if resume != "latest":
        if remote is not None:
            _refuse_existing(remote, paths)
        return [] if resume is None else named(resume)
    places = [paths.checkpoints, storage.join(paths.root, "checkpoints")] if paths.enabled else []
    if remote is not None:
        places.append(storage.join(remote, "checkpoints"))
        if paths.enabled and (fetched := fetch_logs(remote, paths.root)):
            logging.info(f"fetched {', '.join(fetched)} from {remote}")
    broken: list[str] = []
    found = newest(places, broken)
    if broken and not found:
        advice = "mend or remove them to go on, or start under another --name"
        raise CheckpointError(
            join_problems(broken, f"--resume latest: no checkpoint of this run can be read; {advice}")
        )
    afresh = f"no complete checkpoint in {' or '.join(dict.fromkeys(places)) or '--logs none'}, starting afresh"
    logging.info(f"--resume latest: {found[0].url if found else afresh}")
    return found


def named(path: str) -> list[Candidate]:
    """What a path means: a step_N folder, an epoch_N.pt or other file of weights, or the newest of a run's folder."""
    path = path.rstrip("/")
    if step_number(path) is not None:
        if problem := incompleteness(path):
            raise CheckpointError(f"{path} cannot be resumed from: {problem}")
        return [_sharded(path)]
    if storage.info(path) is not None:
        return [_interchange(path)]
    found = newest([path, storage.join(path, "checkpoints")])
    if not found:
        raise CheckpointError(
            f"{path}: there is no such checkpoint{files.neighbours(path)}; expected an epoch_N.pt, a step_N folder, or "
            "the folder of a run with such"
        )
    return found


def newest(places: list[str], broken: list[str] | None = None) -> list[Candidate]:
    """The newest few complete checkpoints of some folders, the one to prefer first. What is wrong with those that were
    stepped over goes to `broken`; one that was never completed is not among them."""
    weights_only: list[Candidate] = []
    problems: list[str] = [] if broken is None else broken
    streams = []
    for place in dict.fromkeys(places):  # one that is named twice is looked into once
        streams += [_sharded_of(place, problems), _interchange_of(place, problems, weights_only)]
        streams += [_latest_of(place, problems)]
    merged = heapq.merge(*streams, key=lambda candidate: candidate.rank, reverse=True)
    return [*itertools.islice(merged, _ENOUGH), *weights_only]


# ---------------------------------------------------------------------------------------------- one folder
# Each of these looks at a checkpoint only when it is asked for: a run may have hundreds, and the newest one serves.
def _sharded_of(place: str, broken: list[str]) -> Iterator[Candidate]:
    for url in reversed(step_folders(place).values()):
        if problem := incompleteness(url):
            _step_over(url, problem, broken if storage.exists(storage.join(url, INDEX)) else [])
        else:
            yield _sharded(url)


def _interchange_of(place: str, broken: list[str], weights_only: list[Candidate]) -> Iterator[Candidate]:
    """Those without an optimizer's file are put into `weights_only`."""
    for url in reversed(files.numbered(place).values()):
        if problem := files.incompleteness(url):
            _step_over(url, problem, broken)
        elif files.has_optimizer(url):
            yield _interchange(url)
        else:
            _step_over(url, "its optimizer file is missing or broken", broken)
            weights_only.append(_interchange(url))


def _latest_of(place: str, broken: list[str]) -> Iterator[Candidate]:
    url = storage.join(place, files.file_name("epoch", files.LATEST))
    if storage.info(url) is None:
        return
    if problem := files.incompleteness(url):
        _step_over(url, problem, broken)
    else:
        yield _interchange(url)


def _step_over(url: str, problem: str, broken: list[str]) -> None:
    broken.append(f"{url}: {problem}")
    logging.warning(f"checkpoint {url} is stepped over: {problem}")


def _sharded(url: str) -> Candidate:
    progress = saved_progress(url, sharded=True)
    return Candidate(url, progress.step or 0, progress.epoch, sharded=True, remote=storage.is_remote(url))


def _interchange(url: str) -> Candidate:
    progress = saved_progress(url, sharded=False)
    return Candidate(url, progress.step or 0, progress.epoch, sharded=False, remote=storage.is_remote(url))


def saved_progress(url: str, sharded: bool) -> Progress:
    """What a checkpoint says of its run, without reading a tensor."""
    if not sharded:
        return Progress.from_meta(files.read_meta(url))
    stored = StoredTensors(url)
    return Progress.from_json({"step": stored.step, **stored.extra.get("progress", {})})


def _refuse_existing(remote: str, paths: RunPaths) -> None:
    if not os.path.exists(paths.log) and storage.exists(storage.join(remote, "out.log")):
        raise ConfigError(
            f"--remote-sync: a run of this name exists already at {remote}; "
            "continue it with --resume latest, or choose another --name"
        )
