"""The data mixture of a run: tokens of each source as planned, seen and stored, and where they come from."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from open_lm.report.privacy import public, public_values
from open_lm.report.records import MixtureSource, Run
from open_lm.system.names import short_labels, unescape

_SEEN = "train/tokens/"  # and the label of a source


def read_sources(description: Mapping[str, Any], run: Run) -> list[MixtureSource]:
    """Return the sources of a run.

    Args:
        description: the content of data.json; of a run without it, the sources come from its settings.
        run: has the settings and the metrics.
    """
    if not description:
        return _from_settings(run)
    rows = description["sources"]
    names = [unescape(str(row["name"])) for row in rows]
    labels, seen = short_labels(names), _seen_tokens(names, run)
    seq_len = _integer(run.settings.get("seq_len"))
    shares = _shares([row["weight"] for row in rows])
    return [
        MixtureSource(
            name=public(name),
            planned_share=share,
            seen_tokens=seen.get(name),
            stored_tokens=None
            if seq_len is None or row.get("num_sequences") is None
            else row["num_sequences"] * seq_len,
            label=labels[name],
            fingerprint=str(row.get("fingerprint") or ""),
            num_shards=len(row.get("shards") or ()),
            datasets=tuple(map(public_values, row.get("datasets") or ())),
            parts=_parts(row.get("datasets") or ()),
        )
        for name, row, share in zip(names, rows, shares, strict=True)
    ]


def _parts(datasets: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the tokens of each source that was preprocessed to the folders, if there are several."""
    tokens: dict[str, int] = {}
    for dataset in datasets:
        for name, counts in dict(dataset.get("sources") or {}).items():
            tokens[public(name)] = tokens.get(public(name), 0) + int(counts["tokens"])
    return tokens


def _from_settings(run: Run) -> list[MixtureSource]:
    """Return the sources by the flags of a run without data.json, such as one of the original OpenLM."""
    flags = ("dataset_manifest", "train_data", "train_text")
    names = next((list(map(str, names)) for flag in flags if (names := _list(run.settings.get(flag)))), [])
    weights = _list(run.settings.get("train_data_mix_weights"))
    shares = _shares(weights if len(weights) == len(names) else [1] * len(names))
    seen = _seen_tokens(names, run)
    return [MixtureSource(public(name), share, seen.get(name), None) for name, share in zip(names, shares, strict=True)]


def _seen_tokens(names: Sequence[str], run: Run) -> dict[str, int]:
    labels = short_labels(list(names))
    last = {name: run.metrics.last(f"{_SEEN}{labels[name]}") for name in names}
    known = {name: round(tokens) for name, tokens in last.items() if tokens is not None}
    if not known and len(names) == 1 and len(run.metrics):
        tokens = run.metrics.tokens[np.isfinite(run.metrics.tokens)]
        if len(tokens):
            return {names[0]: round(float(tokens[-1]))}
    return known


def _shares(weights: Sequence[Any]) -> list[float | None]:
    """Return the share of each source; None where the weights cannot be read."""
    try:
        numbers = [Fraction(str(weight)) for weight in weights]
        return [float(number / sum(numbers)) for number in numbers]
    except (ValueError, ZeroDivisionError):
        return [None] * len(weights)


def _list(text: str | None) -> list[Any]:
    """Return the list that params.txt has as text; empty if it is none."""
    try:
        value = ast.literal_eval(text or "None")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return list(value) if isinstance(value, list | tuple) else []


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
