"""Ranks of a process group that are forked from a server process, so that torch is imported only once.

A test process has one fork server. The first use starts it; conftest.py lists the modules that it imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from open_lm.errors import end_process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(worker: Callable[[int, Path], None], folder: Path, world_size: int = 2) -> None:
    """Run worker(rank, folder) in the processes of a gloo group."""
    args = (worker, str(folder), world_size, free_port())
    mp.start_processes(_run_worker, args=args, nprocs=world_size, start_method="forkserver")


def _run_worker(rank: int, worker: Callable[[int, Path], None], folder: str, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        worker(rank, Path(folder))
    finally:
        dist.destroy_process_group()
    end_process(0)


def run_ranks(
    world_size: int,
    module: str,
    *args: str,
    folder: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module args` on each rank of a node, in the working directory `folder`; return their output.

    The ranks get this process's environment, the variables that torchrun sets for each rank, and `env`. If a rank
    fails, kill the others, and return its exit code.
    """
    context = multiprocessing.get_context("forkserver")
    outputs = [folder / f"ranks_{free_port()}.{stream}" for stream in ("stdout", "stderr")]
    variables = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        **(env or {}),
    }
    processes = []
    for rank in range(world_size):
        rank_variables = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_run_module, args=(module, args, str(folder), rank_variables, outputs))
        process.start()
        processes.append(process)
    try:
        exit_code = _wait_for_all(processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
        for path in outputs:
            path.unlink(missing_ok=True)
    if exit_code is None:
        raise subprocess.TimeoutExpired([module, *args], timeout_s, stdout, stderr)
    return subprocess.CompletedProcess([module, *args], exit_code, stdout, stderr)


def _wait_for_all(processes: list[Any], deadline: float) -> int | None:
    """Return 0 when all processes have ended, the exit code of the first that fails, or None at the deadline."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return None
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return int(process.exitcode)
    return 0


def _run_module(
    module: str, args: tuple[str, ...], folder: str, variables: Mapping[str, str], outputs: list[Path]
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    # The fork server has the environment of the test that started it.
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # as in a new process; the server's children use "forkserver"
    torch.set_num_threads(1)
    sys.argv[1:] = args
    runpy.run_module(module, run_name="__main__", alter_sys=True)
