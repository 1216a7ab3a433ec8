"""Kill the preprocessor at random moments, start it again, and see whether the output is that of an undisturbed run.

    python scripts/kill_preprocess.py --input-files raw --tokenizer tokenizer.json --kills 20 -- --ray-address local

The moments are spread over the time that an undisturbed run takes to its last file. A killed command is started again
on what it left, and that start may be killed again; whenever one lives to its end, every file of the output is compared
with the undisturbed one's, and the next starts afresh. What follows `--` goes to make_2048. Linux only.
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

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Trial:
    """The command with its output folder, and how often it was killed there."""

    command: Sequence[str]
    out: Path
    kills: int = 0

    def start(self, moment_s: float | None) -> float | None:
        """Run the command, to its end or to the moment. Returns the seconds it took, None where it was killed."""
        mark = uuid.uuid4().hex
        began = time.monotonic()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="kp") as folder:
            environment = {**os.environ, MARK: mark, "TMPDIR": folder, "RAY_TMPDIR": folder}
            process = subprocess.Popen(
                [*self.command, "--output-dir", str(self.out)],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(moment_s)
            except subprocess.TimeoutExpired:
                code = None
            taken_s = time.monotonic() - began
            os.killpg(process.pid, signal.SIGKILL) if code is None else None
            process.wait()
            end_all(mark)
            if code:
                log.seek(0)
                raise DataError(f"the command failed with exit code {code}:\n{log.read().decode(errors='replace')}")
        self.kills += code is None
        return taken_s if code == 0 else None

    def done(self) -> str:
        """What is there, in a few words."""
        files = [path for path in self.out.rglob("*") if path.is_file()]
        count = {
            "units": sum(path.name.startswith("unit-") and path.suffix == ".json" for path in files),
            "shards": sum(path.suffix == ".tar" and not path.name.startswith(".") for path in files),
            "manifests": sum(path.name == "manifest.jsonl" for path in files),
            "torn files": sum(".open-lm-part-" in path.name for path in files),
        }
        found = ", ".join(f"{number} {name}" for name, number in count.items() if number) or "nothing"
        return found + (", finished" if any(path.name == "dataset.json" for path in files) else "")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of an output by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """What differs between two outputs, in words; empty where nothing does."""
    words = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    words += [f"superfluous {name}" for name in sorted(found.keys() - expected.keys())]
    words += [
        f"other bytes in {name}" for name in sorted(expected) if found.get(name, expected[name]) != expected[name]
    ]
    return "; ".join(words)


def kill_many(command: Sequence[str], folder: Path, kills: int, seed: int) -> int:
    """Print a line for every start; returns how many outputs differed from the undisturbed one."""
    clean = Trial(command, folder / "clean")
    began = time.time()
    clean.start(None)
    duration_s = max(path.stat().st_mtime for path in clean.out.rglob("dataset.json")) - began
    expected = tree(clean.out)
    print(f"undisturbed: {duration_s:.1f} s, {len(expected)} files, {sum(map(len, expected.values())):,} bytes")
    chance = random.Random(seed)
    moments = [duration_s * (number + chance.random()) / kills for number in range(kills)]
    chance.shuffle(moments)
    trial, outputs, differing, killed = Trial(command, folder / "out"), 0, 0, 0
    while killed < kills:
        moment_s = moments[killed]
        taken_s = trial.start(moment_s)
        if taken_s is None:
            killed += 1
            place = f"kill {killed:3} of {kills} after {moment_s:5.2f} s, number {trial.kills} of its output"
            print(f"{place}: {trial.done()}")
            continue
        if not trial.kills:  # faster than the undisturbed run: this moment never comes
            moments[killed] *= 0.9
        outputs, differing = outputs + bool(trial.kills), differing + finish(trial, expected, taken_s)
    if trial.kills:
        taken_s = trial.start(None)
        assert taken_s is not None, "it was not to be killed"
        outputs, differing = outputs + 1, differing + finish(trial, expected, taken_s)
    print(json.dumps({"kills": kills, "outputs": outputs, "differing": differing}))
    return differing


def finish(trial: Trial, expected: dict[str, bytes], taken_s: float) -> bool:
    """Compare a finished output and make room for the next; whether it differs."""
    words = difference(tree(trial.out), expected)
    print(f"  finished in {taken_s:.1f} s after {trial.kills} kills: {words or 'every byte as undisturbed'}")
    shutil.rmtree(trial.out)
    trial.kills = 0
    return bool(words)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-files", nargs="+", required=True, help="as make_2048 takes them")
    parser.add_argument("--tokenizer", required=True, help="as make_2048 takes it")
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("more", nargs="*", help="after `--`: further arguments of make_2048")
    args = parser.parse_args(argv)
    command = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", *args.input_files]
    command += ["--tokenizer", args.tokenizer, *args.more]
    with tempfile.TemporaryDirectory(prefix="kill-preprocess-") as folder:
        differing = kill_many(command, Path(folder), args.kills, args.seed)
    if differing:
        raise DataError(f"{differing} outputs differ from that of the undisturbed run")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
