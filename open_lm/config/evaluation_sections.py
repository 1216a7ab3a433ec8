"""The settings of validation, and of the evaluations while training: tasks of in-context learning and text samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from open_lm.config.fields import Section, flag
from open_lm.system.names import shard_pattern, user_path

# Values of flags and settings of eval/eval_openlm_ckpt.py, whose --help needs no torch.
BASELINE_VERSIONS = ("v2", "v1")  # of the scores of random guessing in DCLM's aggregates; the default first
EVAL_PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")


@dataclass(frozen=True)
class ValidationConfig(Section):
    title: ClassVar[str] = "validation"

    val_data: list[str] | None = flag(
        None, "validation shards, one value per validation set; default: no validation", path=shard_pattern
    )
    val_data_key: list[str] | None = flag(
        None, "format of the samples, one value per validation set or one for all; default: --data-key"
    )
    val_names: list[str] | None = flag(
        None, "name of each validation set in messages, metrics and results; default: from its pattern"
    )
    val_num_samples: int | None = flag(None, "number of tokens to use per validation set; default: all")
    val_max_batches: int | None = flag(
        None, "evaluate at most the first N batches (of --global-val-batch-size) of each validation set; default: all"
    )
    val_frequency: int = flag(1, "validate every N epochs")
    global_val_batch_size: int | None = flag(
        None, "sequences per validation batch, over all devices; default: as in training, or else 8 per device"
    )
    val_seq_ci: bool = flag(
        False, "estimate a 95 % confidence interval of the validation loss by bootstrapping over sequences"
    )
    val_tok_ci: bool = flag(
        False, "estimate a 95 % confidence interval of the validation loss by bootstrapping over tokens"
    )
    val_max_pop_ci: int | None = flag(
        None, "maximum number of sequences or tokens per bootstrap resample; default: unlimited"
    )
    val_iter_ci: int = flag(10000, "number of bootstrap resamples")


@dataclass(frozen=True)
class LiveEvaluationConfig(Section):
    title: ClassVar[str] = "tasks and text samples"

    icl_yaml: list[str] | None = flag(
        None,
        "YAML files with tasks of in-context learning, or names of lists such as light, to evaluate before the first "
        "step, every --icl-every-n-steps steps and after the last one; default: none",
        path=user_path,
    )
    icl_every_n_steps: int = flag(0, "evaluate the tasks every N steps; 0: only before the first and after the last")
    icl_max_examples: int | None = flag(
        None, "use only the first N examples of each task, of each category if it has categories; default: all"
    )
    icl_data_dir: str | None = flag(
        None, "folder of the task data; default: data_dir of the --icl-yaml files", path=user_path
    )
    icl_max_time_share: float | None = flag(
        None, "use fewer examples where the tasks would take more than this share of the time; default: no limit"
    )
    sample_prompts: str | None = flag(
        None,
        "file with one prompt per line; their continuations are logged before the first step, every "
        "--sample-every-n-steps steps and after the last one; default: none",
        path=user_path,
    )
    sample_every_n_steps: int = flag(
        0, "continue the prompts every N steps; 0: only before the first and after the last"
    )
    sample_temperature: list[float] | None = flag(
        None, "temperatures of the samples, one sample of each prompt per value; default: 0, the most likely tokens"
    )
    sample_max_tokens: int = flag(64, "maximum number of new tokens of a sample")
    tokenizer: str | None = flag(
        None,
        "tokenizer of the tasks and prompts: hub name, folder, tokenizer.json or sentencepiece .model file; default: "
        "the tokenizer of the training data, or else of the checkpoint's run",
        path=user_path,
    )
