"""Native CPU kernels: C++ sources that are compiled on the machine that runs them.

A source is compiled once, in about a second, and cached in $XDG_CACHE_HOME or ~/.cache (open_lm/native). The file name
contains a hash of the source, the compiler and its flags, so that a stale library is never loaded.
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

from torch import Tensor

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w")
_COMPILE_TIMEOUT_S = 300
_DIGEST_BYTES = hashlib.sha256().digest_size

# CPU features that kernels need, by their names in Linux: bfloat16 in 512-bit vectors, and also in matrix units.
VECTORS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
MATRICES = VECTORS | {"amx_tile", "amx_bf16"}


class NativeError(Exception):
    """A source that cannot be compiled or loaded on this machine; the message gives the reason."""


def processor_features() -> frozenset[str]:
    """Return the CPU features by their names in Linux on x86-64; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def load(source: str, required: frozenset[str], *defines: str) -> ctypes.CDLL:
    """Return the library of the file `source` in this folder, compiled with $CXX or g++ if it is not cached.

    Its parallel loops run in torch's threads, because both use GCC's OpenMP library.

    Args:
        required: VECTORS or MATRICES.
        defines: NAME=VALUE definitions for the preprocessor.

    Raises:
        NativeError: the CPU lacks a feature, there is no compiler, compilation fails, or the library cannot be
            loaded.
    """
    missing = sorted(required - processor_features())
    if missing:
        raise NativeError(f"this CPU has no {', '.join(missing)}")
    path = Path(__file__).with_name(source)
    sources = (path, *sorted(path.parent.glob("*.h")))
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(compiler[0]):
        raise NativeError(f"there is no C++ compiler {compiler[0]} (install g++, or set CXX)")
    features = (name.replace("avx512_", "avx512").replace("_", "-") for name in sorted(required))
    command = [*compiler, *_FLAGS, "-mfma", *(f"-m{name}" for name in features), *(f"-D{define}" for define in defines)]
    build = repr((command, _run([*compiler, "--version"]), platform.machine())).encode()
    digests = b"".join(hashlib.sha256(part).digest() for part in (build, *(x.read_bytes() for x in sources)))
    name = f"{path.stem}-{hashlib.sha256(digests).hexdigest()[:20]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open_lm" / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = folder / name
        if not _is_complete(library):
            _compile([*command, str(path)], library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # RuntimeError if there is no home folder
        problem = f"its library cannot be cached or loaded ({error}); set XDG_CACHE_HOME to a writable folder"
        raise NativeError(problem) from error


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's first element, or a null pointer for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _compile(command: list[str], library: Path) -> None:
    """Write the library atomically: other processes may compile it too, or have loaded it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled = Path(folder, library.name)
        _run([*command, "-o", str(compiled)])
        content = compiled.read_bytes()
        compiled.write_bytes(content + hashlib.sha256(content).digest())
        compiled.replace(library)


def _is_complete(library: Path) -> bool:
    """Return whether the library exists and ends in a digest of its content, which loaders ignore.

    A machine that crashed may leave a truncated file, and loading that would crash the process.
    """
    content = library.read_bytes() if library.exists() else b""
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_COMPILE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the C++ compiler cannot be run ({error})") from error
    if result.returncode:
        message = next((line for line in result.stderr.split("\n") if "error" in line), result.stderr.strip()[-200:])
        raise NativeError(f"{command[0]} failed ({message.strip()})")
    return result.stdout
