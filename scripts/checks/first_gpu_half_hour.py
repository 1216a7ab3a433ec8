"""Check and measure on a GPU what only a GPU can show, in half an hour on one device.

    scripts/checks/first_gpu_half_hour.sh FOLDER                    all steps
    scripts/checks/first_gpu_half_hour.sh FOLDER --only "1b;fp8"    steps with these names
    scripts/checks/first_gpu_half_hour.sh FOLDER --cpu              tiny models on a CPU, to check this program

Every step runs in a process of its own and prints what was expected and what was found. A step that fails, or takes
longer than its limit, does not stop the others; steps for which no time is left are listed. FOLDER gets the output of
each step (NAME.log), and after each step results.json and the table results.md. Steps that compare with torchtitan do
so if --peer-python is given (`make install-titan` creates .venv-titan).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps import STEPS, Found, Machine, run_step

from open_lm.errors import ConfigError, run_cli
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file

BUDGET_S = 30 * 60.0
MIN_STEP_S = 20.0


@dataclass
class Row:
    """The result of a step.

    verdict: "as expected", "differs", "measured" (nothing to compare with), "failed", "too slow" or "no time left".
    """

    name: str
    expected: str
    found: str
    verdict: str
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


def run_all(folder: Path, names: Sequence[str], machine: Machine, budget_s: float) -> list[Row]:
    """Run the steps in processes of their own and write the results to `folder` after each."""
    end = time.monotonic() + budget_s
    rows: list[Row] = []
    for name in names:
        step = STEPS[name]
        limit_s = min(step.limit_s, end - time.monotonic())
        print(f"{name}: expected {step.expected}", flush=True)
        row = Row(name, step.expected, "", "no time left")
        if limit_s >= MIN_STEP_S:
            row = _run_isolated(folder, name, machine, limit_s)
        print(f"{name}: found {row.found or row.verdict} ({row.verdict}, {row.seconds:.0f} s)", flush=True)
        rows.append(row)
        write_results(folder, rows, machine)
    return rows


def _run_isolated(folder: Path, name: str, machine: Machine, limit_s: float) -> Row:
    result = folder / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(folder), "--run", name, *(["--cpu"] if machine.is_cpu else [])]
    command += ["--peer-python", machine.peer_python] if machine.peer_python else []
    row, start = Row(name, STEPS[name].expected, "", "failed"), time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run(command, check=False, timeout=limit_s, stdout=log, stderr=subprocess.STDOUT)
            row.found = f"exit code {done.returncode}, see {name}.log"
        except subprocess.TimeoutExpired:
            row.found, row.verdict = f"no result after {limit_s:.0f} s, see {name}.log", "too slow"
    row.seconds = time.monotonic() - start
    if result.exists():
        found = Found(**json.loads(result.read_text()))
        row.found, row.values = found.text, found.values
        row.verdict = "measured" if found.ok is None else "as expected" if found.ok else "differs"
    return row


def write_results(folder: Path, rows: Sequence[Row], machine: Machine) -> None:
    write_text(
        folder / "results.json", to_json({"machine": asdict(machine), "steps": [asdict(r) for r in rows]}, indent=1)
    )
    lines = ["| step | expected | found | verdict | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.name, row.expected, row.found, row.verdict, f"{row.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    write_text(folder / "results.md", "\n".join(lines) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_file, help="folder for the results")
    parser.add_argument("--cpu", action="store_true", help="run tiny models on a CPU")
    parser.add_argument("--only", metavar="NAMES", help=f"steps, separated by ;: {'; '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="time for all steps (default: 30)")
    parser.add_argument("--peer-python", type=user_file, metavar="PYTHON", help="interpreter with torchtitan")
    parser.add_argument("--run", choices=STEPS, help=argparse.SUPPRESS)  # in the process of a step
    return parser


def main(argv: Sequence[str]) -> None:
    args = make_parser().parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(is_cpu=args.cpu, peer_python=str(args.peer_python) if args.peer_python else None)
    if args.run:
        found = run_step(args.run, machine, args.folder)
        write_text(args.folder / f"{args.run}.json", to_json(asdict(found)))
        return
    names = list(STEPS) if args.only is None else args.only.split(";")
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise ConfigError(f"--only: found {', '.join(unknown)}, expected some of {', '.join(STEPS)}")
    rows = run_all(args.folder, names, machine, args.minutes * 60)
    print((args.folder / "results.md").read_text(), end="")
    if any(row.verdict in ("failed", "differs", "too slow") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
