"""C++ of the package, compiled for the machine that it runs on and loaded.

A source is compiled once, in about a second, and kept in the user's cache ($XDG_CACHE_HOME or ~/.cache, open_lm/native)
under a name that holds all that it was made from, so that nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w")
_LONGEST_SECONDS = 300


class NativeError(Exception):
    """A source cannot be compiled or loaded here; the message says why."""


def processor_features() -> frozenset[str]:
    """What the processor can do, by the names of Linux on x86-64; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def load(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of the package's file `source`, compiled by $CXX or g++ with `flags` where the cache has none.

    Its parallel loops run in torch's own threads, since both use GCC's OpenMP library.

    Raises:
        NativeError: no compiler, or it fails, or what it made cannot be loaded.
    """
    path = Path(__file__).with_name(source)
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise NativeError("there is no C++ compiler (install g++, or set CXX)")
    command = [compiler, *_FLAGS, *flags]
    made_from = (path.read_bytes(), repr(command).encode(), _version(compiler).encode(), platform.machine().encode())
    name = f"{path.stem}-{hashlib.sha256(bytes(0).join(made_from)).hexdigest()[:20]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_lm" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = folder / name
        if not library.exists():
            _compile([*command, str(path)], library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        problem = f"its library cannot be kept or loaded ({error}); set XDG_CACHE_HOME to a folder of yours"
        raise NativeError(problem) from error


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _compile(command: list[str], library: Path) -> None:
    """Whole or not at all: other processes may be doing the same, or waiting to load it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        _run([*command, "-o", str(made)])
        made.replace(library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_LONGEST_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the C++ compiler cannot be run ({error})") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NativeError(f"{command[0]} cannot compile it ({complaint.strip()})")
    return done.stdout
