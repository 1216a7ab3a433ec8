"""Read and write tables of runs: a JSON list with one object per run.

Required keys: params, tokens, losses ({validation set: [loss, lower, upper]} with the ends of the 95 % interval, or a
number). Optional: accuracy ({task: share of correct examples}), and those of `_OPTIONAL`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.config.architecture import CONFIG_DIR
from open_lm.errors import DataError, join_problems
from open_lm.storage.strict_json import to_json

DEFAULT_VOCAB = 50432  # of the model configurations in model_configs/
_SHAPE = re.compile(r"(?:^|_)d=(\d+)(?:_|$)")  # width in a model name such as d=96_l=8_h=4
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "train": (str,),
    "model": (str,),
    "token_multiplier": (int, float),
    "active_params": (int,),
    "params_non_embedding": (int,),
    "flops": (int, float),
    "lr": (int, float),
    "wd": (int, float),
    "warmup": (int,),
    "global_batch": (int,),
    "seq_len": (int,),
    "vocab_size": (int,),
    "tokenizer": (str,),
    "validation": (dict,),
    "source": (str,),
    "started": (str,),
    "ended": (str,),
    "diverged": (bool,),
}


@dataclass(frozen=True)
class Run:
    """A trained model and its measurements.

    Attributes:
        params: number of parameters N.
        tokens: number of training tokens D.
        losses: (loss, lower, upper) by validation set; the ends are those of the 95 % interval.
        accuracy: share of correct examples by task.
        facts: values of the optional keys.
    """

    params: int
    tokens: int
    losses: Mapping[str, tuple[float, float, float]]
    accuracy: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Training compute 6 N D."""
        return 6.0 * self.params * self.tokens

    @property
    def multiplier(self) -> float:
        """Token multiplier M = D / N."""
        return self.tokens / self.params

    @property
    def train(self) -> str:
        """Name of the training data; "" if unknown."""
        return str(self.facts.get("train", ""))

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        name = self.facts.get("name") or self.facts.get("model") or "run"
        return f"{name} ({self.params:,} parameters, {self.tokens:,} tokens{f', {self.train}' if self.train else ''})"

    @property
    def active_params(self) -> int | None:
        """Number of parameters in matrix products: all but an input embedding that is a mere lookup; None if unknown.

        These are the parameters that FLOPs per token depend on.
        """
        if "active_params" in self.facts:
            return int(self.facts["active_params"])
        embedding = embedding_size(str(self.facts.get("model", "")))
        return None if embedding is None or embedding >= self.params else self.params - embedding

    def values(self) -> dict[str, Any]:
        """Return the JSON form."""
        losses = {name: list(values) for name, values in self.losses.items()}
        return {
            **self.facts, "params": self.params, "tokens": self.tokens, "losses": losses, "accuracy": {**self.accuracy}
        }  # fmt: skip


@functools.cache
def embedding_size(model: str) -> int | None:
    """Return the size of a model's input embedding, 0 if the output layer shares it; None for an unknown model.

    `model` is a name of model_configs/ or has the form d=WIDTH_l=LAYERS_h=HEADS, with the default vocabulary.
    """
    shape = _SHAPE.search(model)
    if shape:
        return int(shape[1]) * DEFAULT_VOCAB
    path = CONFIG_DIR / f"{model}.json"
    if not model or Path(model).name != model or not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return 0 if values["weight_tying"] else values["vocab_size"] * values["hidden_dim"]


def active_params(params: float, runs: Sequence[Run]) -> float:
    """Return the active parameters of a model of `params` parameters of the family of `runs`.

    The input embedding of a size that no run has is interpolated in log-log space between runs, or extrapolated.
    Return `params` if the active parameters of the runs are unknown or equal to all parameters.
    """
    sizes = {run.params: run.params - active for run in runs if (active := run.active_params) is not None}
    if params in sizes:
        return params - sizes[round(params)]
    known = sorted((math.log(size), math.log(lookup)) for size, lookup in sizes.items() if lookup > 0)
    if len(known) < 2:
        return params
    x = math.log(params)
    upper = min(max(1, sum(size < x for size, _ in known)), len(known) - 1)
    (x0, y0), (x1, y1) = known[upper - 1], known[upper]
    return max(params - math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0)), 0.5 * params)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read the runs of all files.

    Raises:
        DataError: files that are missing or not JSON, and all invalid runs by file, number and key.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in paths:
        try:
            content = json.loads(storage.read_text(path))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error}); expected a list of runs") from error
        if not isinstance(content, list):
            raise DataError(f"{path}: found a {type(content).__name__}, expected a list of runs")
        for number, record in enumerate(content):
            try:
                runs.append(parse_run(record))
            except ValueError as error:
                problems.append(f"{path}, run {number}: {error}")
    if problems:
        raise DataError(join_problems(problems, "invalid runs"))
    if not runs:
        raise DataError(f"{', '.join(paths)}: no runs")
    return runs


def write_runs(path: str, runs: Sequence[Run]) -> None:
    """Write a table of runs; see `read_runs`."""
    storage.write_bytes(path, (to_json([run.values() for run in runs], indent=1) + "\n").encode())


def parse_run(record: Any) -> Run:
    """Return the run of a JSON object.

    Raises:
        ValueError: names the key, what was found and what was expected.
    """
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}, expected an object")
    unknown = record.keys() - _OPTIONAL.keys() - {"params", "tokens", "losses", "accuracy"}
    if unknown:
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
    facts = {}
    for key, kinds in _OPTIONAL.items():
        value = record.get(key)
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{key}: found {value!r}, expected a {' or '.join(kind.__name__ for kind in kinds)}")
        facts[key] = value
    losses = _mapping(record, "losses")
    return Run(
        params=_count(record, "params"),
        tokens=_count(record, "tokens"),
        losses={name: _loss(name, value) for name, value in losses.items()},
        accuracy={name: _share(name, value) for name, value in _mapping(record, "accuracy").items()},
        facts=facts,
    )


def _count(record: Mapping[str, Any], key: str) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
        raise ValueError(f"{key}: found {value!r}, expected a positive integer")
    return round(value)


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: found {value!r}, expected an object")
    return value


def _loss(name: str, value: Any) -> tuple[float, float, float]:
    """Return (loss, lower, upper). A loss that is not finite (null in JSON) belongs to a diverged run."""
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 3) or any(isinstance(v, bool) or not isinstance(v, int | float | None) for v in values):
        raise ValueError(f"losses, {name}: found {value!r}, expected a number or [loss, lower, upper]")
    loss, lower, upper = (float("nan") if v is None else float(v) for v in (values * 3 if len(values) == 1 else values))
    if loss <= 0 or lower > loss or upper < loss:
        raise ValueError(f"losses, {name}: found {value!r}, expected 0 < lower <= loss <= upper")
    return loss, lower, upper


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"accuracy, {name}: found {value!r}, expected a number from 0 to 1")
    return float(value)
