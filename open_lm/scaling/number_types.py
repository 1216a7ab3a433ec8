"""Types of numeric flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

LADDER_FILE = "ladder.json"


def positive(text: str) -> float:
    """Return a positive number. Raise argparse.ArgumentTypeError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number such as 2e19")
    return value


def target(text: str) -> tuple[int, int]:
    """Return (parameters, tokens) of N:D, or of the target in the folder of a ladder.

    Raises:
        argparse.ArgumentTypeError: another text, or a ladder without a target.
    """
    if (Path(text).expanduser() / LADDER_FILE).is_file():
        return _target_of_ladder(text)
    params, sign, tokens = text.partition(":")
    try:
        values = round(float(params)), round(float(tokens))
    except (ValueError, OverflowError):
        values = (0, 0)
    if not sign or min(values) < 1:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected PARAMETERS:TOKENS such as 1.4e9:28e9, or the folder of a ladder with a target"
        )
    return values


def _target_of_ladder(folder: str) -> tuple[int, int]:
    try:
        content = json.loads((Path(folder).expanduser() / LADDER_FILE).read_text(encoding="utf-8"))
        params, tokens = content["target"]
        return int(params), int(tokens)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{folder}: {LADDER_FILE} has no target; write the ladder with `plan --target N:D`, or pass N:D"
        ) from error
