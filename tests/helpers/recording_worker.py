"""Run open_lm.main, record the sequences of every step, and send SIGTERM to rank 0 in a given step.

Usage: `python -m recording_worker FOLDER STOP_AT FLAGS…`. Each process appends lines {"step", "rows"} to
FOLDER/RANK-PID.jsonl. STOP_AT 0 disables the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_helpers import places

from open_lm.errors import end_process, run_cli
from open_lm.main import main


@contextmanager
def recording(folder: Path, stop_at: int) -> Iterator[None]:
    """Record the training steps of this process inside the block."""
    from open_lm.training.trainer import Trainer

    original: Callable[..., Any] = Trainer._train_step
    rank = os.environ.get("RANK", "0")

    def recorded(trainer: Trainer, batch: Any) -> Any:
        line = {"step": trainer.step, "rows": places(batch.inputs)}
        with open(folder / f"{rank}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if trainer.step + 1 == stop_at and rank == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, batch)

    Trainer._train_step = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._train_step = original  # type: ignore[method-assign]


def run(argv: list[str]) -> None:
    with recording(Path(argv[0]), int(argv[1])):
        main(argv[2:])


if __name__ == "__main__":
    end_process(run_cli(run, sys.argv[1:]))
