"""Write JSON that every parser reads: no NaN, no infinities, no lone surrogates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from open_lm.system.names import printable


def to_json(value: Any, **options: Any) -> str:
    """Return `value` as strict JSON; `options` are those of json.dumps."""
    return json.dumps(json_value(value), allow_nan=False, **options)


def json_value(value: Any) -> Any:
    """Return `value` with NaN and infinities as None, scalars of numpy and torch as numbers, and printable names."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {printable(key) if isinstance(key, str) else key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return json_value(value.item()) if hasattr(value, "item") else value
