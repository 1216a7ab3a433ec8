"""Collect runs into one table: run folders of this package, exports of W&B, and tables of runs.

An export of W&B is a JSON list, or JSON lines, of objects with `name`, `config` and `summary` (or `summaryMetrics`), as
its API returns them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError, DataError, UserError, join_problems
from open_lm.planner.shapes import ModelShape, shape_of
from open_lm.scaling.jobs import has_diverged
from open_lm.scaling.ladder_files import LADDER_FILE, read_ladder
from open_lm.scaling.runs import Run, parse_run

if TYPE_CHECKING:
    from open_lm.report.records import Run as RecordedRun
    from open_lm.report.records import TaskEvaluation

_SETTINGS = {"lr": float, "wd": float, "warmup": int, "global_batch_size": int}
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as W&B writes these numbers
_KEYS = {"global_batch_size": "global_batch"}


def collect(sources: Sequence[str], train: str | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs of all sources, and why others are left out.

    Args:
        sources: run folders, folders of ladders, W&B exports and tables of runs.
        train: name of the training data of run folders; default: the name of the file or folder of their data.

    Raises:
        DataError: no source has a run.
        ConfigError: a source that does not exist.
    """
    runs: list[Run] = []
    skipped: list[str] = []
    folders: set[str] = set()
    for source in sources:
        for record, origin in _records(source, train, skipped):
            try:
                run = parse_run(record)
            except ValueError as error:
                skipped.append(f"{origin}: {error}")
                continue
            folder = run.facts.get("source")
            if folder in folders:
                skipped.append(f"{origin}: the run in {folder} is part of an earlier source")
                continue
            folders |= {folder} if folder else set()
            runs.append(run)
    if not runs:
        raise DataError(join_problems(skipped or ["there are no runs"], f"{', '.join(sources)}: nothing to collect"))
    return runs, skipped


