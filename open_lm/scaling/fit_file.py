"""Write a fit to a JSON file, and read it again: `predict` and `report` need no second fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.errors import DataError
from open_lm.scaling.candidates import Candidate, Member
from open_lm.scaling.error_fit import ErrorFit
from open_lm.scaling.error_law import COEFFICIENTS, ErrorFits
from open_lm.scaling.fitting import ScalingFit
from open_lm.scaling.points import Selection
from open_lm.scaling.runs import Run, parse_run
from open_lm.scaling.settings import Settings
from open_lm.storage.strict_json import to_json

_FORMAT = "open_lm.scaling_fit/2"


def write_fit(path: str, fit: ScalingFit) -> None:
    """Write a fit with its runs, coefficients and resamples."""
    numbers = {id(run): number for number, run in enumerate(fit.table)}
    selection = fit.selection
    content = {
        "format": _FORMAT,
        "created": fit.created,
        "targets": [list(target) for target in fit.targets],
        "settings": asdict(fit.settings),
        "coefficients": fit.coefficients,
        "runs": [run.values() for run in fit.table],
        "loss_runs": [numbers[id(run)] for run in selection.loss],
        "error_runs": [numbers[id(run)] for run in selection.error],
        "excluded": [[numbers[id(run)], reason] for run, reason in selection.excluded],
        "warnings": fit.warnings,
        "members": [_member_values(member) for member in fit.members],
        "error": None if fit.error is None else _error_values(fit.error),
    }
    storage.write_text(path, to_json(content) + "\n")


def _member_values(member: Member) -> dict[str, Any]:
    return {
        "candidate": asdict(member.candidate),
        "weight": member.weight,
        "theta": member.theta.tolist(),
        "held_out": [errors.tolist() for errors in member.held_out],
        "at_bounds": member.at_bounds,
        "draws": member.draws.tolist(),
    }


def _error_values(error: ErrorFit) -> dict[str, Any]:
    return {
        "tasks": list(error.tasks),
        "fit": {name: getattr(error.fit, name).tolist() for name in COEFFICIENTS},
        "draws": {name: getattr(error.draws, name).tolist() for name in COEFFICIENTS},
        "held_out": error.held_out.tolist(),
    }


def read_fit(path: str) -> ScalingFit:
    """Return a fit that `write_fit` wrote.

    Raises:
        DataError: another file.
    """
    try:
        content = json.loads(storage.read_text(path))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise DataError(f"{path}: expected a file that `fit --output` wrote, with format {_FORMAT!r}")
        settings = {**content["settings"], "error_tasks": tuple(content["settings"]["error_tasks"])}
        table = [parse_run(record) for record in content["runs"]]
        return ScalingFit(
            settings=Settings(**settings),
            selection=_selection(content, table),
            table=table,
            members=[_member(values) for values in content["members"]],
            error=None if content["error"] is None else _error(content["error"]),
            warnings=list(content["warnings"]),
            targets=[(params, tokens) for params, tokens in content["targets"]],
            created=str(content["created"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a fit ({error}); write it again with `fit --output`") from error


def _selection(content: dict[str, Any], table: list[Run]) -> Selection:
    return Selection(
        loss=[table[number] for number in content["loss_runs"]],
        error=[table[number] for number in content["error_runs"]],
        excluded=[(table[number], reason) for number, reason in content["excluded"]],
    )


def _member(values: dict[str, Any]) -> Member:
    return Member(
        candidate=Candidate(**values["candidate"]),
        theta=np.array(values["theta"]),
        held_out=[np.array(errors) for errors in values["held_out"]],
        at_bounds=values["at_bounds"],
        pooled=np.array(values["theta"]),
        weight=values["weight"],
        draws=np.array(values["draws"]),
    )


def _error(values: dict[str, Any]) -> ErrorFit:
    fit, draws = (ErrorFits(*(np.array(values[key][name]) for name in COEFFICIENTS)) for key in ("fit", "draws"))
    return ErrorFit(tuple(values["tasks"]), fit, draws, np.array(values["held_out"]))
