"""Record where a run was computed: {run}/environment.json, with a record for each start of the run.

A record has no names of machines or users and no paths. `open` adds it, and `update` sets what the start has done so
far, so that the sums over all records hold for the whole run, also after it was killed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from open_lm import storage
from open_lm.distributed.processes import Runtime, gather_objects
from open_lm.errors import StorageError
from open_lm.storage.strict_json import to_json
from open_lm.system.cpus import available_cpus

FILE_NAME = "environment.json"
_FORMAT = 1
_ROOT = Path(__file__).resolve().parents[2]  # of a checkout, or site-packages
_GIT_TIMEOUT_S = 10
_DEVELOPMENT = re.compile(r"extra == ['\"](dev|all)['\"]")  # `all` repeats the others
_SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".json", ".yaml")


class EnvironmentFile:
    """The file environment.json of a run: {"format": 1, "starts": [record, …]}.

    The run does not depend on it: a file that cannot be read or written is a warning.

    Args:
        path: path of the file; None for a rank or a run that writes none.
        record: description of this start, from `describe`.
    """

    def __init__(self, path: str | None, record: Mapping[str, Any]) -> None:
        self._path, self._record = path, dict(record)
        self._earlier = [] if path is None else _read(path)
        self._write()

    def earlier(self, *keys: str) -> float:
        """Return the sum of a number, such as "progress", "energy_joules", over the earlier starts of the run."""
        total = 0.0
        for record in self._earlier:
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            total += value if isinstance(value, int | float) else 0.0
        return total

    def update(self, progress: Mapping[str, Any]) -> None:
        """Set what this start has done so far, and write the file."""
        self._record["progress"] = {"time": _now(), **progress}
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        content = {"format": _FORMAT, "starts": [*self._earlier, self._record]}
        try:
            storage.write_text(self._path, to_json(content, indent=1) + "\n")
        except StorageError as error:
            logging.warning(f"cannot record the start and its progress: {error}")


def _read(path: str) -> list[dict[str, Any]]:
    """Return the records of a file; an empty list if there is none or, with a warning, if it cannot be used."""
    if not os.path.exists(path):
        return []
    try:
        content = json.loads(storage.read_bytes(path))
        if content["format"] == _FORMAT:
            return [dict(record) for record in content["starts"]]
        problem = f"found the format {content['format']!r}, expected {_FORMAT}"
    except (StorageError, ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    logging.warning(f"{path}: cannot read the earlier starts of the run, which are lost: {problem}")
    return []


def describe(runtime: Runtime, step: int, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a start of a run: ranks, devices, CPUs, packages, code and data; {} except on rank 0. Collective.

    Args:
        runtime: this rank.
        step: the step from which the start continues.
        data: the content of data.json, if there are training data.
    """
    devices = Counter(gather_objects(_device(runtime.device)))
    if not runtime.is_master:
        return {}
    return {
        "time": _now(),
        "step": step,
        "world_size": runtime.world_size,
        "nodes": -(-runtime.world_size // runtime.local_world_size),
        "devices": [{"name": name, "memory_bytes": size, "ranks": n} for (name, size), n in devices.items()],
        "cpu": {"model": _cpu_model(), "available": available_cpus(), "memory_bytes": _memory_bytes()},
        "system": {"name": platform.system(), "machine": platform.machine(), "python": platform.python_version()},
        "libraries": _library_versions(),
        "packages": _package_versions(),
        "code": code_state(),
        **({} if data is None else {"data": _data_state(data)}),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _device(device: torch.device) -> tuple[str, int | None]:
    """Return the name and the memory in bytes of a rank's device."""
    if device.type != "cuda":
        return "cpu", None
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


@functools.cache
def _cpu_model() -> str:
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match is not None:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    with suppress(ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _library_versions() -> dict[str, str]:
    """Return the versions of the libraries that torch was built with or has loaded."""
    versions: dict[str, Any] = {"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    if torch.version.cuda and torch.cuda.is_available():
        versions["cudnn"] = torch.backends.cudnn.version()
        with suppress(Exception):  # a build without NCCL
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {name: str(version) for name, version in versions.items() if version}


@functools.cache
def _package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that this distribution requires, with all extras but `dev`."""
    versions = {}
    with suppress(metadata.PackageNotFoundError):
        versions["open_lm"] = metadata.version("open_lm")
        for requirement in metadata.requires("open_lm") or ():
            name = re.match(r"[\w.-]+", requirement)
            if name is not None and not _DEVELOPMENT.search(requirement):
                with suppress(metadata.PackageNotFoundError):
                    versions[name.group()] = metadata.version(name.group())
    return dict(sorted(versions.items()))


@functools.cache
def code_state() -> dict[str, Any]:
    """Return the state of the program's code.

    fingerprint: sha256 of the package's source files; in a git checkout also the commit, whether tracked files were
    modified, and the sha256 of the modifications.
    """
    return {"fingerprint": _source_fingerprint(_ROOT / "open_lm"), **_git_state(_ROOT)}


def _source_fingerprint(package: Path) -> str:
    """Return the sha256 of the names and contents of a package's source files, those behind links included."""
    walk = os.walk(package, followlinks=True)
    paths = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix in _SOURCE_SUFFIXES:
            digest.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _git_state(root: Path) -> dict[str, Any]:
    if not (root / ".git").exists():  # an installed package, perhaps inside another project's checkout
        return {}
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "diff", "HEAD")
    if commit is None or changes is None:
        return {}
    state: dict[str, Any] = {"commit": commit.decode().strip(), "modified": bool(changes)}
    return {**state, "diff_sha256": hashlib.sha256(changes).hexdigest()} if changes else state


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return the output of a git command, or None if it fails."""
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _data_state(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint of all data and those of the sources, without their names, which may be paths."""
    sources: Sequence[Mapping[str, Any]] = description["sources"]
    fingerprints = [str(source["fingerprint"]) for source in sources]
    return {
        "fingerprint": hashlib.sha256("\0".join(fingerprints).encode()).hexdigest(),
        "sources": [
            {"fingerprint": source["fingerprint"], "weight": source["weight"], "num_sequences": source["num_sequences"]}
            for source in sources
        ],
    }
