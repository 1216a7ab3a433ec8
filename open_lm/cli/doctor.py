"""Check this machine: packages and versions, devices, kernels, disks, limits and network.

    open-lm doctor
    open-lm doctor --offline --json

Each check runs in a process of its own for at most --timeout seconds, so that a package that crashes or hangs is
reported like the others. The exit code is 1 if something that training or preprocessing needs is broken, else 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec

from open_lm.cli.doctor_findings import ERROR, NOTE, OK, WARNING, Finding
from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, run_cli
from open_lm.storage import split_lines
from open_lm.system.cpus import available_cpus

CHECKS = {
    "system": "operating system, processor, threads and limits",
    "packages": "installed versions, their requirements on each other and known-bad pairs",
    "torch": "torch, its devices and the backends of torch.distributed",
    "imports": "packages with compiled code for particular versions",
    "kernels": "kernels in use, and why others are not",
    "storage": "free space",
    "network": "reach of S3 and of the Hugging Face hub, and credentials",
}
# Packages that are known to fail or crash when they are imported with another torch or CUDA.
IMPORTS = ("torchvision", "transformers", "bitsandbytes", "torchao", "triton", "xformers", "ray")
_MARKS = {OK: "ok", NOTE: "--", WARNING: "??", ERROR: "!!"}
_NEEDED = ("system", "packages", "torch", "storage")  # checks that must finish
_MAX_OUTPUT = 300  # characters of the output of a check that failed


def run_check(words: Sequence[str], timeout_s: float) -> list[Finding]:
    """Return the findings of a check, which runs in a process of its own; `words` are its name and argument."""
    command = [sys.executable, "-m", "open_lm.cli.doctor_checks", *words]
    check, name = words[0], words[-1]
    status = ERROR if check in _NEEDED else WARNING
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        advice = "try again with a larger --timeout, or see what hangs: " + " ".join(command)
        return [Finding(check, name, status, f"the check has not finished after {timeout_s:g} s", advice)]
    lines = split_lines(result.stdout)
    if result.returncode or not lines:
        words = " ".join(result.stderr.split())[-_MAX_OUTPUT:]
        ended = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
        return [Finding(check, name, status, f"the check ended with {ended}: {words or 'no output'}")]
    return [Finding(**values) for values in json.loads(lines[-1])]


def format_findings(findings: Sequence[Finding]) -> str:
    """Return the findings by check, then a summary."""
    lines: list[str] = []
    width = max(len(finding.name) for finding in findings)
    for check, title in CHECKS.items():
        rows = [finding for finding in findings if finding.check == check]
        lines += [f"{check}: {title}"] if rows else []
        for row in rows:
            lines.append(f"  {_MARKS[row.status]}  {row.name:{width}}  {row.text}")
            lines += [f"      {'':{width}}  -> {row.advice}"] if row.advice else []
    counts = {status: sum(finding.status == status for finding in findings) for status in (ERROR, WARNING)}
    return "\n".join([*lines, "", f"{counts[ERROR]} errors (!!), {counts[WARNING]} warnings (??)"])


def main(argv: list[str]) -> None:
    """Print the findings of all checks.

    Raises:
        SystemExit: 1, something needed is broken.
    """
    parser = FlagParser.of_program("open-lm doctor", __doc__, allow_abbrev=False)
    parser.add_argument("--offline", action="store_true", help="leave out the check of the network")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="longest time of a check (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not args.timeout > 0:
        raise ConfigError(f"--timeout: found {args.timeout:g}, expected a number of seconds above 0")
    checks: list[tuple[str, ...]] = [
        (name,) for name in CHECKS if name != "imports" and not (args.offline and name == "network")
    ]
    checks += [("imports", module) for module in IMPORTS if find_spec(module) is not None]
    with ThreadPoolExecutor(2 * available_cpus()) as pool:
        findings = [item for part in pool.map(lambda words: run_check(words, args.timeout), checks) for item in part]
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1, allow_nan=False))
    else:
        print(format_findings(findings))
    if any(finding.status == ERROR for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
