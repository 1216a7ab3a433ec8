"""Find texts that contain a special token, such as "<|endoftext|>"."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FREQUENT_LAST = "|~^`\\{}@#$%&+*=<>[]_/;!?:\"'()-,."  # ASCII punctuation, in about the order of its frequency in texts


class SubstringFinder:
    """A test whether a text contains one of several strings.

    A text is first searched for one rare character of each string, at the speed of memory, because most texts contain
    none of them.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        strings = [string for string in strings if string]
        self._characters = sorted({min(string, key=_frequency) for string in strings})
        self._pattern = re.compile("|".join(map(re.escape, strings))) if strings else None

    def __call__(self, text: str) -> bool:
        for character in self._characters:
            if character in text:
                return self._pattern is not None and self._pattern.search(text) is not None
        return False


def _frequency(character: str) -> int:
    """Return a number that is larger for characters that are more frequent in texts."""
    if not character.isascii():
        return -1
    place = _FREQUENT_LAST.find(character)
    return place if place >= 0 else len(_FREQUENT_LAST)
