"""Evaluate the runs of a ladder on tasks after their training, with `open-lm evaluate`.

The settings are in the base file of `plan`, under the key `evaluate`: flags of `open-lm evaluate`, and `when`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, UserError

KEY, WHEN_KEY = "evaluate", "when"
AFTER_RUN, AFTER_ALL = "run", "end"
RESULTS = "checkpoints/evals/ladder.json"  # in a run folder
_PLANNED = ("checkpoint", "output", "every")


def check_evaluation(settings: Any) -> dict[str, Any] | None:
    """Return the settings of the evaluation, with underscores in keys and a value for `when`; None without settings.

    Raises:
        ConfigError: settings that `open-lm evaluate` rejects.
    """
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{KEY}: found {settings!r}, expected flags of `open-lm evaluate` such as eval_yaml")
    values = {str(key).replace("-", "_"): value for key, value in settings.items()}
    when = values.setdefault(WHEN_KEY, AFTER_RUN)
    if when not in (AFTER_RUN, AFTER_ALL):
        raise ConfigError(
            f"{KEY}, {WHEN_KEY}: found {when!r}, expected {AFTER_RUN} (after each run) or {AFTER_ALL} (after all runs)"
        )
    planned = [key for key in _PLANNED if key in values]
    if planned:
        raise ConfigError(f"{KEY}: found {', '.join(planned)}, which `run` decides; remove them")
    from open_lm.evaluate.command import build_parser, check_arguments

    try:
        args = build_parser().parse_args(evaluation_flags(values, "run"))
        check_arguments(args)
    except UserError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    missing = [path for path in args.eval_yaml or () if not storage.exists(path)]
    if missing:
        raise ConfigError(f"{KEY}, eval_yaml: found no file {', '.join(missing)}; expected YAML files with tasks")
    return values


def evaluation_flags(settings: Mapping[str, Any], folder: str) -> list[str]:
    """Return the flags of `open-lm evaluate` for the newest checkpoint of a run folder."""
    flags = ["--checkpoint", folder, "--output", f"{folder}/{RESULTS}"]
    for key, value in settings.items():
        if key == WHEN_KEY or value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{key.replace('_', '-')}", *map(str, values)]
    return flags
