"""Compare the default prediction of open_lm.scaling with the procedure of Gadre et al. 2024 on their published runs.

    python scripts/checks/check_scaling.py RUNS.json [--loss c4_val]

RUNS.json is the table of their runs. Both procedures use runs of at most the compute of the paper's largest fitting
point, which differs between the loss and the error: to predict the error, the paper fits a run of 1.4B parameters as
well. Prints, for each target of each training set, the measured loss and error, both predictions with their relative
errors, and whether the interval covers the measured value.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from open_lm.errors import run_cli
from open_lm.scaling.error_law import mean_error
from open_lm.scaling.fitting import Prediction, fit_runs
from open_lm.scaling.runs import Run, read_runs
from open_lm.scaling.settings import PAPER_TASKS, Settings
from open_lm.system.names import user_path

# Compute of the paper's largest fitting points: 411M and, for the error, 1.4B parameters at 20 tokens per parameter.
MAX_FLOPS = {"loss": 2.04e19, "error": 2.5e20}
TARGETS = {
    "rpj": ((1_439_795_200, 921_468_928_000), (6_889_410_560, 137_788_211_200)),
    "c4_original": ((1_439_795_200, 115_183_616_000), (6_889_410_560, 137_788_211_200)),
}


def predictions(
    runs: Sequence[Run], train: str, loss: str, kind: str, resamples: int = 1000
) -> list[tuple[Run, Prediction, Prediction]]:
    """Return (measured run, prediction of the paper's procedure, default prediction) of each target.

    Args:
        runs: the table.
        train: training set.
        loss: validation set.
        kind: "loss" or "error", what the predictions are used for.
        resamples: resamples of the intervals.
    """
    paper = fit_runs(runs, Settings(loss, train=train, law="over-training", points="paper", resamples=resamples))
    default = fit_runs(runs, Settings(loss, train=train, max_flops=MAX_FLOPS[kind], resamples=resamples))
    measured = {(run.params, run.tokens): run for run in runs if run.train == train}
    return [(measured[point], paper.predict(*point), default.predict(*point)) for point in TARGETS[train]]


def main(argv: list[str]) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=user_path, metavar="RUNS.json", help="table of runs")
    parser.add_argument("--loss", default="c4_val", help="validation set (default: %(default)s)")
    args = parser.parse_args(argv)
    runs = read_runs([args.runs])
    errors: dict[str, list[tuple[float, float]]] = {kind: [] for kind in MAX_FLOPS}
    covered = []
    print("| data | parameters | tokens | measured | paper | error % | default | error % | 90 % interval | covered |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind, values in errors.items():
        for train in TARGETS:
            for run, paper, default in predictions(runs, train, args.loss, kind):
                measured = run.losses[args.loss][0] if kind == "loss" else mean_error(run, PAPER_TASKS)
                assert measured is not None
                first, second = getattr(paper, kind), getattr(default, kind)
                low, high = getattr(default, f"{kind}_interval")
                values.append((100 * abs(first / measured - 1), 100 * abs(second / measured - 1)))
                covered.append(low <= measured <= high)
                print(
                    f"| {train}, {kind} | {run.params:,} | {run.tokens:,} | {measured:.4f} | {first:.4f} | "
                    f"{values[-1][0]:.4f} | {second:.4f} | {values[-1][1]:.4f} | {low:.4f}-{high:.4f} | "
                    f"{'yes' if covered[-1] else 'no'} |"
                )
    for kind, values in errors.items():
        paper_mean, default_mean = np.mean(values, axis=0)
        print(f"mean relative error of the {kind}: paper {paper_mean:.3f} %, default {default_mean:.3f} %")
    print(f"covered: {sum(covered)} of {len(covered)}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
