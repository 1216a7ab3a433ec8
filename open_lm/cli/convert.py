"""Run `open_lm.hf.convert`, whose package takes seconds to import, once the arguments are read."""

from __future__ import annotations

import sys

from open_lm.config.conversion_flags import build_parser, with_subcommand
from open_lm.errors import run_cli


def main(argv: list[str]) -> None:
    """Run the command; `open_lm.hf.convert.main` has the errors."""
    build_parser().parse_args(with_subcommand(argv))
    from open_lm.hf.convert import main as convert

    convert(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
