"""Train a model on rewards of its own completions with group relative policy optimization (GRPO), through TRL.

python -m open_lm.finetune.grpo --pretrained logs/sft --train-data prompts.jsonl --reward exact_match --name grpo

A row of the data has a prompt, a text or a list of messages, and keys that the rewards read, such as answer. The result
is in {logs}/{name}: checkpoints/ for this package (--pretrained, generate.py) and hf/ for transformers.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from open_lm.config.fields import Section, flag
from open_lm.config.registry import REWARDS
from open_lm.errors import ConfigError, DataError, join_problems, run_cli
from open_lm.finetune.flags import parse
from open_lm.system.names import user_path

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")  # of TRL
_MAX_PASSES = 1 << 20


@dataclass(frozen=True)
class GrpoConfig(Section):
    title: ClassVar[str] = "group relative policy optimization"

    reward: list[str] | None = flag(
        None, "reward functions whose weighted sum is the reward: FILE.py:function, or", entries=REWARDS, path=user_path
    )
    reward_weights: list[float] | None = flag(None, "weights of the reward functions; default: 1 each")
    num_generations: int = flag(8, "completions per prompt, whose rewards are compared")
    max_completion_tokens: int = flag(256, "longest completion in tokens")
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(1.0, "sample from the most probable tokens with this total probability")
    beta: float = flag(0.0, "weight of the KL divergence from the model at the start; 0: load no reference model")
    loss_type: str = flag("dapo", "loss of TRL", choices=LOSS_TYPES)
    scale_rewards: str = flag("group", "standard deviation that divides advantages", choices=("group", "batch", "none"))
    epsilon: float = flag(0.2, "lower bound 1 - epsilon of the clipped probability ratio")
    epsilon_high: float | None = flag(None, "upper bound 1 + epsilon-high of the ratio; default: --epsilon")
    num_iterations: int = flag(1, "updates with the completions of one round of sampling")
    mask_truncated: bool = flag(False, "ignore completions that do not end within --max-completion-tokens")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: invalid flags, or a missing package.
        DataError: rows that cannot be used, or a reward function that fails.
        CheckpointError: a model that is missing, damaged or does not fit.
    """
    args = parse(argv, "grpo", __doc__ or "", GrpoConfig)
    _check(args)
    from open_lm.finetune.tuning_run import require_trl

    require_trl()
    run_grpo(args)


def _check(args: Namespace) -> None:
    """Raise ConfigError with the problems of settings that concern this command only."""
    problems = []
    if not args.reward:
        problems.append(f"--reward is missing, expected FILE.py:function or one of {', '.join(REWARDS)}")
    elif args.reward_weights is not None and len(args.reward_weights) != len(args.reward):
        problems.append(f"--reward-weights: found {len(args.reward_weights)} for {len(args.reward)} rewards")
    if args.num_generations < 2:
        problems.append(f"--num-generations: found {args.num_generations}, expected 2 or more")
    elif args.global_batch_size % args.num_generations:
        problems.append(
            f"--global-batch-size: found {args.global_batch_size} completions, expected a multiple of "
            f"--num-generations {args.num_generations}"
        )
    if args.temperature <= 0:
        problems.append(f"--temperature: found {args.temperature}, expected above 0")
    if args.num_iterations < 1 or args.save_every_n_steps % max(1, args.num_iterations):
        problems.append(
            f"--save-every-n-steps: found {args.save_every_n_steps}, expected a multiple of --num-iterations "
            f"{args.num_iterations}, because a resumed run samples new completions"
        )
    if problems:
        raise ConfigError(join_problems(problems, "invalid settings"))


def run_grpo(args: Namespace) -> dict[str, float]:
    """Train, and return the metrics of the last evaluation: "val/reward" and others."""
    from open_lm.finetune.preference_data import Row, is_conversation, read_prompts
    from open_lm.finetune.rewards import load_rewards
    from open_lm.finetune.tuning_data import fitting, prompt_tokens
    from open_lm.finetune.tuning_run import TuningRun, train

    rewards = load_rewards(args.reward)
    rows = read_prompts(args.train_data)
    val_rows = read_prompts(args.val_data) if args.val_data else None
    run = TuningRun(args, "grpo")
    with run.claim():
        tokenizer = run.load_tokenizer(is_conversation(rows[0]))
        limit = run.max_tokens() - args.max_completion_tokens
        if limit < 1:
            raise ConfigError(
                f"--max-completion-tokens: found {args.max_completion_tokens}, but the model has sequences of "
                f"{run.max_tokens()} tokens, prompt included"
            )

        def checked(prompts: list[Row]) -> list[Row]:
            return fitting(prompts, [prompt_tokens(row, tokenizer) for row in prompts], limit, args.overlong)

        rows, val_rows = checked(rows), checked(val_rows) if val_rows else None
        _check_number(len(rows), args.global_batch_size // args.num_generations)
        return train(run, lambda: _trainer(run, args, tokenizer, (rows, val_rows), rewards))


def _check_number(num_rows: int, rows_per_step: int) -> None:
    """Raise DataError if there are fewer prompts than an update has; log how many each pass omits."""
    if num_rows < rows_per_step:
        raise DataError(
            f"--train-data has {num_rows} prompts, but an update has {rows_per_step} (--global-batch-size / "
            "--num-generations); add prompts or lower --global-batch-size"
        )
    if num_rows % rows_per_step:
        logging.info(
            f"each pass omits {num_rows % rows_per_step} of {num_rows} prompts, other ones in each pass: an update has "
            f"{rows_per_step} prompts"
        )


def _trainer(run: Any, args: Namespace, tokenizer: Any, data: Any, rewards: Any) -> Any:
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    from open_lm.finetune.trl_settings import peft_config, trl_config
    from open_lm.finetune.tuning_data import stored_dataset
    from open_lm.finetune.tuning_trainer import with_run

    rows, val_rows = data
    model = run.load_model(tokenizer)
    own = {
        **{name: getattr(args, name) for name in ("num_generations", "temperature", "top_p", "beta", "loss_type")},
        **{name: getattr(args, name) for name in ("scale_rewards", "epsilon", "epsilon_high", "num_iterations")},
        "reward_weights": args.reward_weights,
        "max_completion_length": args.max_completion_tokens,
        "mask_truncated_completions": args.mask_truncated,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": min(args.batch_size or args.global_batch_size, 64),
        "disable_dropout": True,
    }
    unknown_ids = list(range(len(tokenizer), model.config.vocab_size))
    if unknown_ids:  # rows of the model without a token
        own["generation_kwargs"] = {"suppress_tokens": unknown_ids}

    class OrderedTrainer(with_run(GRPOTrainer, run)):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            """Return a sampler whose order depends on the seed and the pass only, so that a resumed run repeats it."""
            sampler = super()._get_train_sampler(dataset)
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed * _MAX_PASSES + epoch)
            return sampler

    trainer = OrderedTrainer(
        model=model,
        reward_funcs=rewards,
        args=trl_config(TrlConfig, args, run.trl, own),
        train_dataset=stored_dataset(rows, run.data, "train"),
        eval_dataset=stored_dataset(val_rows, run.data, "val") if val_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config(args, model),
    )
    trainer.round_steps = args.num_iterations
    return trainer


if __name__ == "__main__":
    sys.exit(run_cli(main))
