"""Run the command line of lm-eval with the model "open_lm"."""

from __future__ import annotations

import sys

from open_lm.errors import run_cli
from open_lm.evaluate.lm_eval import register


def main(argv: list[str]) -> None:
    """Run a command of lm-eval: run, ls or validate, with its own arguments.

    Raises:
        UserError: unusable arguments of the model.
        ModuleNotFoundError: lm-eval is not installed.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(run_cli(main))
