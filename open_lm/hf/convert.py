"""Convert models between the format of transformers and that of this package; `--help` describes the command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from open_lm.config.conversion_flags import build_parser, with_subcommand
from open_lm.errors import run_cli

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an unsupported model, or settings that do not fit.
        CheckpointError: weights that are missing, damaged or do not fit; --verify: other logits.
        StorageError: a folder cannot be read or written.
    """
    args = build_parser().parse_args(with_subcommand(argv))
    import open_lm.hf.registration  # noqa: F401
    from open_lm.hf.exporting import export_model
    from open_lm.hf.importing import import_model
    from open_lm.hf.verification import verify_export, verify_import

    dtype = _dtype(args.dtype)
    if args.command == "import":
        folder = import_model(args.source, args.target, dtype, args.model, args.vocab_multiple)
        if args.verify:
            verify_import(folder, args.target)
    else:
        checkpoint = export_model(args.source, args.target, dtype, args.model, args.tokenizer)
        if args.verify:
            verify_export(checkpoint, args.target, args.model)
    print(f"{args.target}: complete")


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


if __name__ == "__main__":
    sys.exit(run_cli(main))
