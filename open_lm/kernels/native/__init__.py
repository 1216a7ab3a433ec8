"""Kernels for a CPU, in C++ that is compiled for the machine that it runs on and loaded.

A source is compiled once, in about a second, and kept in the user's cache ($XDG_CACHE_HOME or ~/.cache, open_lm/native)
under a name that holds all that it was made from, so that nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w")
_LONGEST_SECONDS = 300
_DIGEST_BYTES = hashlib.sha256().digest_size

# What kernels need of the processor, by Linux's names: bfloat16 in vectors of 512 bits, and in matrix units besides.
VECTORS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
MATRICES = VECTORS | {"amx_tile", "amx_bf16"}


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


def load(source: str, needed: frozenset[str], *defines: str) -> ctypes.CDLL:
    """The library of the file `source` of this folder, compiled by $CXX or g++ where the cache has none.

    Its parallel loops run in torch's own threads, since both use GCC's OpenMP library.

    Args:
        needed: VECTORS or MATRICES.
        defines: NAME=VALUE of the preprocessor.

    Raises:
        NativeError: the processor lacks what is needed, there is no compiler, it fails, or what it made cannot be
            loaded.
    """
    missing = sorted(needed - processor_features())
    if missing:
        raise NativeError(f"this processor has no {', '.join(missing)}")
    path = Path(__file__).with_name(source)
    sources = (path, *sorted(path.parent.glob("*.h")))
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(compiler[0]):
        raise NativeError(f"there is no C++ compiler {compiler[0]} (install g++, or set CXX)")
    features = (name.replace("avx512_", "avx512").replace("_", "-") for name in sorted(needed))
    command = [*compiler, *_FLAGS, "-mfma", *(f"-m{name}" for name in features), *(f"-D{define}" for define in defines)]
    described = repr((command, _run([*compiler, "--version"]), platform.machine())).encode()
    made_from = b"".join(hashlib.sha256(part).digest() for part in (described, *(x.read_bytes() for x in sources)))
    name = f"{path.stem}-{hashlib.sha256(made_from).hexdigest()[:20]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_lm" / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = folder / name
        if not _is_whole(library):
            _compile([*command, str(path)], library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # the latter where nobody knows of a home
        problem = f"its library cannot be kept or loaded ({error}); set XDG_CACHE_HOME to a folder of yours"
        raise NativeError(problem) from error


def _compile(command: list[str], library: Path) -> None:
    """Whole or not at all: other processes may be doing the same, or have it loaded."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        _run([*command, "-o", str(made)])
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(library)


def _is_whole(library: Path) -> bool:
    """Whether it is there and ends in the digest of all before, which loaders pass over: a machine that went down may
    leave a file without its end, and to load that ends the process."""
    content = library.read_bytes() if library.exists() else b""
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


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
