"""Run the command line of open_lm.scaling."""

import sys

from open_lm.errors import run_cli
from open_lm.scaling.command import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
