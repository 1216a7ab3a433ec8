"""All JSON that this project writes is strict: no NaN, no infinities."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from open_lm.storage.strict_json import to_json

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("open_lm", "datapreprocess", "eval", "scripts")


def test_values_that_are_not_finite_become_null() -> None:
    value = {
        "a": [math.nan, 1.5],
        "b": (-math.inf, None, True),
        "c": np.float32(2),
        "d": torch.tensor(math.inf),
        1: "x",
    }
    assert json.loads(to_json(value)) == {"a": [None, 1.5], "b": [None, None, True], "c": 2.0, "d": None, "1": "x"}
    with pytest.raises(TypeError):
        to_json({"path": Path("x")})


def test_no_program_writes_json_that_is_not_strict() -> None:
    """json.dumps writes a bare NaN by default: use `to_json`, or pass allow_nan=False."""
    found = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_json = isinstance(node.func.value, ast.Name) and node.func.value.id == "json"
            if is_json and node.func.attr in ("dump", "dumps") and "allow_nan" not in [k.arg for k in node.keywords]:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
