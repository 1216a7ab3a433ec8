"""A finding of `open-lm doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        check: the check, such as `torch`. name: what was checked. status: OK, NOTE, WARNING or ERROR.
        text: the fact. advice: what to do about it, if anything.
    """

    check: str
    name: str
    status: str
    text: str
    advice: str = ""
