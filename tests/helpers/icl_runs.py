"""Run programs several times with one import of llm-foundry, which takes longer than the runs.

`python icl_runs.py RUNS` in eval/, with the Python of .venv-eval. RUNS is JSON: [[processes, words], ...], where words
are a program and its arguments. The processes of a run are forked with the variables that torchrun sets. Writes the
output of each run as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
from contextlib import suppress

import open_lm.evaluate.engines.foundry  # noqa: F401 (imports llm-foundry)

TIMEOUT_S = 240  # of one run; a run takes seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(num_processes: int, words: list[str]) -> str:
    """Return the output of a run; exit with its output if it fails.

    If a process fails, kill the others. A process that hangs prints its stack and fails.
    """
    port = free_port()
    with tempfile.TemporaryFile() as output:
        running = set()
        for rank in range(num_processes):
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
                if num_processes > 1:
                    start_rank(rank, num_processes, port)
                sys.argv = words
                runpy.run_path(sys.argv[0], run_name="__main__")
            running.add(child)
        codes = []
        while running:
            child, status = os.wait()
            running.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1]:
                kill(running)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if any(codes):
        sys.exit(f"exit codes {codes}\n{text[-6000:]}")
    return text


def kill(processes: set[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def start_rank(rank: int, num_processes: int, port: int) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(num_processes)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    print(json.dumps([run(num_processes, words) for num_processes, words in json.loads(sys.argv[1])]))
