"""`python -m open_lm.release`; the code is in open_lm.release.command."""

import sys

from open_lm.errors import run_cli
from open_lm.release.command import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
