"""Run programs several times with one import of llm-foundry, which takes longer than the runs.

`python icl_runs.py RUNS` in eval/, with the Python of .venv-eval. RUNS is JSON: [[processes, words], ...], where words
are a program and its arguments. The processes of a run are forked with the variables that torchrun sets. Writes the
output of each run as JSON.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import tempfile

sys.path.insert(0, os.getcwd())
import icl_run  # noqa: F401 (imports llm-foundry)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(num_processes: int, words: list[str]) -> str:
    """Return the output of a run; exit with its output if it fails."""
    port = free_port()
    with tempfile.TemporaryFile() as output:
        children = []
        for rank in range(num_processes):
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                if num_processes > 1:
                    start_rank(rank, num_processes, port)
                sys.argv = words
                runpy.run_path(sys.argv[0], run_name="__main__")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        text = output.read().decode(errors="replace")
    if any(codes):
        sys.exit(f"exit codes {codes}\n{text[-6000:]}")
    return text


def start_rank(rank: int, num_processes: int, port: int) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(num_processes)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    print(json.dumps([run(num_processes, words) for num_processes, words in json.loads(sys.argv[1])]))
