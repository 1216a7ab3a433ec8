"""Runs of the trainer one after the other on the ranks of one process group.

`python -m lora_worker JOB…`: each JOB is a JSON list of flags of open_lm.main.
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from open_lm.errors import end_process
from open_lm.main import main

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for job in sys.argv[1:]:
        main(json.loads(job))
    dist.destroy_process_group()
    end_process(0)
