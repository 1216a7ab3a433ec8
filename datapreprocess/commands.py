"""What the preprocessing commands share: the last options of both, the tokenizer, logging, notes on flags."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_lm.datapreprocess.tokenization import DocumentEncoder

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
_logger = logging.getLogger("open_lm.datapreprocess")


class Parser(argparse.ArgumentParser):
    """Accepts every flag with dashes and with underscores; a wrong use is a ConfigError, which callers can catch."""

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Like argparse's, with the other spelling of each flag added."""
        spellings = list(names)
        for name in names:
            if name.startswith("--"):
                body = name[2:]
                spellings += [f"--{other}" for other in (body.replace("_", "-"), body.replace("-", "_"))]
        return super().add_argument(*dict.fromkeys(spellings), **options)  # type: ignore[arg-type]

    def error(self, message: str) -> None:  # type: ignore[override]
        from open_lm.errors import ConfigError

        raise ConfigError(f"{message} ({self.prog} --help shows all options)")


def add_common_options(parser: Parser) -> None:
    """The options that both commands have and the original ones had not."""
    parser.add_argument(
        "--eot-token", help="token that ends a document; by default the tokenizer's own end-of-text token"
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out and count what is no document, instead of stopping"
    )
    parser.add_argument(
        "--drop-tail",
        action="store_true",
        help="drop and count the last tokens that fill no sequence; do not pad them",
    )
    parser.add_argument(
        "--work-dir",
        help="folder for intermediate files, removed at the end (default: in the output folder; for a remote output "
        "among this machine's temporary files); on several nodes one that all share",
    )


def make_encoder(tokenizer: str | None, eot_token: str | None, vocab_size: int | None) -> DocumentEncoder:
    """The encoder of a tokenizer, or, for None, of documents that come as ids (end-of-text id 0)."""
    from open_lm.datapreprocess.tokenization import DocumentEncoder

    if tokenizer is None:
        return DocumentEncoder(None, vocab_size)
    from open_lm.tokenizer import load_tokenizer

    return DocumentEncoder(load_tokenizer(tokenizer, eot_token), vocab_size)


def start_logging() -> None:
    """Messages of this package to standard error, when nothing else is set up."""
    if not logging.getLogger().handlers and not logging.getLogger("open_lm").handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("open_lm").addHandler(handler)
        logging.getLogger("open_lm").setLevel(logging.INFO)


def note_without_effect(flags: Sequence[str], reason: str) -> None:
    """Say once that flags of the original command were given and change nothing here."""
    if flags:
        _logger.warning("%s: without effect here, %s", ", ".join(flags), reason)
