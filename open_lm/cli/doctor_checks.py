"""The checks of `open-lm doctor`; `python -m open_lm.cli.doctor_checks NAME` prints the findings of one as JSON."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from open_lm.cli.doctor_findings import ERROR, NOTE, OK, WARNING, Finding
from open_lm.cli.doctor_packages import check_packages
from open_lm.system.cpus import available_cpus

GIB = 2**30
_MIN_FREE = {"current folder": 10 * GIB, "temporary files": 2 * GIB, "shared memory": GIB}
_MIN_OPEN_FILES = 4096  # shards that a loader may hold open, with room for other files
_REQUEST_TIMEOUT_S = 5.0
_HEAD_WIDTH = 64  # the usual one, for the kernels that are compiled for a head width


def check_system() -> Iterator[Finding]:
    """Yield the operating system, processor, threads and limits."""
    yield Finding("system", "Python", OK, f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "system", OK, platform.platform())
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{available_cpus()} of {os.cpu_count()} CPUs may be used; OMP_NUM_THREADS is {threads or 'not set'}"
    yield Finding("system", "CPUs", OK, text)
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("system", "memory", OK, f"{memory / GIB:.1f} GiB")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    limits = f"{soft} files, can be raised to {'any number' if highest == sys.maxsize else highest}"
    if highest < _MIN_OPEN_FILES:
        advice = f"raise it to {_MIN_OPEN_FILES} or more: /etc/security/limits.conf, or a container's --ulimit nofile"
        yield Finding("system", "open files", WARNING, limits, advice)
    else:
        yield Finding("system", "open files", OK, limits)
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler.split()[0])
    yield Finding("system", "C++ compiler", OK if found else NOTE, found or f"none ({compiler}): no native CPU kernels")


def check_torch() -> Iterator[Finding]:
    """Yield torch's version, devices and communication backends."""
    if importlib.util.find_spec("torch") is None:
        text = "not installed: this environment can preprocess data, but not train"
        yield Finding("torch", "torch", NOTE, text, 'pip install "open_lm[train]"')
        return
    import torch
    from torch import distributed

    yield Finding("torch", "torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            facts = torch.cuda.get_device_properties(index)
            text = f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            text += f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
            yield Finding("torch", f"device {index}", OK if free > total / 2 else WARNING, text)
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        driver = Path("/proc/driver/nvidia/version").exists()
        text = f"no CUDA device is usable: this torch is {built}, {'a' if driver else 'no'} NVIDIA driver is loaded"
        yield Finding("torch", "devices", WARNING if driver else NOTE, text)
    available = distributed.is_available()
    backends = [name for name in ("gloo", "nccl", "mpi", "ucc") if available and getattr(distributed, _test(name))()]
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    status = OK if needed in backends else ERROR
    yield Finding("torch", "torch.distributed", status, ", ".join(backends) or "no backend")


def _test(backend: str) -> str:
    return f"is_{backend}_available"


def check_kernels() -> Iterator[Finding]:
    """Yield the kernels that are used on this machine, and why others are not."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from open_lm.errors import ConfigError
    from open_lm.kernels.native import attention, elements
    from open_lm.model.attention import xformers_problem
    from open_lm.parallel.float8 import check_float8

    problem = xformers_problem()
    used = "xformers; torch with --torchcompile" if problem is None else f"torch (not xformers: {problem})"
    yield Finding("kernels", "attention", OK, f"--attn-name auto uses the kernels of {used}")
    yield from _sdpa_backends()
    for name, reason in (
        ("native CPU attention", attention.problem(_HEAD_WIDTH)),
        ("native CPU operators", elements.problem()),
    ):
        text = f"not used: {reason}" if reason else "used for bfloat16"
        yield Finding("kernels", name, NOTE if reason else OK, text)
    needed = {"triton": "--torchcompile on CUDA", "torchao": "--fp8", "flash_attn_3": "--attn-name flash_attn_3"}
    for name, purpose in needed.items():
        found = importlib.util.find_spec(name) is not None
        yield Finding("kernels", name, OK if found else NOTE, "installed" if found else f"not installed ({purpose})")
    try:
        check_float8(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        yield Finding("kernels", "fp8", OK, "--fp8 is supported")
    except ConfigError as error:
        yield Finding("kernels", "fp8", NOTE, str(error).partition(": pip")[0])


def _sdpa_backends() -> Iterator[Finding]:
    """Yield which of torch's attention kernels CUDA may use."""
    import torch

    if torch.cuda.is_available():
        backends = ("flash_sdp", "cudnn_sdp", "mem_efficient_sdp", "math_sdp")
        enabled = [name for name in backends if getattr(torch.backends.cuda, f"{name}_enabled")()]
        yield Finding("kernels", "torch's attention", OK, f"enabled: {', '.join(enabled)}")


def check_storage() -> Iterator[Finding]:
    """Yield the free space of the folders that runs write to."""
    cache = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folders = {
        "current folder": os.getcwd(),
        "temporary files": os.environ.get("TMPDIR") or "/tmp",
        "shared memory": "/dev/shm",
        "hub cache": os.path.expanduser(cache),
    }
    with contextlib.suppress(OSError):
        folders["temporary files"] = tempfile.gettempdir()
    for name, folder in folders.items():
        existing = next((path for path in (Path(folder), *Path(folder).parents) if path.is_dir()), None)
        if existing is None or (name == "shared memory" and str(existing) != folder):
            continue  # macOS has no /dev/shm
        free = shutil.disk_usage(existing).free
        text = f"{free / GIB:.1f} GiB free in {folder}"
        if name != "hub cache" and not os.access(existing, os.W_OK):
            status, advice = (ERROR if name == "temporary files" else WARNING), "it cannot be written"
        elif free < _MIN_FREE.get(name, 0):
            status, advice = WARNING, f"runs may need {_MIN_FREE[name] / GIB:g} GiB or more"
            advice += "; with Docker, set --shm-size or --ipc=host" if name == "shared memory" else ""
        else:
            status, advice = OK, ""
        yield Finding("storage", name, status, text, advice)


def check_network() -> Iterator[Finding]:
    """Yield whether S3 and the hub can be reached, and whether there are credentials, which are not shown."""
    os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "1")
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    from open_lm.storage.s3 import service

    try:
        url, has_credentials = service()
        yield _reach("S3", url)
        text = "present" if has_credentials else "none: neither in the environment nor in files"
        yield Finding("network", "S3 credentials", OK if has_credentials else NOTE, text)
    except Exception as error:  # a broken configuration file, a profile that does not exist, …
        yield Finding("network", "S3", WARNING, f"the configuration cannot be read ({type(error).__name__}: {error})")
    if importlib.util.find_spec("huggingface_hub") is None:
        yield Finding("network", "hub", NOTE, "huggingface_hub is not installed")
        return
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("network", "hub", NOTE, "not tried: HF_HUB_OFFLINE is set")
    else:
        yield _reach("hub", constants.ENDPOINT)
    token = get_token() is not None
    yield Finding("network", "hub token", OK if token else NOTE, "present" if token else "none: only public files")


def _reach(name: str, url: str) -> Finding:
    """Return whether a server answers; its status does not matter."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        advice = "data and models there are out of reach; check the network, proxy and endpoint, or use local files"
        return Finding("network", name, WARNING, f"{url} does not answer ({reason})", advice)
    return Finding("network", name, OK, f"{url} answers")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "system": check_system, "packages": check_packages, "torch": check_torch, "kernels": check_kernels,
    "storage": check_storage, "network": check_network,
}  # fmt: skip


def check_import(module: str) -> Iterator[Finding]:
    """Yield whether a package can be imported; one with compiled code for other versions may end the process."""
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        text = f"the import fails ({type(error).__name__}: {reason})"
        yield Finding("imports", module, WARNING, text, f"reinstall {module} for these versions, or remove it")
        return
    yield Finding("imports", module, OK, "can be imported")


def main(name: str, *modules: str) -> None:
    """Print the findings of a check, as the last line of the output; `imports` takes the name of a module."""
    logging.disable()
    findings = check_import(*modules) if name == "imports" else CHECKS[name]()
    print("\n" + json.dumps([asdict(finding) for finding in findings], allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
