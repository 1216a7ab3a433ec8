"""Make shards for supervised fine-tuning from conversations.

    python datapreprocess/make_sft.py --input-files chats.jsonl --output-dir sft --tokenizer TOKENIZER

writes sft/shard-0000000.tar, … with a loss mask, manifest.jsonl and dataset.json. See docs/finetuning.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: import this copy of the package, and no modules from this folder
    _ROOT = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_ROOT if (_ROOT / "open_lm").is_dir() else _ROOT.parent)

from open_lm.finetune.sft_data import main, make_parser

__all__ = ["main", "make_parser"]

if __name__ == "__main__":
    from open_lm.errors import run_cli

    raise SystemExit(run_cli(main))
