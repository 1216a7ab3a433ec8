"""The commands of reproduce.sh: flags from recorded settings, reasons without a script, special characters."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from open_lm.config.command_line import load_config_file, parse_args
from open_lm.datapreprocess import make_2048
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.release.datasets import DataFolder
from open_lm.release.reproduce import (
    _common_folder,
    _data_flags,
    obstacles,
    preprocessing,
    raw_obstacle,
    training_settings,
)
from open_lm.release.run_facts import Checkpoint, RunFacts
from open_lm.storage.strict_json import to_json

SETTINGS = {
    "seq_len": 64, "seed": 5, "format": "npy", "content_key": "text", "vocab_size": 258, "separator": "\n\n",
    "shuffle": False, "shard_sequences": 32, "folders": ["0", "1"], "per_source": False, "bos_id": 1,
    "split_documents": True, "drop_tail": True, "special_tokens_in_text": "ids",
    "sampling": {"markers": {}, "factors": {}, "files": {}},
}  # fmt: skip


def folder(location: str = "data/64-v1/1", name: str = "data/64-v1/1/manifest.jsonl", **settings: Any) -> DataFolder:
    record = {"settings": {**SETTINGS, **settings}, "inputs": [{"url": "raw/a.jsonl", "sha256": "0" * 64}]}
    return DataFolder(1, {"name": name}, location, record, has_manifest=True, included=False)


def facts(**params: str) -> RunFacts:
    return RunFacts(Path("run"), {"name": "run", **params}, (Checkpoint("epoch_1.pt", 1, 1, 1, True),))


def test_flags_of_make_2048_give_the_recorded_settings() -> None:
    command = preprocessing(folder())
    assert command.shards == "64-v1/1"
    words = [*command.flags, command.input_flag, "raw", command.output_flag, "out"]
    args = make_2048.make_parser().parse_args(words)
    assert (args.seqlen, args.seed, args.num_consumers, args.shard_size, args.vocab_size) == (64, 5, 2, 32, 258)
    assert args.no_shuffle and args.add_bos and args.split_documents and args.drop_tail
    assert args.allow_special_tokens_in_text and args.separator == r"\n\n"


def test_flags_of_tokenize_shuffle_give_the_recorded_settings() -> None:
    command = preprocessing(folder(folders=[""], format="json.gz", shuffle=True, bos_id=None, separator=None))
    assert command.module.endswith("tokenize_shuffle") and command.shards == ""
    words = [*command.flags, command.input_flag, "raw", command.output_flag, "out"]
    args = tokenize_shuffle.make_parser().parse_args(words)
    assert (args.seqlen, args.seed, args.wds_chunk_size, args.format) == (64, 5, 32, "json.gz")
    assert not args.no_shuffle and not args.add_bos and args.separator is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sampling": {"markers": {"wiki": ["wiki"]}}}, "to which source each raw file belongs"),
        ({"sampling": {"factors": {"wiki": 0.0}}}, "leaves out a source"),
        ({"per_source": True}, "--output-per-source"),
        ({"loss_mask": True}, "another command"),
    ],
)
def test_shards_that_no_command_makes_again_are_reported(change: dict[str, Any], reason: str) -> None:
    assert reason in str(raw_obstacle(folder(**change)))
    assert any(reason in text for text in obstacles(facts(), [folder(**change)]))


def test_runs_from_other_weights_are_reported() -> None:
    assert obstacles(facts(resume="latest", pretrained="None"), [folder()]) == []
    for flag in ("pretrained", "distill_model", "average"):
        assert f"--{flag.replace('_', '-')}: " in obstacles(facts(**{flag: "model.pt"}), [folder()])[0]
    assert "another run" in obstacles(facts(resume="logs/other/checkpoints/epoch_1.pt"), [folder()])[0]
    assert "data.json" in obstacles(facts(), [])[0]


def test_training_settings_are_those_that_determine_the_weights(tmp_path: Path) -> None:
    run = facts(
        lr="0.01", seed="3", wd="0.2", train_num_samples="160", seq_len="64", averagers="poly_8_1", fsdp="True",
        logs="x", train_data_mix_weights="[1.0, 2.0]", val_data="['x']", workers="3", warmup="10",
        grad_clip_norm="None",
    )  # fmt: skip
    values = training_settings(run)
    assert values == {
        "seed": 3, "train_num_samples": 10240, "train_data_mix_weights": [1.0, 2.0], "lr": 0.01, "warmup": 10,
        "averagers": "poly_8_1", "fsdp": True,
    }  # fmt: skip
    (tmp_path / "training.json").write_text(to_json(values))
    assert load_config_file(str(tmp_path / "training.json")) == values
    args = parse_args(["--config", str(tmp_path / "training.json"), "--train-data", "x.tar", "y.tar"])
    assert args.train_num_samples == 10240 and args.fsdp


@pytest.mark.processes
def test_names_with_special_characters_stay_one_word() -> None:
    name = "my data/$(touch x)/64-v1/1/{000..009} 'a\".tar"
    item = folder(location=name.rpartition("/")[0], name=name)
    flags = _data_flags(facts(train_data=f"[{name!r}]"), [item], [item])
    script = f'work=/w; printf "%s\\n" {flags}'
    words = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()
    assert words == ["--train-data", "/w/data/01/64-v1/1/{000..009} 'a\".tar"]


def test_common_folder_of_raw_files() -> None:
    assert _common_folder(["/a/b/c.jsonl", "/a/b/d/e.jsonl"]) == "/a/b/"
    assert _common_folder(["s3://bucket/x/1.jsonl", "s3://bucket/y/2.jsonl"]) == "s3://bucket/"
    assert _common_folder(["a.jsonl"]) == ""
