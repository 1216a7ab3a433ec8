"""The preprocessing benchmark finds the functions whose time it sums in the profile."""

from __future__ import annotations

import re
from pathlib import Path

import bench_preprocess
import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_OPEN_LM = [(function, module) for function, module in bench_preprocess.STEPS.values() if module not in ("", "HASH")]


@pytest.mark.parametrize(("function", "module"), [("decompress", "compression"), *IN_OPEN_LM])
def test_profiled_functions_exist(function: str, module: str) -> None:
    folders = (ROOT / "open_lm" / "data", ROOT / "datapreprocess")
    (path,) = (path for folder in folders for path in folder.rglob(f"{module}.py"))
    assert re.search(rf"^ *def {function}\(", path.read_text(), re.MULTILINE), f"{path} has no function {function}"
