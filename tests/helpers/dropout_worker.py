"""Train a step, and write what this rank's dropout draws then: `python -m dropout_worker FOLDER FLAGS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from open_lm.main import main

main(sys.argv[2:])
mask = torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()
Path(sys.argv[1], f"mask_{os.environ['RANK']}.json").write_text(json.dumps(mask))
