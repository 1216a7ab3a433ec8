"""`python -m open_lm.main`: train or evaluate a language model.

Parses flags before it imports torch, so that --help and errors in flags appear quickly. Next on the path of a batch:
open_lm.training.run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.config.sections import ParallelConfig
from open_lm.errors import end_process, run_cli

if TYPE_CHECKING:
    from torch import nn


def main(argv: Sequence[str]) -> argparse.Namespace:
    """Train or evaluate as the flags in `argv` request, in this process (one of several under torchrun).

    Returns the settings when everything is done, including the last remote copy.

    Raises:
        UserError: a problem that the user can fix.
        SystemExit: for --help only.
    """
    args = parse_args(argv, for_run=True)
    # Check the model's name and file before torch is imported.
    architecture = read_architecture(args.model) if args.hf_model is None else {}
    from open_lm.distributed.processes import init_runtime, shutdown
    from open_lm.monitor.loggers import close_logging
    from open_lm.training.run import run

    runtime = init_runtime(ParallelConfig.from_object(args))
    try:
        with ExitStack() as stack:
            run(args, architecture, runtime, stack)
    finally:
        close_logging()
        shutdown(runtime)
    return args


def load_model(args: Any, model: nn.Module, different_seed: bool = False) -> tuple[int, int | None, int | None]:
    """Load `args.resume` into `model` and return (epoch, step, seed); see open_lm.checkpoint.load_model."""
    from open_lm.checkpoint import load_model as load

    return load(args, model, different_seed)


if __name__ == "__main__":
    end_process(run_cli(main))
