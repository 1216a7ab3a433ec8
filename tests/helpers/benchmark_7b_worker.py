"""A rank that measures several strategies of scripts/benchmark_7B in one process group.

Argument: JSON, a list of command lines of benchmark.py. Rank 0 prints a line of JSON with the list of results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark_7B"))

import benchmark

from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import init_runtime, shutdown
from open_lm.errors import end_process, run_cli


def main(argv: list[str]) -> None:
    runtime = init_runtime(ParallelConfig())
    results = []
    for command_line in json.loads(argv[0]):
        args, flags = benchmark.make_parser().parse_known_args(command_line)
        results.append(benchmark.measure(args, flags, runtime))
    shutdown(runtime)
    if runtime.is_master:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    end_process(run_cli(main))
