"""Evaluate perplexity sets as DCLM's evaluation script does, in the environment of llm-foundry: FOLDER is compat/run.

Prints the results as JSON. The names, the order of the calls and the arguments are those of its eval_openlm_ckpt.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from open_lm.attention import ATTN_ACTIVATIONS, ATTN_SEQ_SCALARS
from open_lm.data import get_data
from open_lm.distributed import init_distributed_device, is_master, world_info_from_env
from open_lm.evaluate import evaluate_loop
from open_lm.file_utils import pt_load
from open_lm.main import load_model
from open_lm.model import create_params
from open_lm.utils.transformers.hf_config import OpenLMConfig
from open_lm.utils.transformers.hf_model import OpenLMforCausalLM


def arguments(run: Path, sets: list[str]) -> argparse.Namespace:
    """Return what the script has after it has read params.txt, and what it sets for a perplexity set."""
    settings: dict[str, Any] = {
        "model": str(run / "tiny_bytes.json"), "seed": 9, "fsdp": False, "distributed": True, "wandb": None,
        "dist_backend": "gloo", "dist_url": "env://", "no_set_device_rank": False, "force_distributed": False,
        "precision": "fp32", "per_gpu_batch_size": 8, "accum_freq": 1, "workers": 0, "seq_len": 64, "vocab_size": 256,
        "train_num_samples": 512, "val_iter_ci": 200, "val_max_pop_ci": None, "preset_world_size": None,
    }  # fmt: skip
    settings |= {"val_data": sets, "val_data_key": ["json.gz"] * len(sets), "squash_mask_left": True}
    settings |= {"target_mask_individual": 50400, "target_mask_left": 50300, "val_seq_ci": True, "val_tok_ci": True}
    return argparse.Namespace(**settings)


def main() -> None:
    run = Path(sys.argv[1])
    sets = [str(run / "data" / name) for name in ("00000007.tar", "00000008.tar")]
    args = arguments(run, sets)
    args.checkpoint = args.resume = str(run / "logs/upstream/checkpoints/epoch_2.pt")
    model = OpenLMforCausalLM(OpenLMConfig(create_params(args)))
    args.distributed = False
    load_model(args, model.model, different_seed=True)
    args.distributed = True
    assert pt_load(args.resume, map_location="cpu")["epoch"] == 2
    model.model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model = model.to(init_distributed_device(args))
    assert is_master(args) and world_info_from_env() == (0, 0, 1)
    assert "relu" in ATTN_ACTIVATIONS and "max" in ATTN_SEQ_SCALARS
    args.per_gpu_val_batch_size = args.per_gpu_batch_size // args.accum_freq
    data = get_data(args, epoch=0, tokenizer=None, skip_train=True)
    print(json.dumps(evaluate_loop(model.model, data["val_list"], 0, args, None)))


if __name__ == "__main__":
    main()
