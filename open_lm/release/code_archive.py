"""Archive the source code of this package as a deterministic .tar.gz: the same files give the same bytes.

From a checkout, the archive has the current content of the files under version control, and the commit; from an
installed package, its installed files. A run with --copy-codebase has its code, which is archived instead of the
current one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, join_problems
from open_lm.release import components, layout
from open_lm.storage.strict_json import to_json

PACKAGE = Path(__file__).resolve().parents[1]
# Folders and files of a checkout that the archive leaves out: they take part in no run.
_OMITTED = ("tests", "docs", ".ci", ".gitignore", "zensical.toml")
_SKIPPED_NAMES = ("__pycache__",)
_CODE_FOLDERS = ("open_lm", "datapreprocess", "eval", "model_configs")  # files here count before they are committed
# Where each component is in the archive, below its top folder; at least one of these must exist.
MEMBERS: Mapping[str, Sequence[str]] = {
    components.ARCHITECTURE: ("open_lm/model", "open_lm/kernels", "open_lm/config", "model_configs",
                              "open_lm/model_configs"),
    components.TRAINING_CODE: ("open_lm/main.py", "open_lm/training", "open_lm/optim", "open_lm/data",
                               "open_lm/parallel", "open_lm/distributed", "open_lm/checkpoint", "open_lm/finetune"),
    components.INFERENCE_CODE: ("open_lm/generate", "open_lm/hf"),
    components.EVALUATION_CODE: ("open_lm/evaluate", "eval"),
    components.PREPROCESSING_CODE: ("datapreprocess", "open_lm/datapreprocess"),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The source code to archive.

    Attributes:
        root: folder of the checkout or of the installed package's parent.
        files: paths relative to `root`, sorted.
        commit: commit of the checkout; None without version control.
        modified: files that differ from the commit.
        license_file: the text of the code's own license.
    """

    root: Path
    files: tuple[str, ...]
    commit: str | None
    modified: tuple[str, ...]
    license_file: Path


def find_source(run: Path) -> Source:
    """Return the code of a run: {run}/code if it has a copy, else this package.

    Raises:
        ConfigError: the package has no license file.
    """
    copy = run / "code"
    if (copy / "open_lm").is_dir():
        return Source(copy, _all_files(copy, "open_lm"), None, (), _license_file())
    root = PACKAGE.parent
    tracked = _git(root, "ls-files")
    if "open_lm/main.py" not in tracked:
        return Source(root, _all_files(root, PACKAGE.name), None, (), _license_file())
    added = _git(root, "ls-files", "--others", "--exclude-standard", *_CODE_FOLDERS)
    files = [name for name in [*tracked, *added] if not _is_omitted(name) and os.path.lexists(root / name)]
    changed = [*_git(root, "diff", "--name-only", "HEAD"), *added]
    modified = tuple(sorted(name for name in changed if not _is_omitted(name)))
    commit = "".join(_git(root, "rev-parse", "HEAD")).strip() or None
    return Source(root, tuple(sorted(files)), commit, modified, _license_file())


def write_archive(source: Source, folder: Path) -> dict[str, Any]:
    """Write code/source.tar.gz, its license and code/contents.json; return the content of the latter.

    Raises:
        ConfigError: the code of a component is missing.
    """
    version = _version()
    top = f"open_lm-{version}" + (f"-{source.commit[:12]}" if source.commit else "")
    storage.write_bytes(folder / layout.ARCHIVE, _tar_gz(source, top))
    storage.write_bytes(folder / layout.CODE / "LICENSE", source.license_file.read_bytes())
    members = {name: _existing(source, places) for name, places in MEMBERS.items()}
    missing = [f"{name}: none of {', '.join(MEMBERS[name])}" for name, found in members.items() if not found]
    if missing:
        raise ConfigError(join_problems(missing, f"{source.root}: the source code of a component is missing"))
    contents = {
        "archive": Path(layout.ARCHIVE).name,
        "sha256": hashlib.sha256((folder / layout.ARCHIVE).read_bytes()).hexdigest(),
        "top_folder": top,
        "package": "open_lm",
        "version": version,
        "commit": source.commit,
        "modified_since_commit": list(source.modified),
        "num_files": len(source.files),
        "components": members,
    }
    storage.write_text(folder / layout.ARCHIVE_CONTENTS, to_json(contents, indent=2) + "\n")
    return contents


def _tar_gz(source: Source, top: str) -> bytes:
    """Return the archive: sorted names, no times, no users, so that its bytes depend on the files only."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        names = dict.fromkeys([*source.files, "LICENSE"])
        for name in sorted(names):
            path = source.license_file if name == "LICENSE" else source.root / name
            info = tarfile.TarInfo(f"{top}/{name}")
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            if path.is_symlink():
                info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
                archive.addfile(info)
                continue
            content = path.read_bytes()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _existing(source: Source, places: Sequence[str]) -> list[str]:
    return [place for place in places if any(name == place or name.startswith(f"{place}/") for name in source.files)]


def _all_files(root: Path, package: str) -> tuple[str, ...]:
    """Return the files of an installed package, without compiled ones."""
    found = []
    for folder, names, files in os.walk(root / package, followlinks=True):
        names[:] = sorted(name for name in names if name not in _SKIPPED_NAMES)
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files if not name.endswith(".pyc")]
    return tuple(sorted(found))


def _is_omitted(name: str) -> bool:
    return name.split("/", 1)[0] in _OMITTED


def _git(root: Path, *command: str) -> list[str]:
    """Return the names, separated by zero bytes, that a git command prints; empty without git or a repository."""
    options = ["-z"] if command[0] != "rev-parse" else []
    try:
        result = subprocess.run(
            ["git", "-C", str(root), command[0], *options, *command[1:]],
            check=True, capture_output=True, timeout=60, env=_git_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in os.fsdecode(result.stdout).split("\0") if name]


def _git_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _license_file() -> Path:
    """Return the license of this package: LICENSE of the checkout, or the one of the installed distribution."""
    checkout = PACKAGE.parent / "LICENSE"
    if checkout.is_file() and (PACKAGE.parent / "setup.py").is_file():
        return checkout
    for file in metadata.files("open_lm") or ():
        if Path(str(file)).name == "LICENSE":
            return Path(str(file.locate()))
    raise ConfigError("the installed distribution open_lm has no LICENSE file; install it again")


def _version() -> str:
    import open_lm

    return str(open_lm.__version__)
