"""`python -m open_lm.plan`; the code is in open_lm.planner.command."""

import sys

from open_lm.errors import run_cli
from open_lm.planner.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run_cli(main))
