"""The summary of settings on the console."""

from __future__ import annotations

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config
from open_lm.training.summary import _EVALUATION, _TRAINING, summarize_settings


def summary(argv: str) -> str:
    return "\n".join(summarize_settings(Config.from_namespace(parse_args(argv.split())), "logs/x/params.txt"))


def test_training_shows_main_settings_in_the_given_units_and_changed_ones() -> None:
    text = summary("--train-data a.tar b.tar --train-num-samples 65536 --wd 0.3 --fsdp --no-decay-norms --beta1 0.9")
    assert "Main settings (all settings: logs/x/params.txt):\n  model: open_lm_1b\n  train_data: a.tar b.tar\n" in text
    assert "  train_num_samples: 65536 tokens per epoch\n" in text
    changed = text.partition("Other settings that differ from the defaults:\n")[2]
    assert changed.splitlines() == ["  wd: 0.3", "  no_decay_norms: True", "  fsdp: True"]


def test_evaluation_shows_what_it_evaluates() -> None:
    text = summary("--val-data v.tar --resume epoch_1.pt --val-num-samples 4096")
    assert "  resume: epoch_1.pt\n  val_data: v.tar\n" in text and "  val_num_samples: 4096 tokens" in text
    assert "  lr:" not in text and "  warmup:" not in text
    assert "  model: gpt (transformers)\n" in summary("--val-data v.tar --hf-model gpt --hf-seq-len 8")


def test_many_values_are_shortened() -> None:
    shards = " ".join(f"data/shard-{number}.tar" for number in range(500))
    text = summary(f"--train-data {shards}")
    assert "… (500 values)" in text and len(text) < 1000


def test_main_settings_are_few_and_exist() -> None:
    defaults = vars(parse_args([]))
    alternatives = {"dataset_manifest", "train_text"}  # a run has one of three sources of data
    assert len(set(_TRAINING) - alternatives) <= 10 and set(_TRAINING) | set(_EVALUATION) <= set(defaults)
