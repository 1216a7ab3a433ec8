"""Draw the curves of training runs as one SVG file.

    python scripts/e2e/plots.py temp_data/runs/debug --output plots.svg

The panels show the training and validation loss, the score of each in-context task with the score of random guessing,
and the metrics of the training over its steps. Several runs are drawn in the same panels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import DataError, run_cli
from open_lm.monitor.panels import Panel, Value, draw_panels
from open_lm.system.names import user_file

TRAINING_METRICS = {  # titles of panels by the names in metrics.jsonl
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens per second",
    "train/mfu": "model FLOP utilization",
    "train/peak_memory_bytes": "peak memory, bytes",
}
MAX_POINTS = 400  # of a curve


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file of a run. Raise DataError if it is missing or damaged."""
    if not path.exists():
        raise DataError(f"{path}: not found; expected the folder of a training run")
    try:
        return [json.loads(line) for line in storage.read_lines(path) if line]
    except ValueError as error:
        raise DataError(f"{path}: expected one JSON object per line ({error})") from error


def thin(values: Sequence[Value]) -> list[Value]:
    """Return at most MAX_POINTS values: of each group of neighbors the lowest and the highest, so spikes stay."""
    if len(values) <= MAX_POINTS:
        return list(values)
    size = math.ceil(2 * len(values) / MAX_POINTS)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    kept = []
    for group in groups:
        extremes = {min(group, key=lambda value: value.y), max(group, key=lambda value: value.y)}
        kept += sorted(extremes, key=lambda value: value.x)
    return kept


def curve(rows: Sequence[dict[str, Any]], name: str) -> list[Value]:
    """Return the finite values of a metric over the steps."""
    values = [
        Value(row["step"], row[name], None, f"{name} {row[name]:.5g}, step {row['step']:,}")
        for row in rows
        if isinstance(row.get(name), int | float)
    ]
    return thin(values)


def task_panels(runs: Sequence[Path]) -> Iterator[Panel]:
    """Yield a panel for each in-context task that was evaluated during training, with the intervals of the scores."""
    panels: dict[str, Panel] = {}
    for run in runs:
        for moment in read_rows(run / "icl.jsonl") if (run / "icl.jsonl").exists() else []:
            for task in moment["tasks"]:
                if task["score"] is None:
                    continue
                title = f"{task['task']} {task['shots']}-shot, accuracy"
                _, _, curves = panels.setdefault(title, (title, task["baseline"], {}))
                interval = None if task["interval"] is None else (task["interval"][0], task["interval"][1])
                label = f"{task['score']:.4f}, step {moment['step']:,}"
                curves.setdefault(run.name, []).append(Value(moment["step"], task["score"], interval, label))
    yield from panels.values()


def run_panels(runs: Sequence[Path]) -> list[Panel]:
    """Return all panels: losses, tasks, training metrics."""
    metrics = {run.name: read_rows(run / "metrics.jsonl") for run in runs}
    losses: dict[str, list[Value]] = {}
    for name, rows in metrics.items():
        losses[f"{name} train"] = curve(rows, "train/loss")
        validation = sorted({key for row in rows for key in row if key.startswith("val/") and key.endswith("/loss")})
        for key in validation:
            losses[f"{name} {key.removesuffix('/loss')}"] = curve(rows, key)
    panels: list[Panel] = [("training and validation loss", None, losses), *task_panels(runs)]
    for key, title in TRAINING_METRICS.items():
        panels.append((title, None, {name: curve(rows, key) for name, rows in metrics.items()}))
    shown = [(title, baseline, {name: c for name, c in curves.items() if c}) for title, baseline, curves in panels]
    return [panel for panel in shown if panel[2]]


def figure(runs: Sequence[Path]) -> str:
    """Return the curves of runs as SVG. Raise DataError for a folder without training metrics."""
    panels = run_panels(runs)
    if not panels:
        raise DataError(f"{', '.join(map(str, runs))}: metrics.jsonl has no training metrics")
    return draw_panels(panels, "step")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plots.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=user_file, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=user_file, required=True, help="SVG file to write")
    args = parser.parse_args(argv)
    storage.write_text(args.output, figure(args.runs))
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_cli(main))
