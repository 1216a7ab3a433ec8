"""Types of numeric flags."""

from __future__ import annotations

import argparse


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
    """Return (parameters, tokens) of N:D. Raise argparse.ArgumentTypeError for another text."""
    params, sign, tokens = text.partition(":")
    try:
        values = round(float(params)), round(float(tokens))
    except (ValueError, OverflowError):
        values = (0, 0)
    if not sign or min(values) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected PARAMETERS:TOKENS such as 1.4e9:28e9")
    return values