def _records(source: str, train: str | None, skipped: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (JSON form, origin) of the runs of a source."""
    if Path(source).is_dir():
        folders = [source]
        if (Path(source) / LADDER_FILE).is_file():
            folders = [planned.folder for planned in read_ladder(source).runs]
        for folder in folders:
            if not Path(folder).is_dir():
                skipped.append(f"{folder}: not trained yet")
                continue
            try:
                yield _folder_record(folder, train), folder
            except UserError as error:
                skipped.append(str(error))
        return
    text = storage.read_text(source)
    try:
        lines = storage.split_lines(text)
        content = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{source}: not JSON ({error}); expected a run folder, or a JSON list of runs") from error
    for number, record in enumerate(content):
        origin = f"{source}, run {number}"
        try:
            is_wandb = isinstance(record, dict) and "config" in record
            yield (_wandb_record(record) if is_wandb else record), origin
        except (TypeError, ValueError, AttributeError) as error:
            skipped.append(f"{origin}: expected an export of W&B with the objects config and summary ({error})")


# ---------------------------------------------------------------------------------------------- run folders
def _folder_record(folder: str, train: str | None) -> dict[str, Any]:
    """Return the JSON form of a finished run.

    Raises:
        UserError: not a run folder, an unfinished run, or one without a validation.
    """
    from open_lm.report.collect import collect_run
    from open_lm.report.records import FINISHED

    run = collect_run(folder)
    if has_diverged(folder):
        raise DataError(f"{folder}: diverged, so it has no final loss; train it with a lower --lr or a longer warmup")
    if run.summary.state != FINISHED:
        raise DataError(f"{folder}: {run.summary.state}, so its last loss is not that of its schedule; finish it")
    validations = [item for item in run.validations if item.average is None]
    if not validations or run.summary.tokens is None:
        raise DataError(f"{folder}: it has no validation; train it with --val-data")
    last = validations[-1]
    record: dict[str, Any] = {
        "name": run.name,
        "train": train or _data_name(run.settings),
        "model": run.summary.model,
        "tokens": last.tokens or run.summary.tokens,
        "losses": {part.name: [part.loss, *(part.interval or (part.loss, part.loss))] for part in last.sets},
        "validation": {part.name: f"{part.tokens} tokens{_bytes(part.bytes)}" for part in last.sets},
        "accuracy": _accuracies(run.evaluations, run.summary.step),
        "source": str(Path(folder)),
        **_times(run),
        **_known_settings(run.settings),
    }
    record |= _sizes(str(Path(folder) / "model.json"), run.settings, record["tokens"])
    if "params" not in record and run.summary.parameters is not None:
        record["params"] = run.summary.parameters
    tokenizer = _tokenizer(run.sources)
    return {**record, **({"tokenizer": tokenizer} if tokenizer else {})}


def _bytes(number: int | None) -> str:
    return "" if number is None else f" of {number} bytes"


def _times(run: RecordedRun) -> dict[str, str]:
    """Return the times of a run's first start and of its last metrics (UTC, ISO 8601)."""
    values = {"started": run.environment_starts[0].get("time")} if run.environment_starts else {}
    if len(run.metrics) and math.isfinite(run.metrics.times[-1]):
        values["ended"] = datetime.fromtimestamp(run.metrics.times[-1], timezone.utc).isoformat(timespec="seconds")
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _accuracies(evaluations: Sequence[TaskEvaluation], last_step: int | None) -> dict[str, float]:
    """Return the accuracies after the last step; a later evaluation replaces those of the same tasks.

    Several numbers of shots give several names. Evaluations of earlier steps and of a part of the examples are ignored.
    """
    scores: dict[str, float] = {}
    for evaluation in evaluations:
        if evaluation.examples_per_task is not None or evaluation.step not in (None, last_step):
            continue
        shots: dict[str, set[int]] = {}
        for task in evaluation.tasks:
            shots.setdefault(task.task, set()).add(task.shots)
        for task in evaluation.tasks:
            if task.score is not None and 0 <= task.score <= 1:
                several = len(shots[task.task]) > 1
                scores[f"{task.task}_{task.shots}shot" if several else task.task] = task.score
    return scores


def _data_name(settings: Mapping[str, str]) -> str:
    """Return the name of the folder of the first training data."""
    for key in ("dataset_manifest", "train_data", "train_text"):
        text = settings.get(key, "None").strip("[]'\"").split("'")[0]
        if text not in ("None", ""):
            return Path(text).parent.name or Path(text).stem
    return ""


def _known_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that the table holds."""
    values: dict[str, Any] = {}
    for key, kind in _SETTINGS.items():
        try:
            values[_KEYS.get(key, key)] = kind(settings[key])
        except (KeyError, TypeError, ValueError):
            continue
    return values


def _sizes(model: str, settings: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return the numbers of parameters and the exact FLOPs of a model; empty if the planner does not know it."""
    flags = {key: settings[key] for key in ("model_norm", "ffn_type", "positional_embedding_type") if key in settings}
    qk_norm = str(settings.get("qk_norm", "False")) == "True"
    try:
        shape: ModelShape = shape_of(ModelConfig(model=model, qk_norm=qk_norm, **flags))
    except UserError:
        return {}
    embedding = shape.vocab_size * shape.dim
    lookup = 0 if shape.weight_tying else embedding
    return {
        "params": shape.num_params,
        "active_params": shape.num_params - lookup,
        "params_non_embedding": shape.num_params - embedding - lookup,
        "flops": float(shape.flops_per_token) * tokens,
        "seq_len": shape.seq_len,
        "vocab_size": shape.vocab_size,
    }


def _tokenizer(sources: Sequence[Any]) -> str:
    """Return the fingerprint of the tokenizer of the training data; empty if the data record none."""
    prints = [dataset.get("settings", {}).get("tokenizer_fingerprint") for item in sources for dataset in item.datasets]
    return next((str(value) for value in prints if value), "")


# ---------------------------------------------------------------------------------------------- W&B
def _wandb_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON form of a run of W&B: metrics of this package have the same names there."""
    config = {
        key: value.get("value", value) if isinstance(value, dict) else value for key, value in record["config"].items()
    }
    summary = record.get("summary") or record.get("summaryMetrics") or {}
    losses = {}
    for key, value in summary.items():
        if (key.startswith("val/") and key.endswith("/loss")) or key == "val/loss":
            stem = key.removesuffix("loss")
            ends = [summary.get(f"{stem}loss_tokens_{end}_95", -1) for end in ("lower", "upper")]
            loss = None if value in _NOT_FINITE else value
            losses[stem.strip("/").removeprefix("val/")] = loss if -1 in ends else [loss, *ends]
    result: dict[str, Any] = {
        "name": record.get("name") or record.get("display_name"),
        "model": config.get("model"),
        "params": config.get("params") or summary.get("params"),
        "tokens": summary.get("tokens") or summary.get("train/tokens"),
        "losses": losses,
        **_known_settings(config),
    }
    sizes = _sizes(str(config.get("model")), config, int(result["tokens"] or 0))
    return sizes | {key: value for key, value in result.items() if value is not None}
