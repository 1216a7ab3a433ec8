"""Write Markdown: tables, and text that is shown literally."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def escape(text: str) -> str:
    """Return a text on one line that Markdown shows unchanged."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of literal texts."""
    lines = [columns, ["---"] * len(columns), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Return a table with two columns and no heading."""
    return table(("", ""), facts)


def code_block(text: str) -> str:
    """Return a text as a block of code."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def bullets(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
