"""The lists of tasks that the package has, by name."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "suites"


def task_list_names() -> list[str]:
    """Return the names of the lists."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_task_list(file: str) -> str:
    """Return the path of a list of tasks, given by its name, such as `light` or light.yaml; existing files as given."""
    name = file.removesuffix(".yaml")
    return file if os.path.exists(file) or name not in task_list_names() else str(_FOLDER / f"{name}.yaml")
