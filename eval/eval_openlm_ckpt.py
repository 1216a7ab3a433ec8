"""Evaluate checkpoints on in-context-learning tasks: `open-lm evaluate` with `--engine llm-foundry` as the default.

The code is in open_lm.evaluate.command.
"""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if importlib.util.find_spec("open_lm") is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from open_lm.evaluate.command import run

    run("llm-foundry")
