"""Read run folders, local or remote, into `records.Run`: everything that a run leaves on disk.

metrics.jsonl, out.log, params.txt, model.json, data.json, environment.json, icl.jsonl, samples.jsonl,
checkpoints/results.jsonl, checkpoints/evals/*.json, and the names and sizes of checkpoints. Any of them may be missing:
a run may be in progress, stopped, failed, or one of the original OpenLM, which has no metrics.jsonl. A file that cannot
be read becomes a problem of the run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from open_lm import storage
from open_lm.checkpoint.folders import INCOMPLETE, INDEX
from open_lm.errors import ConfigError, UserError
from open_lm.report import result_files
from open_lm.report.data_sources import read_sources
from open_lm.report.log_file import RunLog, read_log
from open_lm.report.metrics_file import read_metrics
from open_lm.report.privacy import public, public_values
from open_lm.report.problems import find_problems
from open_lm.report.records import (
    RESTART,
    SETTINGS_OF_A_PROCESS,
    WARNING,
    Checkpoint,
    Event,
    Problem,
    Run,
    SettingChange,
)
from open_lm.report.summary import summarize
from open_lm.storage.paths import FileInfo
from open_lm.system.names import printable, unescape

T = TypeVar("T")
D = TypeVar("D")

_EVALUATION = re.compile(r"(?:.*/)?evals/[^/]+\.json")
_CHECKPOINT = re.compile(r"(?:.*/)?checkpoints/(step_\d+|epoch_(?:\d+|latest)\.pt)(\.incomplete)?(?:/.*)?")
_RUN_FILES = ("out.log", "params.txt", "metrics.jsonl", "checkpoints/results.jsonl")
_SOURCE_COPY = re.compile(r"code/.*\.(py|json|yaml|cpp|h)")


def collect_runs(urls: Sequence[str]) -> list[Run]:
    """Read runs; each gets a name that differs from those of the others.

    Raises:
        UserError: a folder or URL that has no run, or cannot be listed.
    """
    runs = [collect_run(url) for url in dict.fromkeys(urls)]
    words = [[word for word in run.url.split("/") if word] for run in runs]
    for count in range(2, max(map(len, words), default=0) + 1):  # parent folders, for runs with equal names
        number = Counter(run.name for run in runs)
        for run, parts in zip(runs, words, strict=True):
            if number[run.name] > 1:
                run.name = "/".join(parts[-count:])
    return runs


def collect_run(url: str) -> Run:
    """Read a run.

    Raises:
        UserError: the folder has no run, or cannot be listed.
    """
    return _Collector(url).collect()


class _Collector:
    def __init__(self, url: str) -> None:
        self._root = url if storage.is_remote(url) else os.path.normpath(storage.local_path(url))
        self.files = _list_files(self._root)
        if not any(name in self.files for name in _RUN_FILES):
            below = _runs_below(self.files)
            if below or not any(map(_CHECKPOINT.fullmatch, self.files)):
                found = f"a folder with the runs {_listed(below)}; name them" if below else _listed(self.files)
                raise ConfigError(
                    f"{public(url)}: expected the folder of a run, {{logs}}/{{name}}, with at least one of "
                    f"{', '.join(_RUN_FILES)} or a checkpoint; found {found}"
                )
        self.run = Run(url=public(url), name=_folder_name(self._root))
        self._unreadable: list[Problem] = []

    def collect(self) -> Run:
        run = self.run
        run.settings = self._read("params.txt", _read_settings, {})
        self._add_checkpoint_dir()
        run.architecture = self._read("model.json", _read_object, {})
        run.environment = public_values(self._read("environment.json", _read_object, {}))
        metrics_url = self.files.get("metrics.jsonl")
        if metrics_url is not None:
            run.metrics = self._read("metrics.jsonl", read_metrics, run.metrics)
        log = self._read("out.log", lambda url: read_log(url, with_metrics=metrics_url is None), RunLog())
        if metrics_url is None:
            run.metrics = log.metrics
        run.starts, run.messages = log.starts, log.messages
        for message in run.messages:
            message.text = public(message.text)
        run.events = _joined([*log.events, *_environment_restarts(run)])
        run.changes = setting_changes(run)
        run.settings = run.settings or (run.starts[-1].settings if run.starts else {})
        self._collect_results()
        run.sources = self._read("data.json", lambda url: read_sources(_read_object(url), run), []) or read_sources(
            {}, run
        )
        run.settings = public_values(run.settings)
        run.checkpoints = _checkpoints(self.files)
        run.code_sha256 = self._code_digest()
        run.summary = summarize(run, log)
        run.problems = [*self._unreadable, *find_problems(run, log)]
        return run

    def _add_checkpoint_dir(self) -> None:
        """Add the files of the folder in --checkpoint-dir, if the run has one that can still be listed."""
        folder = self.run.settings.get("checkpoint_dir", "None")
        if folder in ("None", ""):
            return
        url = storage.join(folder, self.run.settings.get("name", self.run.name))
        try:
            for name, file in _list_files(url).items():
                self.files.setdefault(name, file)
        except UserError as error:
            self._report_unreadable(f"--checkpoint-dir {folder}", error)

    def _collect_results(self) -> None:
        run = self.run
        run.validations = self._read_lines("checkpoints/results.jsonl", result_files.validation)
        run.evaluations = self._read_lines("icl.jsonl", result_files.live_evaluation)
        for name in sorted(filter(_EVALUATION.fullmatch, self.files)):
            evaluation = self._read(name, result_files.stored_evaluation, None)
            run.evaluations += [] if evaluation is None else [evaluation]
        run.samples = self._read_lines("samples.jsonl", result_files.sample)

    def _read(self, name: str, read: Callable[[str], T], default: D) -> T | D:
        """Return what `read` returns for a file; the default if the run has no such file or it cannot be read."""
        file = self.files.get(name)
        if file is None:
            return default
        try:
            result = read(file.url)
        except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._report_unreadable(name, error)
            return default
        self.run.files.append(name)
        return result

    def _read_lines(self, name: str, convert: Callable[[Any], T]) -> list[T]:
        lines, num_damaged = self._read(name, lambda url: result_files.read_lines(url, convert), ([], 0))
        if num_damaged:
            self._unreadable.append(damaged_lines(name, num_damaged))
        return lines

    def _report_unreadable(self, name: str, error: Exception) -> None:
        self._unreadable.append(
            Problem(WARNING, "A file cannot be read", name, public(str(error)), "The report leaves out what it has.")
        )

    def _code_digest(self) -> str | None:
        """Return the sha256 of the names and contents in code/, a copy of the source; None without a local copy."""
        names = sorted(filter(_SOURCE_COPY.fullmatch, self.files))
        if not names or storage.is_remote(self._root):
            return None
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            digest.update(hashlib.sha256(storage.read_bytes(self.files[name].url)).digest())
        return digest.hexdigest()


def damaged_lines(name: str, number: int) -> Problem:
    """Return the problem of lines that could not be read."""
    what = "1 line is" if number == 1 else f"{number:,} lines are"
    return Problem(
        WARNING,
        "Damaged lines",
        name,
        f"{what} not in the expected format and left out",
        "A killed process can leave one incomplete line; more of them mean a damaged disk or two writers.",
    )


def _list_files(root: str) -> dict[str, FileInfo]:
    """Return the files of a folder by their path in it."""
    prefix = root.rstrip("/") + "/" if storage.is_remote(root) else ""
    found = {}
    for info in storage.list_infos(root, recursive=True):
        name = info.url.removeprefix(prefix) if prefix else os.path.relpath(info.url, root)
        if not storage.is_temporary(name):
            found[name] = info
    return found


def _folder_name(root: str) -> str:
    """Return the last part of a path or URL."""
    path = root if storage.is_remote(root) else os.path.abspath(root)
    return printable(path.rstrip("/").rpartition("/")[2] or path)


def _runs_below(files: Iterable[str]) -> list[str]:
    """Return the folders of runs directly below a folder with these files."""
    parts = (name.partition("/") for name in files)
    return sorted({folder for folder, _, rest in parts if rest in _RUN_FILES})


def _listed(files: Iterable[str]) -> str:
    names = sorted(files)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "no files"


def _read_settings(url: str) -> dict[str, str]:
    """Return the lines "key: value" of params.txt."""
    pairs = (line.partition(": ") for line in storage.read_lines(url))
    return {key: unescape(value) for key, sign, value in pairs if sign}


def _read_object(url: str) -> dict[str, Any]:
    content = orjson.loads(storage.read_bytes(url))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
    return content


# ---------------------------------------------------------------------------------------------- starts and settings
def _environment_restarts(run: Run) -> list[Event]:
    return [
        Event(start["step"], RESTART, f"started again at step {start['step']} ({start.get('time', 'time unknown')})")
        for start in run.environment_starts[1:]
        if isinstance(start.get("step"), int)
    ]


def _joined(events: Iterable[Event]) -> list[Event]:
    """Return the events by step; those of the same kind at the same step become one."""
    texts: dict[tuple[int, str], list[str]] = {}
    for event in events:
        texts.setdefault((event.step, event.kind), []).append(event.text)
    return [Event(step, kind, "; ".join(dict.fromkeys(found))) for (step, kind), found in sorted(texts.items())]


def setting_changes(run: Run) -> list[SettingChange]:
    """Return the settings that differ between the starts of a run, by the settings that out.log has of each."""
    return differing_settings([start.settings for start in run.starts if start.settings])


def differing_settings(settings: Sequence[Mapping[str, str]]) -> list[SettingChange]:
    """Return the settings that several runs or starts have and that are not equal in all of them.

    A setting that one of them lacks belongs to another version or program.
    """
    if len(settings) < 2:
        return []
    names = sorted(set.intersection(*map(set, settings)) - SETTINGS_OF_A_PROCESS)
    changed = {name: values for name in names if len(set(values := tuple(known[name] for known in settings))) > 1}
    changes = [SettingChange(name, tuple(map(public, values))) for name, values in changed.items()]
    return [change for change in changes if len(set(change.values)) > 1]


# ---------------------------------------------------------------------------------------------- checkpoints
def _checkpoints(files: Mapping[str, FileInfo]) -> list[Checkpoint]:
    """Return the checkpoints of a run from the names of its files, oldest first."""
    found: dict[str, list[tuple[str, FileInfo]]] = {}
    for name, info in files.items():
        match = _CHECKPOINT.fullmatch(name)
        if match is not None:
            found.setdefault(match[1] + (match[2] or ""), []).append((name, info))
    checkpoints = []
    for name, parts in found.items():
        is_folder = name.startswith("step_")
        is_complete = not name.endswith(INCOMPLETE)
        if is_folder and is_complete:
            is_complete = any(path.endswith(f"{name}/{INDEX}") for path, _ in parts)
        times = [info.mtime_s for _, info in parts if info.mtime_s]
        checkpoints.append(
            Checkpoint(name, sum(max(info.size, 0) for _, info in parts), max(times, default=None), is_complete)
        )
    return sorted(checkpoints, key=lambda item: (item.modified or 0.0, item.name))
