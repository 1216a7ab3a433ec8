"""Run programs with one import of llm-foundry, which takes longer than the programs.

Start it with the Python of .venv-eval. Each line of its input is a request in JSON: `processes`, `words` (a program and
its arguments), `folder`, `variables` and `input`. The processes of a program are forked, with the variables that
torchrun sets. Each line of its output is an answer in JSON: the exit codes of the processes, and what they wrote.
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
from typing import Any

import open_lm.evaluate.engines.foundry
import open_lm.hf  # noqa: F401 (imports transformers)

TIMEOUT_S = 240  # of one program; a program takes seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the processes of a request. If one fails, kill the others. One that hangs prints its stack and fails."""
    port, running, codes = free_port(), set(), []
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(request["input"].encode())
        for rank in range(request["processes"]):
            child = os.fork()
            if child == 0:
                given.seek(0)
                for descriptor, file in enumerate((given, output, errors)):
                    os.dup2(file.fileno(), descriptor)
                start_program(request, rank, port)
            running.add(child)
        while running:
            child, status = os.wait()
            running.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1]:
                kill(running)
        output.seek(0)
        errors.seek(0)
        texts = {"output": output.read(), "errors": errors.read()}
    return {"codes": codes, **{name: text.decode(errors="replace") for name, text in texts.items()}}


def start_program(request: dict[str, Any], rank: int, port: int) -> None:
    """Run the program of a request in this process."""
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    if request["processes"] > 1:
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(request["processes"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = request["words"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (the parent's has its own buffer)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def kill(processes: set[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(run(json.loads(line))), flush=True)
    os._exit(0)  # without the time to release the modules
