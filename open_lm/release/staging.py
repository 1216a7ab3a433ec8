"""The folder of a bundle while it is built: next to its target, which it becomes when it is complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.hf.output_folder import check_absent, locked_folder
from open_lm.storage.strict_json import to_json

_SUFFIX = ".incomplete"
_RECORD, _FOLDER = "build.json", "bundle"  # in the unfinished folder: what is built, and the future bundle


@contextmanager
def staged_folder(target: Path, identity: Any, kept: Sequence[str]) -> Iterator[Path]:
    """Yield the folder to write, which becomes `target` when the block ends.

    After an interruption or an error, a build with the same `identity`, a JSON value, finds the folders `kept` of the
    earlier attempt, whose writers publish only complete results. Everything else is removed.

    Raises:
        ConfigError: `target` exists and is not empty, or another process builds it.
        StorageError: the folder cannot be written.
    """
    check_absent(str(target), str(target))
    attempt = Path(f"{target}{_SUFFIX}")
    with locked_folder(str(attempt)):
        check_absent(str(target), str(target))
        record, folder = json.loads(to_json(identity)), attempt / _FOLDER
        _clean(folder, kept if _read_record(attempt) == record else ())
        storage.write_text(attempt / _RECORD, to_json(record, indent=1))
        folder.mkdir(exist_ok=True)
        yield folder
        _publish(folder, target)
        shutil.rmtree(attempt)


def _read_record(attempt: Path) -> Any:
    try:
        return json.loads((attempt / _RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _clean(folder: Path, kept: Sequence[str]) -> None:
    """Remove everything but the folders `kept`."""
    places = [folder / name for name in kept if (folder / name).is_dir()]
    if places:
        logging.info(f"{folder}: continuing with {', '.join(str(place.relative_to(folder)) for place in places)}")
    for path in sorted(folder.rglob("*"), reverse=True):
        if any(path == place or place in path.parents for place in places):
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path in place.parents for place in places):
                path.rmdir()
        else:
            path.unlink()


def _publish(folder: Path, target: Path) -> None:
    try:
        if target.is_dir():
            target.rmdir()
        os.rename(folder, target)
        storage.sync_folder(str(target.absolute().parent))
    except OSError as error:
        raise StorageError(f"{folder} could not be renamed to {target} ({error})") from error
