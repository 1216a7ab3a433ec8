"""Import all modules and run tests as on a system without Linux's own functions and without /proc and /sys (macOS).

Use: `python without_linux.py pytest ARGUMENTS...`, or `python without_linux.py loader MANIFEST` to load batches.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LINUX_ONLY: dict[Any, str] = {
    signal: "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD",
    os: "sched_getaffinity sched_setaffinity sched_getparam sched_setscheduler posix_fadvise posix_fallocate fdatasync "
    "copy_file_range pidfd_open memfd_create eventfd splice pipe2 getrandom unshare setns getxattr setxattr listxattr "
    "removexattr O_DIRECT O_TMPFILE O_PATH O_NOATIME O_LARGEFILE O_RSYNC getresuid setresuid",
    fcntl: "F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS F_GET_SEALS F_NOTIFY F_SETLEASE",
    resource: "prlimit RUSAGE_THREAD RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO",
}


def is_from_here() -> bool:
    """Return whether code of this repository, through the standard library, makes the current call."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "site-packages" in path:
            return False
        if path.startswith(str(ROOT)) and path != __file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(path: Any = ".", *args: Any, **options: Any) -> Any:
        if not isinstance(path, int) and str(path).startswith(("/proc", "/sys")) and is_from_here():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *args, **options)

    return wrapper


def remove_linux() -> None:
    """Remove what only Linux has. Processes that are spawned from this script do the same."""
    for module, names in _LINUX_ONLY.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for module, names in {builtins: "open", os: "open stat listdir scandir readlink"}.items():  # type: ignore[assignment]
        for name in names.split():
            setattr(module, name, _hidden(getattr(module, name)))
    importlib.import_module("io").open = builtins.open
    multiprocessing.set_start_method("spawn", force=True)


def import_all() -> None:
    """Import every module of the package whose requirements are installed."""
    import open_lm

    count = 0
    for module in pkgutil.walk_packages(open_lm.__path__, "open_lm."):
        try:
            importlib.import_module(module.name)
            count += 1
        except ModuleNotFoundError as error:
            if str(error.name).startswith("open_lm"):
                raise
            print(f"{module.name} needs {error.name}", file=sys.stderr)
    print(f"{count} modules")


def load(manifest: str) -> None:
    """Read batches with a spawned worker, and the same ones without workers."""
    import torch
    from test_loader_workers import loader_of

    def batches(workers: int) -> list[torch.Tensor]:
        return [batch.inputs for batch, _ in loader_of(manifest, workers, multiple_data_passes=True).batches(10)]

    assert all(torch.equal(one, other) for one, other in zip(batches(1), batches(0), strict=True))
    print("equal batches")


remove_linux()
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), *(str(path) for path in (ROOT / "tests").iterdir() if path.is_dir())]
    if sys.argv[1] == "loader":
        load(sys.argv[2])
    else:
        import pytest

        import_all()
        raise SystemExit(pytest.main(sys.argv[2:]))
