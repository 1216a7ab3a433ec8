"""Compare results of in-context learning: differences to the first file, with intervals and p-values.

    python -m open_lm.evaluate.compare checkpoints/evals/A.json checkpoints/evals/B.json
    python -m open_lm.evaluate.compare checkpoints/evals/step_*_core.json --plot curve.svg

The files are those of eval_openlm_ckpt.py, of all engines. If two evaluations used the same prompts and the results of
each example are stored (--engine native or lm-eval), the tests are paired: McNemar's exact test, and a bootstrap over
the examples for averages and tasks with categories. Otherwise they are unpaired, and the table says so.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from open_lm.errors import ConfigError, run_cli
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path
from open_lm.system.program import program_name

if TYPE_CHECKING:
    from open_lm.evaluate.icl.comparison import PairReport

SCHEMA = "open_lm.icl_comparison/1"  # of --json


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("python -m open_lm.evaluate.compare"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "results", type=user_path, nargs="+", metavar="FILE", help="JSON results; the first is the one to compare with"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON in place of the tables")
    parser.add_argument(
        "--plot",
        type=user_path,
        metavar="FILE",
        help="also draw the scores over the tokens (or steps, or epochs) of the checkpoints to a .svg or .html file",
    )
    return parser


def main(argv: list[str]) -> list[PairReport]:
    """Run the command and return the comparisons.

    Raises:
        UserError: unusable arguments or files, or files without a common task.
    """
    args = build_parser().parse_args(argv)
    from open_lm.evaluate.icl.comparison import compare, format_report, read_result  # imports torch
    from open_lm.evaluate.icl.curves import Point, check_plot, write_plot

    if len(args.results) < 2:
        raise ConfigError("expected at least two files of results, found one; add those to compare it with")
    if args.plot:
        check_plot(args.plot)
    results = [read_result(path) for path in args.results]
    reports = [compare(results[0], result) for result in results[1:]]
    if args.json:
        files = [
            {"file": result.path, **{key: value for key, value in result.content.items() if key != "tasks"}}
            for result in results
        ]
        comparisons = [asdict(report) for report in reports]
        print(to_json({"schema": SCHEMA, "files": files, "comparisons": comparisons}, indent=2))
    else:
        print("\n\n".join(format_report(r, args.results[0], i) for i, r in enumerate(reports, start=2)))
    if args.plot:
        write_plot(args.plot, [Point(r.path, r.content, r.outcomes) for r in results])
        print(f"plot written to {args.plot}", file=sys.stderr)
    return reports


if __name__ == "__main__":
    sys.exit(run_cli(main))
