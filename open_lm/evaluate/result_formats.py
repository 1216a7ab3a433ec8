"""Results of in-context learning in the formats of DCLM's exp_data/evals and of Hugging Face's model cards."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

import yaml

from open_lm import storage
from open_lm.config.evaluation_sections import BASELINE_VERSIONS
from open_lm.errors import DataError, join_problems
from open_lm.evaluate.checkpoints import results_folder
from open_lm.evaluate.icl.aggregates import aggregate_members, aggregate_score
from open_lm.evaluate.icl.metrics import HARNESS_PREFIX, Outcome
from open_lm.evaluate.icl.report import METRIC_LABELS, read_json

_CURRENT = BASELINE_VERSIONS[0]
_PARTIAL = "_partial.json"


def dclm_form(files: Sequence[str], name: str, model_uuid: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the results of one model as the content of a file in DCLM's exp_data/evals, and what was left out.

    `eval_metrics.icl` has the score of each task under its label. A task of DCLM with another number of shots is left
    out, because its label names a single number of shots. The aggregates of DCLM's aggregated_metrics.py follow, except
    for those that need its table of categories; that program adds them to the file.

    Args:
        files: results of eval_openlm_ckpt.py for the same weights; their tasks are combined.
        name: name of the evaluation.
        model_uuid: the uuid of the model's file in exp_data/models; None for none.

    Raises:
        DataError: a file that is no such result, or results of different weights.
    """
    results = _read(files)
    contents = [content for content, _ in results]
    outcomes: list[Outcome] = []
    harness: list[Outcome] = []
    for _, new in results:
        for outcome in new:
            (harness if outcome.kind.startswith(HARNESS_PREFIX) else outcomes).append(outcome)
    icl = dict[str, float]()
    omitted = [f"{outcome.task} {outcome.shots}-shot: it is a task of lm-eval" for outcome in harness]
    dclm_shots = dict(aggregate_members("extended").keys())
    for outcome in outcomes:
        label, shots = outcome.task, outcome.shots
        expected_shots = dclm_shots.get(label, shots)
        if outcome.score is None:
            omitted.append(f"{label} {shots}-shot: it has no score")
        elif shots != expected_shots:
            omitted.append(f"{label} {shots}-shot: DCLM's task has {expected_shots} shots")
        elif label in icl:
            omitted.append(f"{label} {shots}-shot: another result has this label")
        else:
            icl[label] = outcome.score
    facts = sorted(str(content.get("weights_sha256") or content["checkpoint"]) for content in contents)
    content = {
        "name": name,
        "uuid": str(uuid.UUID(hashlib.sha256("\n".join([name, *facts]).encode()).hexdigest()[:32])),
        "model": contents[0]["model"],
        "creation_date": datetime.now(timezone.utc).strftime("%Y_%m_%d-%H_%M_%S"),
        "eval_metrics": {"icl": icl},
        **({"model_uuid": model_uuid} if model_uuid else {}),
        **_dclm_aggregates(outcomes, icl),
    }
    return content, omitted


def _dclm_aggregates(outcomes: Sequence[Outcome], icl: Mapping[str, float]) -> dict[str, Any]:
    """Return the aggregates under DCLM's names; a text with the missing tasks where some are missing."""
    missing = [label for label, _ in aggregate_members("extended") if label not in icl]
    values: dict[str, Any] = {"missing tasks": str(missing)}
    for name, keys in (
        ("extended", ("aggregated_results", "aggregated_centered_results")),
        ("core", ("low_variance_datasets", "low_variance_datasets_centered")),
    ):
        members = {label: base for (label, _), base in aggregate_members(name).items() if label in icl}
        centered = [(icl[label] - base) / (1 - base) for label, base in members.items()]
        values |= dict(zip(keys, (_mean([icl[label] for label in members]), _mean(centered)), strict=True))
        for version in BASELINE_VERSIONS:
            aggregate = aggregate_score(outcomes, name, version)
            text = f"N/A due to missing tasks: {aggregate.missing}"
            values[f"{name.capitalize()}_{version}"] = text if aggregate.score is None else aggregate.score
        values[name.capitalize()] = values[f"{name.capitalize()}_{_CURRENT}"]
    return {**values, "eval_version": _CURRENT}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read(files: Sequence[str]) -> list[tuple[dict[str, Any], list[Outcome]]]:
    """Return the content and the outcomes of results of the same weights."""
    results = [read_json(file) for file in files]
    hashes = {file: content.get("weights_sha256") for file, (content, _) in zip(files, results, strict=True)}
    known = {file: value for file, value in hashes.items() if value}  # llm-foundry's results state none
    if len(set(known.values())) > 1:
        listed = [f"{file}: weights {value[:12]}…" for file, value in known.items()]
        raise DataError(join_problems(listed, "results of different weights; pass those of one checkpoint"))
    return results


def full_results(checkpoint: str) -> list[str]:
    """Return the results of a checkpoint in evals/ next to it, without those of a part of the tasks or examples."""
    stem = PurePath(checkpoint.rstrip("/")).name.removesuffix(".pt")
    files = storage.list_files(results_folder(checkpoint))
    names = sorted(file for file in files if PurePath(file).name.startswith(f"{stem}_") and file.endswith(".json"))
    return [file for file in names if not file.endswith(_PARTIAL)]


def model_index(files: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Return the `model-index` of a model card with the scores in some results; empty without any.

    Each entry states the task, the number of shots, the metric and the engine.

    Raises:
        DataError: a file that is no result, or results of different weights.
    """
    entries = []
    for content, outcomes in _read(files):
        entries += [_index_entry(outcome, str(content["engine"])) for outcome in outcomes if outcome.score is not None]
    return [{"name": name, "results": entries}] if entries else []


def _index_entry(outcome: Outcome, engine: str) -> dict[str, Any]:
    label = METRIC_LABELS.get(outcome.metric, outcome.metric)
    name = f"{label}, {outcome.shots}-shot ({engine})"
    metric = {"type": label.replace(" ", "_"), "name": name, "value": outcome.score}
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"type": outcome.task, "name": outcome.task, "args": {"num_few_shot": outcome.shots}},
        "metrics": [metric],
    }


def with_model_index(card: str, index: Sequence[Mapping[str, Any]], label: str) -> str:
    """Return the text of a model card with this `model-index` in its front matter, in place of an earlier one.

    Args:
        card: the text, which begins with the front matter between two lines "---" if it has one.
        index: the result of `model_index`.
        label: the file of the card, for messages.

    Raises:
        DataError: front matter that is not YAML.
    """
    match = re.match(r"---\n(.*?)^---\n", card, re.DOTALL | re.MULTILINE)
    try:
        fields = (yaml.safe_load(match[1]) or {}) if match else {}
    except yaml.YAMLError as error:
        raise DataError(f"{label}: the front matter is not YAML ({error}); correct it") from error
    fields = {**fields, "model-index": [dict(entry) for entry in index]}
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{card[match.end() :] if match else card}"
