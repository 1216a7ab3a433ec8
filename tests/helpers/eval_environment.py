"""The environment with llm-foundry and torch 2.7, in which some tests run their programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVAL_PYTHON = os.path.expanduser(os.environ.get("OPEN_LM_EVAL_PYTHON") or str(ROOT / ".venv-eval" / "bin" / "python"))
needs_eval_environment = pytest.mark.skipif(
    not os.access(EVAL_PYTHON, os.X_OK), reason="no .venv-eval with llm-foundry; `make install-eval` creates it"
)
