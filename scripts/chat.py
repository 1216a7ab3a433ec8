#!/usr/bin/env python
"""`open-lm chat` without the console command; the code is in open_lm.cli.chat."""

import sys

from open_lm.cli.chat import main
from open_lm.errors import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
