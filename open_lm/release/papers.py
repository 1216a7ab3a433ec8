"""Check that a research paper is one, and not a placeholder."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from open_lm.errors import ConfigError

_SUFFIXES = (".pdf", ".md", ".tex")
_MIN_WORDS = 300  # of a text; a placeholder has fewer
_MIN_PDF_CHARACTERS = 1500
_PLACEHOLDER = re.compile(
    r"lorem ipsum|to be (?:written|completed|added|announced)|coming soon|under construction|place ?holder|"
    r"(?:paper|text|content)s? (?:goes|go) here|\bTBD\b",
    re.IGNORECASE,
)
_STREAM = re.compile(rb"stream\r?\n(.*?)\r?\nendstream", re.DOTALL)
_SHOWN = re.compile(rb"\(((?:[^()\\]|\\.)*)\)|<([0-9A-Fa-f\s]+)>(?=\s*(?:Tj|[-\d\[\]]))", re.DOTALL)
_TEXT_OPERATOR = re.compile(rb"T[jJ]\b")


def check_paper(path: Path) -> None:
    """Raise ConfigError if a file is no PDF, Markdown or LaTeX file, or is a placeholder."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--paper {path}: found {suffix or 'no suffix'}, expected a {', '.join(_SUFFIXES)} file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--paper {path}: cannot be read ({error.strerror}); expected a file") from error
    problem = _pdf_problem(content) if suffix == ".pdf" else _text_problem(content)
    if problem:
        raise ConfigError(f"--paper {path}: {problem}; pass the paper, or leave the flag out")


def _pdf_problem(content: bytes) -> str | None:
    if not content.startswith(b"%PDF-") or b"%%EOF" not in content[-2048:]:
        return "is not a complete PDF file"
    characters, has_image = 0, b"/Image" in content
    for match in _STREAM.finditer(content):
        stream = _inflate(match[1])
        if _TEXT_OPERATOR.search(stream):
            characters += sum(len(text) + len(digits) // 2 for text, digits in _SHOWN.findall(stream))
    if characters < _MIN_PDF_CHARACTERS and not has_image:
        return f"has a text of {characters:,} characters, expected at least {_MIN_PDF_CHARACTERS:,} of a paper"
    return None


def _inflate(stream: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(stream)
    except zlib.error:
        return stream


def _text_problem(content: bytes) -> str | None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    if match := _PLACEHOLDER.search(text):
        return f"holds {match[0]!r}, so it is a placeholder"
    words = re.findall(r"[^\W\d_]{2,}", text)
    if len(words) < _MIN_WORDS:
        return f"has {len(words):,} words, expected at least {_MIN_WORDS} of a paper"
    return None
