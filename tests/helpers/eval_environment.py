"""The environment with llm-foundry and torch 2.7, in which some tests run their programs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVAL_PYTHON = os.path.expanduser(os.environ.get("OPEN_LM_EVAL_PYTHON") or str(ROOT / ".venv-eval" / "bin" / "python"))
needs_eval_environment = pytest.mark.skipif(
    not os.access(EVAL_PYTHON, os.X_OK), reason="no .venv-eval with llm-foundry; `make install-eval` creates it"
)


@dataclass(frozen=True)
class Result:
    """Exit codes of the processes of a program, and what they wrote to stdout and stderr."""

    codes: list[int]
    output: str
    errors: str


class EvalServer:
    """A process of the environment that has imported llm-foundry and forks the programs of tests."""

    def __init__(self) -> None:
        server = Path(__file__).with_name("eval_server.py")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [EVAL_PYTHON, str(server)], env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(
        self,
        words: Sequence[str],
        processes: int = 1,
        *,
        folder: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        stdin: str = "",
        check: bool = True,
    ) -> Result:
        """Run `python words` in `folder` on each process; with `check`, all exit codes must be 0."""
        request: dict[str, Any] = {"words": list(words), "processes": processes, "folder": str(folder), "input": stdin}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({**request, "variables": dict(variables or {})}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the evaluation environment ended with code {self._process.wait()}"
        result = Result(**json.loads(answer))
        assert not check or not any(result.codes), f"{result.output[-3000:]}\n{result.errors[-6000:]}"
        return result

    def close(self) -> None:
        self._process.communicate()
