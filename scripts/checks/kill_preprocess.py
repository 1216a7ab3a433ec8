"""Kill the preprocessor at random times, restart it, and compare its output with that of an uninterrupted run.

    python scripts/kill_preprocess.py --input-files raw --tokenizer tokenizer.json --kills 20 -- --ray-address local

The kill times are spread over the duration of the uninterrupted run. A killed command is restarted in the same output
folder, where it may be killed again. When it finishes, every file is compared with the uninterrupted run, and the next
trial starts with an empty folder. Arguments after `--` are passed to make_2048. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marked_processes import MARK, end_all

from open_lm.errors import DataError, run_cli
from open_lm.system.names import input_pattern, user_path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Trial:
    """The command, its output folder, and the number of kills in this folder."""

    command: Sequence[str]
    out: Path
    kills: int = 0

    def start(self, kill_after_s: float | None) -> float | None:
        """Run the command, and kill it after `kill_after_s`. Return the duration in seconds, or None if killed."""
        mark = uuid.uuid4().hex
        started = time.monotonic()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="kp") as folder:
            environment = {**os.environ, MARK: mark, "TMPDIR": folder, "RAY_TMPDIR": folder}
            process = subprocess.Popen(
                [*self.command, "--output-dir", str(self.out)],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(kill_after_s)
            except subprocess.TimeoutExpired:
                code = None
            duration_s = time.monotonic() - started
            os.killpg(process.pid, signal.SIGKILL) if code is None else None
            process.wait()
            end_all(mark)
            if code:
                log.seek(0)
                raise DataError(f"the command failed with exit code {code}:\n{log.read().decode(errors='replace')}")
        self.kills += code is None
        return duration_s if code == 0 else None

    def describe_output(self) -> str:
        """Return a short description of the files in the output folder."""
        files = [path for path in self.out.rglob("*") if path.is_file()]
        count = {
            "units": sum(path.name.startswith("unit-") and path.suffix == ".json" for path in files),
            "shards": sum(path.suffix == ".tar" and not path.name.startswith(".") for path in files),
            "manifests": sum(path.name == "manifest.jsonl" for path in files),
            "incomplete files": sum(".open-lm-part-" in path.name for path in files),
        }
        text = ", ".join(f"{number} {name}" for name, number in count.items() if number) or "nothing"
        return text + (", finished" if any(path.name == "dataset.json" for path in files) else "")


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Describe the differences between two outputs; return "" if they are equal."""
    differences = [f"missing file {name}" for name in sorted(expected.keys() - found.keys())]
    differences += [f"unexpected file {name}" for name in sorted(found.keys() - expected.keys())]
    differences += [
        f"different content in {name}" for name in sorted(expected) if found.get(name, expected[name]) != expected[name]
    ]
    return "; ".join(differences)


def kill_many(command: Sequence[str], folder: Path, kills: int, seed: int) -> int:
    """Print one line per start, and return the number of outputs that differ from the uninterrupted one."""
    clean = Trial(command, folder / "clean")
    started = time.time()
    clean.start(None)
    duration_s = max(path.stat().st_mtime for path in clean.out.rglob("dataset.json")) - started
    expected = tree(clean.out)
    print(f"uninterrupted: {duration_s:.1f} s, {len(expected)} files, {sum(map(len, expected.values())):,} bytes")
    rng = random.Random(seed)
    kill_times_s = [duration_s * (number + rng.random()) / kills for number in range(kills)]
    rng.shuffle(kill_times_s)
    trial, outputs, differing, killed = Trial(command, folder / "out"), 0, 0, 0
    while killed < kills:
        kill_after_s = kill_times_s[killed]
        run_s = trial.start(kill_after_s)
        if run_s is None:
            killed += 1
            prefix = f"kill {killed:3} of {kills} after {kill_after_s:5.2f} s, kill {trial.kills} of this output"
            print(f"{prefix}: {trial.describe_output()}")
            continue
        if not trial.kills:  # it finished before the kill time: kill earlier
            kill_times_s[killed] *= 0.9
        outputs, differing = outputs + bool(trial.kills), differing + finish(trial, expected, run_s)
    if trial.kills:
        run_s = trial.start(None)
        assert run_s is not None, "started without a kill time"
        outputs, differing = outputs + 1, differing + finish(trial, expected, run_s)
    print(json.dumps({"kills": kills, "outputs": outputs, "differing": differing}, allow_nan=False))
    return differing


def finish(trial: Trial, expected: dict[str, bytes], run_s: float) -> bool:
    """Compare a finished output and delete it; return whether it differs."""
    differences = difference(tree(trial.out), expected)
    print(
        f"  finished in {run_s:.1f} s after {trial.kills} kills: {differences or 'identical to the uninterrupted run'}"
    )
    shutil.rmtree(trial.out)
    trial.kills = 0
    return bool(differences)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-files", type=input_pattern, nargs="+", required=True, help="input files of make_2048")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="tokenizer of make_2048")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default: 0)")
    parser.add_argument("make_2048_args", nargs="*", help="after `--`: further arguments of make_2048")
    args = parser.parse_args(argv)
    command = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", *args.input_files]
    command += ["--tokenizer", args.tokenizer, *args.make_2048_args]
    with tempfile.TemporaryDirectory(prefix="kill-preprocess-") as folder:
        differing = kill_many(command, Path(folder), args.kills, args.seed)
    if differing:
        raise DataError(f"{differing} outputs differ from that of the uninterrupted run")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
