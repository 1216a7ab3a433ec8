"""Remove from the texts of a report what a reader on another machine must not see: secrets and home folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from open_lm.storage.redaction import redacted

_HOME_FOLDERS = r"/home/[^/\s'\"]+|/Users/[^/\s'\"]+|/root"


def public(text: str) -> str:
    """Return a text without passwords, tokens and keys, and with ~ in place of a home folder."""
    return str(public_values({"": text})[""])


def public_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with `public` applied to its texts."""
    return _without_homes(redacted(values), _home_pattern())


def _home_pattern() -> re.Pattern[str]:
    home = os.path.expanduser("~").rstrip("/")
    folders = f"{re.escape(home)}|{_HOME_FOLDERS}" if home.startswith("/") else _HOME_FOLDERS
    return re.compile(rf"(?<![\w.~\-/])(?:{folders})(?![\w.\-])")


def _without_homes(value: Any, homes: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return homes.sub("~", value)
    if isinstance(value, dict):
        return {key: _without_homes(item, homes) for key, item in value.items()}
    return [_without_homes(item, homes) for item in value] if isinstance(value, list) else value
