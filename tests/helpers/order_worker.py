"""Read steps of training batches on a rank, without a model, and write their sequences to FOLDER/RANK.json.

Usage: `python -m order_worker FOLDER MANIFEST GLOBAL_BATCH STEPS WORKERS`, with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from data_helpers import SEQ_LEN, VOCAB_SIZE, places

from open_lm.config.sections import DataConfig
from open_lm.data.loader import build_train_loader
from open_lm.errors import end_process, run_cli


def main() -> None:
    folder, manifest, batch, steps, workers = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = DataConfig(dataset_manifest=[manifest], data_key="npy", workers=int(workers))
    loader = build_train_loader(
        data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=int(batch) // world_size, rank=rank,
        world_size=world_size,
    )  # fmt: skip
    rows = [places(batch.inputs.numpy()) for batch, _ in loader.batches(int(steps))]
    loader.close()
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    end_process(run_cli(lambda _: main()))
