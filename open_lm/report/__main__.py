"""Write one HTML file that shows one or several runs: curves, scores, samples, data, settings, problems.

    python -m open_lm.report logs/NAME --out report.html
    python -m open_lm.report logs/A logs/B s3://bucket/logs/C --out comparison.html

The file needs no network and no server. Several runs are drawn in the same figures, and the settings in which they
differ are listed. Runs may be in progress, stopped or failed, and may be those of the original OpenLM.
"""

from __future__ import annotations

import argparse
import os
import sys

from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, run_cli
from open_lm.system.names import local_path, user_path


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("open_lm.report", __doc__)
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="folder or URL of a run: {logs}/{name}")
    parser.add_argument("--out", type=user_path, metavar="FILE", required=True, help="path or URL of the HTML file")
    parser.add_argument("--title", help="heading of the page (default: the names of the runs)")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a folder that is no run, or a file that cannot be read or written.
    """
    args = build_parser().parse_args(argv)
    if os.path.isdir(local_path(args.out)):
        file = os.path.join(args.out, "report.html")
        raise ConfigError(f"--out {args.out}: found a folder, expected the path of a file, such as {file}")
    from open_lm import storage
    from open_lm.report import write_report

    write_report(args.runs, args.out, title=args.title)
    print(f"{args.out}: {len(args.runs)} {'run' if len(args.runs) == 1 else 'runs'}, {storage.size(args.out):,} bytes")


if __name__ == "__main__":
    sys.exit(run_cli(main))
