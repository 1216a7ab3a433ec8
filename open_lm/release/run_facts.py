"""Read what a bundle needs of a finished run: settings, checkpoints, data record and architecture.

Its metrics and results are those of `open_lm.report.collect`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.errors import CheckpointError, ConfigError, DataError
from open_lm.monitor.run_folder import RunPaths
from open_lm.system.names import unescape

if TYPE_CHECKING:
    from open_lm.config.fields import FieldSpec


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: a step_N folder or an epoch_N.pt, saved after `step` steps and `tokens` tokens."""

    url: str
    step: int
    epoch: int
    tokens: int | None
    is_final: bool

    @property
    def label(self) -> str:
        """The name of its folder in a bundle."""
        return f"step_{self.step:08d}" if self.step else f"epoch_{self.epoch}"


@dataclass(frozen=True)
class RunFacts:
    """A run folder, read once.

    Attributes:
        folder: the run folder.
        params: the lines of params.txt by key.
        checkpoints: one per training step, ascending; the last one has the final weights.
        data: the content of data.json; None without it.
        architecture: the complete settings of the model.
    """

    folder: Path
    params: Mapping[str, str]
    checkpoints: tuple[Checkpoint, ...]
    data: Mapping[str, Any] | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.params.get("name") or self.folder.name

    @property
    def final(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def intermediate(self) -> tuple[Checkpoint, ...]:
        return self.checkpoints[:-1]

    def setting(self, name: str) -> Any:
        """Return the value of a flag with its type; None if the run does not record it."""
        from open_lm.config.command_line import all_specs

        return parse_setting(self.params[name], all_specs()[name]) if name in self.params else None


def read_run(folder: str | os.PathLike[str]) -> RunFacts:
    """Read a run folder.

    Raises:
        ConfigError: no local run folder, or a run that has not finished.
        CheckpointError: a run without checkpoints.
    """
    root = Path(folder)
    if storage.is_remote(str(folder)):
        raise ConfigError(f"{folder}: expected a local run folder; copy the run to this machine first")
    if not (root / "params.txt").is_file():
        raise ConfigError(
            f"{folder}: expected the folder of a run, {{logs}}/{{name}}, with its params.txt; found no such file"
        )
    params = _read_params(root / "params.txt")
    paths = RunPaths(str(root.parent), root.name, _optional(params.get("checkpoint_dir")))
    tokens = _tokens_per_sequence(params)
    checkpoints = _checkpoints(list(dict.fromkeys([str(root / "checkpoints"), paths.checkpoints])), tokens)
    if not checkpoints:
        raise CheckpointError(f"{folder}: has no complete checkpoint; a release needs at least the final weights")
    _check_finished(root, checkpoints[-1])
    return RunFacts(
        folder=root,
        params=params,
        checkpoints=tuple(checkpoints),
        data=_json_object(root / "data.json"),
        architecture=_architecture(checkpoints[-1].url),
    )


def parse_setting(text: str, spec: FieldSpec) -> Any:
    """Return the value of a flag from its text in params.txt. Raise ValueError if it does not fit the flag."""
    import ast

    if text == "None" and (spec.optional or spec.kind is not str):
        return None
    if spec.many:
        values = ast.literal_eval(text)
        return [spec.kind(value) for value in (values if isinstance(values, list | tuple) else [values])]
    return text == "True" if spec.kind is bool else spec.kind(text)


# ------------------------------------------------------------------------------------------------------- checkpoints
def _checkpoints(folders: list[str], tokens_per_sequence: int) -> list[Checkpoint]:
    """Return one checkpoint per step, ascending. A sharded one is preferred, because it is read tensor by tensor."""
    from open_lm.checkpoint import files
    from open_lm.checkpoint.finding import saved_progress
    from open_lm.checkpoint.folders import step_folders
    from open_lm.checkpoint.tensor_index import incomplete_reason

    found: dict[tuple[int, int], Checkpoint] = {}
    for folder in folders:
        candidates = [(url, False) for url in files.epoch_files(folder).values()]
        candidates += [(url, True) for url in step_folders(folder).values()]
        for url, is_sharded in candidates:
            if (incomplete_reason if is_sharded else files.incomplete_reason)(url):
                continue
            progress = saved_progress(url, is_sharded)
            is_final = progress.is_final or bool(not is_sharded and files.read_meta(url).get("is_final_checkpoint"))
            tokens = None if progress.samples_seen is None else progress.samples_seen * tokens_per_sequence
            step = progress.step or 0
            key = (step, 0 if step else progress.epoch)
            found[key] = Checkpoint(url, step, progress.epoch, tokens or None, is_final)
    return [found[key] for key in sorted(found)]


def _check_finished(root: Path, final: Checkpoint) -> None:
    if not final.is_final:
        raise ConfigError(
            f"{root}: the run has not finished: its newest checkpoint, {final.label}, is not the last one of its "
            "training; continue it with --resume latest, and release it then"
        )


def _tokens_per_sequence(params: Mapping[str, str]) -> int:
    return int(params["seq_len"]) if params.get("seq_len", "").isdigit() else 0


def _architecture(checkpoint: str) -> Mapping[str, Any]:
    from argparse import Namespace

    from open_lm.config.architecture import read_run_settings, resolve_architecture
    from open_lm.config.sections import ModelConfig

    return resolve_architecture(ModelConfig.from_object(Namespace(**read_run_settings(checkpoint))))


# -------------------------------------------------------------------------------------------------------------- files
def _read_params(path: Path) -> dict[str, str]:
    lines = (line.partition(": ") for line in storage.read_lines(path))
    return {key.removesuffix(":"): unescape(value) for key, _, value in lines}


def _optional(text: str | None) -> str | None:
    return None if text in (None, "None", "") else text


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(storage.read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); restore the file") from error
    return value if isinstance(value, dict) else None
