"""Train a model on preference pairs with direct preference optimization (DPO), through TRL.

python -m open_lm.finetune.dpo --pretrained logs/sft --train-data pairs.jsonl --val-data held_out.jsonl --name dpo

A row of the data has prompt, chosen and rejected, each a text or a list of messages. The result is in {logs}/{name}:
checkpoints/ for this package (--pretrained, generate.py) and hf/ for transformers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from open_lm.config.fields import Section, flag
from open_lm.errors import run_cli
from open_lm.finetune.flags import parse

LOSS_TYPES = (  # of TRL
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
)


@dataclass(frozen=True)
class DpoConfig(Section):
    title: ClassVar[str] = "direct preference optimization"

    beta: float = flag(0.1, "strength of the penalty for leaving the reference, which is the model at the start")
    loss_type: list[str] = flag("sigmoid", "losses of TRL; sigmoid is that of DPO", choices=LOSS_TYPES)
    loss_weights: list[float] | None = flag(None, "weights of several losses")
    label_smoothing: float = flag(0.0, "assumed share of pairs whose preference is wrong")
    max_length: int | None = flag(None, "longest prompt with completion, in tokens; default: that of the model")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: invalid flags, or a missing package.
        DataError: rows that cannot be used.
        CheckpointError: a model that is missing, damaged or does not fit.
    """
    args = parse(argv, "dpo", __doc__ or "", DpoConfig)
    from open_lm.finetune.tuning_run import require_trl

    require_trl()
    run_dpo(args)


def run_dpo(args: Namespace) -> dict[str, float]:
    """Train, and return the metrics of the last evaluation: "val/margin", "val/accuracy", "val/loss" and others."""
    from open_lm.finetune.preference_data import Row, is_conversation, read_pairs
    from open_lm.finetune.tuning_data import fitting, pair_tokens
    from open_lm.finetune.tuning_run import TuningRun, train

    rows = read_pairs(args.train_data)
    val_rows = read_pairs(args.val_data) if args.val_data else None
    run = TuningRun(args, "dpo")
    with run.claim():
        tokenizer = run.load_tokenizer(is_conversation(rows[0]))
        limit = min(args.max_length or run.max_tokens(), run.max_tokens())

        def checked(pairs: list[Row]) -> list[Row]:
            return fitting(pairs, [pair_tokens(pair, tokenizer) for pair in pairs], limit, args.overlong)

        rows, val_rows = checked(rows), checked(val_rows) if val_rows else None
        return train(run, lambda: _trainer(run, args, tokenizer, (rows, val_rows), limit))


def _trainer(run: Any, args: Namespace, tokenizer: Any, data: Any, limit: int) -> Any:
    from trl import DPOConfig as TrlConfig
    from trl import DPOTrainer

    from open_lm.finetune.trl_settings import peft_config, trl_config
    from open_lm.finetune.tuning_data import stored_dataset
    from open_lm.finetune.tuning_trainer import with_run

    own = {
        "beta": args.beta,
        "loss_type": args.loss_type,
        "loss_weights": args.loss_weights,
        "label_smoothing": args.label_smoothing,
        "max_length": limit,
        # The reference is computed once and stored in the run's folder, so that training needs one model in memory.
        "precompute_ref_log_probs": True,
        "per_device_eval_batch_size": args.batch_size or min(args.global_batch_size, 64),
    }
    rows, val_rows = data
    model = run.load_model(tokenizer)
    return with_run(DPOTrainer, run)(
        model=model,
        args=trl_config(TrlConfig, args, run.trl, own),
        train_dataset=stored_dataset(rows, run.data, "train"),
        eval_dataset=stored_dataset(val_rows, run.data, "val") if val_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config(args, model),
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
