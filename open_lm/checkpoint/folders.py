"""Name, list and remove the folders of sharded checkpoints: step_N, with the suffix INCOMPLETE while being written."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil

from open_lm import storage

INDEX = "checkpoint.json"  # written last and removed first: if it exists, the checkpoint is complete
INCOMPLETE = ".incomplete"
TRANSFORMERS_CONFIG = "config.json"  # of a model in the format of transformers
_STEP_FOLDER = re.compile(r"^step_(\d+)$")
_DIGITS = 8  # zero-padded, so that names sort in the order of their steps


def step_folder(step: int) -> str:
    """Return the folder name of the sharded checkpoint after `step` optimizer steps."""
    return f"step_{step:0{_DIGITS}d}"


def step_number(url: str) -> int | None:
    """Return N for .../step_N, with or without a trailing slash, and None for any other name."""
    match = _STEP_FOLDER.match(url.rstrip("/").rpartition("/")[2])
    return int(match.group(1)) if match else None


def is_transformers_folder(url: str) -> bool:
    """Return whether a folder is a model in the format of transformers, such as an exported one."""
    return storage.info(storage.join(url, TRANSFORMERS_CONFIG)) is not None


def step_folders(root: str) -> dict[int, str]:
    """Return the step_N folders in a local or remote folder by N, ascending, both complete and incomplete ones."""
    numbers = {name: step_number(name) for name in _folder_names(root)}
    folders = {number: storage.join(root, name) for name, number in numbers.items() if number is not None}
    return dict(sorted(folders.items()))


def unfinished_folders(root: str) -> list[str]:
    """Return the folders of unfinished saves: those with the suffix INCOMPLETE, and step_N without an index."""
    marked = [storage.join(root, name) for name in _folder_names(root) if name.endswith(INCOMPLETE)]
    return marked + [url for url in step_folders(root).values() if storage.info(storage.join(url, INDEX)) is None]


def remove_folder(url: str) -> None:
    """Remove a checkpoint with all its files, the index first, so that a partly removed one never looks complete."""
    try:
        storage.remove(storage.join(url, INDEX))
        if not storage.is_remote(url):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(storage.local_path(url))  # also removes temporary files of a killed writer
            return
        for file in storage.list_files(url, recursive=True):
            storage.remove(file)
    except OSError as error:
        logging.warning(f"{url} could not be removed: {error}")


def _folder_names(root: str) -> list[str]:
    """Return the names of the folders directly in `root`; on a store without folders, of those with files."""
    if not storage.is_remote(root):
        local = storage.local_path(root)
        return sorted(entry.name for entry in os.scandir(local) if entry.is_dir()) if os.path.isdir(local) else []
    base = root.rstrip("/") + "/"
    inner = [url[len(base) :] for url in storage.list_files(root, recursive=True) if url.startswith(base)]
    return sorted({path.split("/", 1)[0] for path in inner if "/" in path})
