"""Check that a research paper is one, and not a placeholder."""

from __future__ import annotations

from pathlib import Path

from open_lm.errors import ConfigError
from open_lm.release.documents import MIN_PAPER_WORDS, document_problem

_SUFFIXES = (".pdf", ".md", ".tex")


def check_paper(path: Path) -> None:
    """Raise ConfigError if a file is no PDF, Markdown or LaTeX file, or is a placeholder."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--paper {path}: found {suffix or 'no suffix'}, expected a {', '.join(_SUFFIXES)} file")
    if problem := document_problem(path, MIN_PAPER_WORDS):
        raise ConfigError(f"--paper {path}: {problem}; pass the paper, or leave the flag out")
