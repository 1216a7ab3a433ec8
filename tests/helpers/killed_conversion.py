"""A conversion that is killed before or after it gives a file or folder its name."""

from __future__ import annotations

import os
import signal
from typing import Any

from open_lm.hf import checkpoint_files, weight_files
from open_lm.hf.convert import main

FILE_BYTES = 20_000  # of the weight files, so that there are several


def convert(argv: list[str], kill_at: int, after: bool) -> None:
    """Run the command with small files, and kill this process at the `kill_at`-th rename of a file, counted from 1.

    0: when the complete folder gets its name.
    """
    checkpoint_files.FILE_BYTES = weight_files.SHARD_BYTES = FILE_BYTES
    renames = 0
    originals = {name: getattr(os, name) for name in ("replace", "rename")}

    def counted(name: str, *paths: Any) -> None:
        nonlocal renames
        renames += 1
        is_time = name == "rename" if kill_at == 0 else renames == kill_at
        if is_time and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        originals[name](*paths)
        if is_time:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = lambda *paths: counted("replace", *paths)
    os.rename = lambda *paths: counted("rename", *paths)
    main(argv)
