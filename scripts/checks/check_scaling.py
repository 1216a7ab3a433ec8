"""Compare the default prediction of open_lm.scaling with the procedure of Gadre et al. 2024 on their published runs.

    python scripts/checks/check_scaling.py RUNS.json [--loss c4_val] [--held-out]

RUNS.json is the table of their runs. Both procedures use runs of at most the compute of the paper's largest fitting
point, which differs between the loss and the error: to predict the error, the paper fits a run of 1.4B parameters as
well. Prints, for each target of each training set, the measured loss and error, both predictions with their relative
errors, and whether the interval covers the measured value.

With --held-out, prints instead how well the default predicts sizes that it has not seen, without any target: each size
but the smallest is left out in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from open_lm.errors import run_cli
from open_lm.scaling.candidates import judged
from open_lm.scaling.error_law import mean_error
from open_lm.scaling.fitting import Prediction, fit_runs
from open_lm.scaling.points import same, scales
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


def held_out(runs: Sequence[Run], loss: str, kind: str) -> list[tuple[str, list[float], list[bool]]]:
    """Return (name, relative errors, whether the interval covers) of the runs of each size that was left out."""
    targets = {(train, *point) for train, points in TARGETS.items() for point in points}
    known = [
        run for run in runs if run.flops <= MAX_FLOPS[kind] and (run.train, run.params, run.tokens) not in targets
    ]  # fmt: skip
    results = []
    for train in TARGETS:
        for size in scales([run for run in known if run.train == train])[1:]:
            rest = [run for run in known if not same(run.params, size[0].params)]
            fit = fit_runs(rest, Settings(loss, train=train, resamples=400))
            errors, covered = [], []
            for run in judged(size):
                item = fit.predict(run.params, run.tokens)
                measured = run.losses[loss][0] if kind == "loss" else mean_error(run, PAPER_TASKS)
                low, high = getattr(item, f"{kind}_interval")
                errors.append(getattr(item, kind) / measured - 1)
                covered.append(low <= measured <= high)
            results.append((f"{train}, {size[0].params / 1e6:,.0f}M", errors, covered))
    return results


def print_held_out(runs: Sequence[Run], loss: str) -> None:
    """Print errors and coverage on sizes that were left out."""
    for kind in MAX_FLOPS:
        results = held_out(runs, loss, kind)
        for name, errors, covered in results:
            print(f"{kind}, {name}: mean {100 * np.mean(errors):+.2f} %, covered {sum(covered)} of {len(covered)}")
        error = np.sqrt(np.mean([np.mean(np.square(errors)) for _, errors, _ in results]))
        covered = [value for *_, values in results for value in values]
        print(f"{kind}: root mean square error {100 * error:.2f} %, covered {sum(covered)} of {len(covered)}")


def main(argv: list[str]) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=user_path, metavar="RUNS.json", help="table of runs")
    parser.add_argument("--loss", default="c4_val", help="validation set (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="predict sizes left out of the fit in place of targets")
    args = parser.parse_args(argv)
    runs = read_runs([args.runs])
    if args.held_out:
        print_held_out(runs, args.loss)
        return
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
