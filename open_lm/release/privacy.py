"""Copy text files of a run into a bundle, without secrets, private paths and names where that is requested."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.release.secret_rules import machine_rules
from open_lm.release.secrets_scan import Scanner

_PART_CHARACTERS = 1 << 20
# An absolute path of at least two parts, which is no part of a URL or of a relative path.
_ABSOLUTE = re.compile(r"(?<![\w./:~\-\\}>])/(?:[^\s/'\"`,;:()\[\]{}<>|\\]+/)+(?=[^\s/'\"`,;:()\[\]<>|\\]*)")


class Redactor:
    """Removes secrets and names from texts, and folders from absolute paths.

    The run folder becomes RUN; of other absolute paths, the last part remains.
    """

    def __init__(self, run: Path) -> None:
        folders = sorted({str(run.absolute()), str(run.resolve())}, key=len, reverse=True)
        self._run = re.compile(rf"(?<![\w.\-/])(?:{'|'.join(map(re.escape, folders))})(?![\w.\-])")
        self._scanner = Scanner(machine_rules([run]))

    def text(self, text: str) -> str:
        """Return a text without secrets, private paths and names."""
        text = self._run.sub("RUN", text.replace("file:///", "/"))
        return _ABSOLUTE.sub(".../", self._scanner.redact(text))

    def value(self, value: Any) -> Any:
        """Return a JSON value with `text` applied to its strings and keys."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value

    def copy(self, source: str | Path, target: Path) -> None:
        """Copy a text file, line by line, without secrets, private paths and names."""
        with (
            storage.open_file(str(source)) as raw,
            io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="") as lines,
            storage.atomic_write(target, "w") as file,
        ):
            while part := lines.readlines(_PART_CHARACTERS):
                file.write(self.text("".join(part)))
