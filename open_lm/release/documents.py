"""Tell documents from placeholders: empty files, templates, text that is still to be written."""

from __future__ import annotations

import re
from pathlib import Path

from open_lm.release.file_texts import Unreadable, pdf_shown_text

DOCUMENT_SUFFIXES = (".md", ".pdf", ".tex", ".txt", ".html", ".rst")
MIN_PAPER_WORDS = 100  # an abstract has more
_MAX_BYTES = 512 * 2**20
# Sentences with these words do not count as text, and neither do headings.
_PLACEHOLDER = re.compile(
    r"lorem ipsum|place ?holder|coming soon|under construction|more information needed"
    r"|(?:to|will) be (?:written|completed|added|announced|filled|provided)"
    r"|\b(?:goes|go|write|insert|add|put|replace) .{0,40}\bhere\b|\byour (?:paper|title|name|abstract|text|content)s?\b"
    r"|\[(?:insert|your|add|title|name|abstract|text)\b[^\]]{0,80}\]|\{\{.{0,80}?\}\}"
    r"|this (?:file )?is a (?:template|stub)"
    r"|(?-i:\b(?:TODO|To do:|TBD|TBA|FIXME|XXX+)(?!\w))",
    re.IGNORECASE,
)
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n|\n(?=\s*(?:[-*#>|]|\d+\.))")
_HEADING = re.compile(r"^ {0,3}#{1,6} .*$", re.MULTILINE)
_TAG = re.compile(r"<[^<>]{1,500}>")
_INVISIBLE = (("<!--", "-->"), ("<style", "</style>"), ("<script", "</script>"))
_LATEX_COMMENT = re.compile(r"(?<!\\)%.*")
_LATEX_COMMAND = re.compile(
    r"\\(?:documentclass|usepackage|bibliography|bibliographystyle|label|ref|cite|begin|end|input|newcommand"
    r"|title|author|date|section|subsection|paragraph)\*?\s*"
    r"(?:\[[^\]]*\])?(?:\{[^{}]*\})?|\\[A-Za-z]+\*?"
)
_WORD = re.compile(r"[^\W\d_]{2,}")


def document_problem(path: Path, min_words: int) -> str | None:
    """Return the reason why a file is no document of at least `min_words` words; None if it is one.

    A PDF whose fonts have codes of their own, so that its words cannot be read, is counted by characters, 6 a word, and
    one of scanned pages passes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not content.strip():
        return "is empty"
    suffix = path.suffix.lower()
    return _pdf_problem(content, min_words) if suffix == ".pdf" else _text_problem(content, suffix, min_words)


def _text_problem(content: bytes, suffix: str, min_words: int) -> str | None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    if suffix == ".tex":
        text = _LATEX_COMMAND.sub(" ", _LATEX_COMMENT.sub("", text))
    else:
        for start, end in _INVISIBLE:
            text = _without(text, start, end)
        text = _HEADING.sub("\n", _TAG.sub(" ", text))
    return _words_problem(text, min_words)


def _without(text: str, start: str, end: str) -> str:
    """Return a text without the parts from `start` to `end`."""
    first, *others = text.split(start)
    return first + "".join(part.partition(end)[2] for part in others)


def _words_problem(text: str, min_words: int) -> str | None:
    sentences = _END_OF_SENTENCE.split(text)
    kept = [sentence for sentence in sentences if not _PLACEHOLDER.search(sentence)]
    num_words = len(_WORD.findall("\n".join(kept)))
    if num_words >= min_words:
        return None
    example = next((" ".join(sentence.split()) for sentence in sentences if _PLACEHOLDER.search(sentence)), None)
    others = f", and text such as {example[:60]!r}" if example else ""
    return f"is a placeholder: found {num_words} words{others}; expected at least {min_words} words"


def _pdf_problem(content: bytes, min_words: int) -> str | None:
    if not content.startswith(b"%PDF-") or b"%%EOF" not in content[-2048:]:
        return "is not a complete PDF file"
    try:
        text = pdf_shown_text(content)
    except Unreadable as error:
        return f"cannot be read ({error})"
    readable = sum(character.isascii() and character.isprintable() for character in text)
    if text and readable > 0.9 * len(text):
        return _words_problem(text, min_words)
    if len(text) < 6 * min_words and b"/Image" not in content:
        return f"is a placeholder: found a text of {len(text)} characters, expected at least {6 * min_words}"
    return None
