"""Build HTML from text: everything is escaped, except what was built here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.system.names import printable

_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Html(str):
    """A text that is HTML. All other texts are escaped when they become a part of one."""


def escape(value: Any) -> Html:
    """Return a value as HTML: unchanged if it is `Html`, else its text, with symbols for control characters."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_CONTROL.sub(_symbol, printable(str(value)))))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421"


def join(*parts: Any) -> Html:
    """Return the HTML of several values, one after the other; None is left out."""
    return Html("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element. `class_` is the attribute "class", `data_run` is "data-run"; None and False leave one out."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        words.append(attribute if value is True else f'{attribute}="{escape(value)}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def identifier(text: str) -> str:
    """Return a text as the id of an element: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def paragraph(*parts: Any, class_: str | None = None) -> Html:
    return tag("p", *parts, class_=class_)


def details(summary: Any, *blocks: Any, open_: bool = False) -> Html:
    """Return blocks that a reader opens by their summary."""
    return tag("details", tag("summary", summary), *blocks, open=open_)


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and whether it has numbers, which are aligned on the right."""

    heading: Any
    numeric: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[Any]], caption: str, class_: str | None = None) -> Html:
    """Return a table whose first cells are the headings of their rows. It scrolls sideways where it is too wide.

    caption: says what the table has, for screen readers.
    """
    head = tag("tr", *(tag("th", c.heading, scope="col", class_="num" if c.numeric else None) for c in columns))
    body = (tag("tr", *(_cell(columns[i], cell, i == 0) for i, cell in enumerate(row))) for row in rows)
    content = tag(
        "table", tag("caption", caption, class_="hidden"), tag("thead", head), tag("tbody", *body), class_=class_
    )
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=caption)


def _cell(column: Column, value: Any, is_first: bool) -> Html:
    kind = "num" if column.numeric else None
    return tag("th", value, scope="row", class_=kind) if is_first else tag("td", value, class_=kind)


@dataclass(frozen=True)
class Fact:
    """A number of the summary: what it is, its value with unit, and a short remark."""

    label: str
    value: Any
    remark: Any = ""


def facts(items: Iterable[Fact]) -> Html:
    """Return the main numbers as a grid."""
    cells = [
        tag("div", tag("dt", item.label), tag("dd", item.value), tag("dd", item.remark, class_="remark"))
        if item.remark
        else tag("div", tag("dt", item.label), tag("dd", item.value))
        for item in items
    ]
    return tag("dl", *cells, class_="facts")
