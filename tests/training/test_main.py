"""Full runs: training, resuming, evaluating, and their files."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.distributed.processes import Runtime
from open_lm.errors import CheckpointError, ConfigError, DataError, StorageError
from open_lm.main import main
from open_lm.training.guard import TrainingDiverged
from open_lm.training.setup import check_device, resolve_batch_sizes


@pytest.fixture
def golden(shared_dir: Path) -> list[str]:
    """Return the flags of the golden run (8 sequences per step, 64 steps per epoch), with 20 steps per epoch."""
    run = shared_dir / "compat/run"
    return shlex.split(
        f"--model {run}/tiny_bytes.json --dataset-manifest {run}/data/manifest.jsonl --data-key json.gz "
        "--train-num-samples 10240 --epochs 2 --global-batch-size 8 --lr 3e-3 --warmup 8 --wd 0.1 --beta2 0.95 "
        "--grad-clip-norm 1 --z-loss-coefficient 1e-4 --log-every-n-steps 5 --seed 3 --precision fp32 --workers 0"
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows(run) if "train/loss" in row]


def validation(shared_dir: Path) -> list[str]:
    return ["--val-data", str(shared_dir / "compat/run/data/00000007.tar"), "--val-num-samples", "2048"]


def test_run_writes_the_files_that_existing_users_read(golden: list[str], shared_dir: Path, tmp_path: Path) -> None:
    flags = [*golden, *validation(shared_dir), "--logs", str(tmp_path), "--name", "run"]
    args = main([*flags, "--copy-codebase", "--report-to", "tensorboard", "--log-logit-mean"])
    run = tmp_path / "run"
    assert args.name == "run" and args.seq_len == 64
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *(f"{kind}_{epoch}.pt" for kind in ("epoch", "optimizer", "stats") for epoch in (1, 2)),
        "results.jsonl",
        "step_00000020",
        "step_00000040",
    }
    params = dict(line.split(": ", 1) for line in (run / "params.txt").read_text().splitlines())
    assert list(params) == sorted(params)
    upstream = (shared_dir / "compat/run/logs/upstream/params.txt").read_text().splitlines()
    assert set(params) >= {line.split(":")[0] for line in upstream}
    assert params["train_num_samples"] == "160", "in sequences, as in the original"
    assert (params["per_gpu_batch_size"], params["world_size"], params["device"]) == ("8", "1", str(args.device))
    log = (run / "out.log").read_text()
    for text in (
        "Model (has 164416 parameters):",
        "  accum_freq: 1\n",
        "Using CrossEntropyLossWithZLoss.",
        "==> Checkpoint 2, steps 40, tokens seen 20480",
        "Start epoch 1",
        "Train Epoch: 1 [160/160 (100%)] Loss: ",
        " | step: 40 has reached/exceeded total_steps: 40. ending training.",
        "Model has seen the desired number of tokens. Ending training.",
    ):
        assert text in log, text
    assert all(re.match(r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| [A-Z]+ \| ", line) for line in log.splitlines()[-3:])
    results = [json.loads(line) for line in (run / "checkpoints/results.jsonl").read_text().splitlines()]
    assert [result[0]["train_tokens"] for result in results] == [10240, 20480]
    assert results[1][0]["loss"] < results[0][0]["loss"] < 5 and results[1][0]["tokens"] == 2048
    saved = torch.load(run / "checkpoints/epoch_2.pt", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["samples_seen"]) == (2, 40, 320)
    assert saved["evaluation_metrics"] == results[1]
    assert torch.load(run / "checkpoints/stats_2.pt", weights_only=True)["is_final_checkpoint"] is True
    assert (run / "code/open_lm/training/trainer.py").exists() and any((run / "tensorboard").iterdir())
    last = [row for row in rows(run) if "train/loss" in row][-1]
    assert last["tokens"] == 20480 and {"train/logit_mean", "train/mfu", "train/tokens_per_second"} <= set(last)


def remove_second_epoch(run: Path, sharded: bool) -> None:
    """Remove the second epoch's checkpoints, and one format of the first epoch's."""
    checkpoints = run / "checkpoints"
    for path in [*checkpoints.glob("*_2.pt"), *(checkpoints.glob("*_1.pt") if sharded else [])]:
        path.unlink()
    for path in [checkpoints / "step_00000040", *([] if sharded else [checkpoints / "step_00000020"])]:
        shutil.rmtree(path)


@pytest.mark.parametrize("sharded", [False, True])
def test_interrupted_run_equals_an_uninterrupted_one(sharded: bool, golden: list[str], tmp_path: Path) -> None:
    flags = [*golden, "--averagers", "poly_8_1", "--accum-freq", "2", "--logs", str(tmp_path)]
    main([*flags, "--name", "uninterrupted"])
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "interrupted")
    remove_second_epoch(tmp_path / "interrupted", sharded)
    main([*flags, "--name", "interrupted", "--resume", "latest"])
    expected, resumed = losses(tmp_path / "uninterrupted"), losses(tmp_path / "interrupted")
    assert resumed == expected
    for name in ("epoch_2.pt", "optimizer_2.pt", "poly_8_1_2.pt"):
        ours, theirs = (
            torch.load(tmp_path / run / "checkpoints" / name, weights_only=True)
            for run in ("uninterrupted", "interrupted")
        )
        for key in ("state_dict", "av_model_sd"):
            for weight, value in ours.get(key, {}).items():
                assert torch.equal(value, theirs[key][weight]), weight
    main([*flags, "--name", "interrupted", "--resume", "latest"])
    assert losses(tmp_path / "interrupted") == expected, "a finished run does nothing"


@pytest.mark.processes
def test_layouts_and_resuming_in_another_layout(
    golden: list[str], shared_dir: Path, tmp_path: Path, ranks: Callable[..., object]
) -> None:
    """One process, and two FSDP ranks with accumulation that are resumed in one process, give the same losses."""
    flags = [*golden, *validation(shared_dir)]
    main([*flags, "--logs", str(tmp_path / "logs"), "--name", "one"])
    ranks(2, "open_lm.main", *flags, "--name", "two", "--fsdp", "--accum-freq", "2", "--workers", "1")
    one, two = tmp_path / "logs/one", tmp_path / "logs/two"
    assert [step for step, *_ in losses(one)] == [step for step, *_ in losses(two)]
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-5)
    results = [json.loads((run / "checkpoints/results.jsonl").read_text().splitlines()[-1]) for run in (one, two)]
    assert results[0][0]["loss"] == pytest.approx(results[1][0]["loss"], abs=1e-5)
    assert results[0][0]["tokens"] == results[1][0]["tokens"] == 2048
    before = losses(two)
    remove_second_epoch(two, sharded=True)
    main([*flags, "--logs", str(tmp_path / "logs"), "--name", "two", "--resume", "latest"])
    for ours, theirs in zip(losses(two), before, strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-5)


def test_existing_run_is_not_overwritten(golden: list[str], tmp_path: Path) -> None:
    flags = [*golden, "--logs", str(tmp_path), "--name", "run"]
    main([*flags, "--epochs", "1"])
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"already exists.*--resume latest"):
        main(flags)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_failed_start_can_be_repeated_under_its_name(golden: list[str], tmp_path: Path) -> None:
    flags = [*golden, "--logs", str(tmp_path), "--name", "run", "--epochs", "1"]
    with pytest.raises(DataError, match="missing"):
        main([*flags, "--val-data", str(tmp_path / "missing.tar")])
    with pytest.raises(CheckpointError):
        main([*flags, "--pretrained", str(tmp_path / "nothing.pt")])
    main(flags)
    assert (tmp_path / "run/checkpoints/epoch_1.pt").exists()
    assert not [handler for handler in logging.getLogger().handlers if "open_lm" in type(handler).__module__]


def test_start_with_a_missing_bucket_can_be_repeated(golden: list[str], tmp_path: Path, s3_bucket: str) -> None:
    flags = [*golden, "--logs", str(tmp_path), "--name", "run", "--epochs", "1"]
    for _ in range(2):
        with pytest.raises(StorageError, match="no such bucket"):
            main([*flags, "--remote-sync", f"s3://{s3_bucket}-not/runs"])
    main(flags)
    assert (tmp_path / "run/out.log").read_text().count("Start epoch 0") == 1


def test_log_ends_with_the_error_that_ended_the_run(
    golden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("open_lm.training.run.Training._end_epoch", interrupted)
    copy = ["--remote-sync", str(tmp_path / "copy"), "--remote-sync-protocol", "fsspec"]
    with pytest.raises(KeyboardInterrupt):
        main([*golden, *copy, "--logs", str(tmp_path), "--name", "run"])
    for log in (tmp_path / "run/out.log", tmp_path / "copy/run/out.log"):
        assert "| ERROR | the run ended early: KeyboardInterrupt" in log.read_text()
    assert "ended early" not in capsys.readouterr().out, "the console shows the error itself"


def test_console_shows_the_main_and_changed_settings_and_the_log_file_all(
    golden: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*golden, "--epochs", "1", "--logs", str(tmp_path), "--name", "run"])
    console, log = capsys.readouterr().out, (tmp_path / "run/out.log").read_text()
    for text in ("Model (has ", "FusedLinear", "Params:", "  wandb_notes:", "==> Checkpoint 1, steps 20"):
        assert text in log and text not in console, text
    assert "  train_num_samples: 160\n" in log, "in sequences, as in params.txt"
    for text in (
        "train_num_samples: 10240 tokens per epoch",
        "  lr: 0.003\n",
        "  wd: 0.1\n",
        "164,416 trained",
        "params.txt",
    ):
        assert text in console and text in log, text
    assert "muon_momentum" not in console, "neither important nor changed"
    assert len(console.splitlines()) < 45


def test_logs_none_writes_nothing(golden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main([*golden, "--epochs", "1", "--logs", "none", "--report-to", "tensorboard", "--save-most-recent"])
    assert list(tmp_path.iterdir()) == []


def test_diverging_run_stops_and_saves_its_state(golden: list[str], tmp_path: Path) -> None:
    wild = ["--lr", "1e30", "--warmup", "1", "--logs", str(tmp_path), "--name", "wild"]
    with pytest.raises(TrainingDiverged, match=r"training diverged at step \d+ "):
        main([*golden, *wild])
    run = tmp_path / "wild"
    failed = torch.load(run / "checkpoints_failed/epoch_0.pt", weights_only=True)
    assert 0 < failed["step"] < 20
    assert not list((run / "checkpoints").glob("epoch_*.pt"))
    assert "Training exiting due to NaN value" in (run / "out.log").read_text()


def test_pretrained_start_loads_weights_or_full_state(golden: list[str], tmp_path: Path) -> None:
    flags = [*golden, "--logs", str(tmp_path)]
    main([*flags, "--name", "first"])
    checkpoint = str(tmp_path / "first/checkpoints/epoch_1.pt")
    main([*flags, "--name", "weights", "--pretrained", checkpoint, "--seed", "4"])
    main([*flags, "--name", "state", "--pretrained", checkpoint, "--load-pretrained-state"])
    first, weights = losses(tmp_path / "first"), losses(tmp_path / "weights")
    assert weights[0][0] == 1 and weights[0][1] < first[0][1] - 1
    assert losses(tmp_path / "state") == [entry for entry in first if entry[0] > 20]
    with pytest.raises(CheckpointError, match="--seed 3, this run has --seed 4"):
        main([*flags, "--name", "other", "--resume", checkpoint, "--seed", "4"])


def test_averaged_models_are_evaluated(golden: list[str], shared_dir: Path, tmp_path: Path) -> None:
    flags = [*golden, "--logs", str(tmp_path)]
    main([*flags, "--name", "run", "--averagers", "poly_8_1,ema_0.9", "--log-avg-model-training-loss", "5"])
    folder = tmp_path / "run/checkpoints"
    model = [*golden[:2], *validation(shared_dir), "--data-key", "json.gz", "--workers", "0", "--precision", "fp32"]
    pair = [str(folder / "epoch_1.pt"), str(folder / "epoch_2.pt")]

    def loss(name: str, *source: str) -> dict[str, Any]:
        main([*model, "--logs", str(tmp_path), "--name", name, *source])
        return json.loads((tmp_path / name / "checkpoints/results.jsonl").read_text())[0]

    last = loss("last", "--resume", pair[1])
    only_last = loss("only", "--average", *pair, "--average-coefficients", "0", "1")
    assert only_last["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert loss("mean", "--average", *pair)["loss"] != pytest.approx(last["loss"], abs=1e-4)
    averaged = loss("averager", "--resume", pair[1], "--averagers", "poly_8_1")
    assert averaged["average"] == "poly_8_1" and averaged["loss"] != pytest.approx(last["loss"], abs=1e-4)
    logged = [row for row in rows(tmp_path / "run") if "train/ema_0.9_loss" in row]
    assert logged and all(row["train/ema_0.9_loss"] < 8 for row in logged)


SYNTHETIC = shlex.split(
    "--model open_lm_test_tiny --dataset-type synthetic --train-num-samples 512 --epochs 2 --global-batch-size 8 "
    "--workers 0 --warmup 2 --log-every-n-steps 2"
)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--precision", "amp", "--fsdp", "--fsdp-cpu-offload", "--experimental-meta-device"],
        ["--precision", "amp_bfloat16", "--fsdp", "--fsdp-pure-bf16", "--fsdp-backward-prefetch"],
        ["--precision", "fp32", "--force-distributed", "--ddp-static-graph", "--grad-checkpointing"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--lr-cooldown-end", "1e-5"],
        ["--batch-size", "2", "--accum-freq", "2", "--save-most-recent", "--delete-previous-checkpoint"],
    ],
    ids=" ".join,
)
def test_flags_work_together(flags: list[str], tmp_path: Path) -> None:
    given = SYNTHETIC
    if "--batch-size" in flags:
        place = given.index("--global-batch-size")
        given = [*given[:place], *given[place + 2 :]]
    main([*given, *flags, "--logs", str(tmp_path), "--name", "run"])
    run = tmp_path / "run"
    last = [row for row in rows(run) if "train/loss" in row][-1]
    assert last["tokens"] == 1024 and 1 < last["train/loss"] < 6
    if "--lr-scheduler" in flags:
        rates = [row["train/lr"] for row in rows(run) if "train/lr" in row]
        assert rates[1] == 5e-4 and 1e-5 < rates[-1] < 3e-4
    if "--save-most-recent" in flags:
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert "epoch_latest.pt" in names and "epoch_2.pt" in names and "epoch_1.pt" not in names


@pytest.mark.processes
def test_compiled_training_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("compiling for CPU needs a C++ compiler")
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 1)  # each compile worker would import torch
    flags = [*SYNTHETIC, "--precision", "fp32", "--logs", str(tmp_path)]
    main([*flags, "--name", "eager"])
    main([*flags, "--name", "compiled", "--torchcompile"])
    for ours, theirs in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    names = torch.load(tmp_path / "compiled/checkpoints/epoch_2.pt", weights_only=True)["state_dict"]
    assert "layers.0.attention.in_proj.weight" in names


def test_run_folder_is_copied_to_a_bucket(golden: list[str], tmp_path: Path, s3_bucket: str) -> None:
    flags = [*golden, "--logs", str(tmp_path), "--name", "run", "--remote-sync", f"s3://{s3_bucket}/runs"]
    main([*flags, "--epochs", "1"])
    from open_lm import storage

    copied = storage.read_bytes(f"s3://{s3_bucket}/runs/run/checkpoints/epoch_1.pt")
    assert copied == (tmp_path / "run/checkpoints/epoch_1.pt").read_bytes()
    assert storage.exists(f"s3://{s3_bucket}/runs/run/params.txt")


@pytest.mark.processes
def test_readme_command_on_two_processes(
    shared_dir: Path, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shards = str(shared_dir / "compat/run/data/{00000001..00000004}.tar")
    flags = shlex.split(
        f"--model {shared_dir}/compat/run/tiny_bytes.json --train-data {shards} --train-num-samples 4096 --workers 2 "
        "--dataset-resampled --precision amp_bfloat16 --batch-size 2 --grad-checkpointing --log-every-n-steps 10 "
        "--grad-clip-norm 1 --data-key txt --lr 3e-4 --fsdp --fsdp-amp --warmup 20 --wd 0.1 --beta2 0.95 --epochs 2 "
        "--report-to all --wandb-project-name open_lm_example --name ex --resume latest"
    )
    result = torchrun(2, "open_lm.main", *flags)
    run = tmp_path / "logs/ex"
    assert {path.name for path in (run / "checkpoints").glob("epoch_*")} == {"epoch_1.pt", "epoch_2.pt"}
    assert any((run / "tensorboard").iterdir()) and any((run / "wandb").iterdir())
    assert result.stdout.count("Start epoch 0") == 1, "only one rank logs"
    assert losses(run)[-1][0] == 32


# ------------------------------------------------------------------------------------------------ mistakes
def test_indivisible_batch_sizes_are_explained() -> None:
    args = parse_args(["--global-batch-size", "12", "--accum-freq", "2"])
    with pytest.raises(ConfigError, match="12 is not divisible by 4 ranks x --accum-freq 2: give a multiple of 8"):
        resolve_batch_sizes(args, world_size=4)
    args = parse_args(["--batch-size", "3", "--accum-freq", "2", "--val-data", "x"])
    resolve_batch_sizes(args, world_size=4)
    assert (args.global_batch_size, args.per_gpu_batch_size) == (24, 6)
    assert (args.global_val_batch_size, args.per_gpu_val_batch_size) == (12, 3)
    args = parse_args(["--global-batch-size", "8", "--val-data", "x", "--global-val-batch-size", "6"])
    with pytest.raises(ConfigError, match="--global-val-batch-size 6 is not divisible by 4 ranks"):
        resolve_batch_sizes(args, world_size=4)


def test_evaluation_does_not_require_a_divisible_training_batch() -> None:
    args = parse_args(["--val-data", "x", "--accum-freq", "5"])
    resolve_batch_sizes(args, world_size=9)
    assert (args.global_val_batch_size, args.per_gpu_val_batch_size) == (9, 1)
    args = parse_args(["--val-data", "x", "--global-val-batch-size", "10"])
    with pytest.raises(ConfigError, match="--global-val-batch-size 10 is not divisible by 9 ranks"):
        resolve_batch_sizes(args, world_size=9)
    runtime = Runtime(world_size=2, device=torch.device("cuda"))
    check_device(Config.from_namespace(parse_args(["--fsdp", "--val-data", "x"])), {}, runtime, MeshLayout())


@pytest.mark.parametrize("seq_len", [1, 63, 65])
def test_odd_sequence_lengths_train_without_context_parallelism(seq_len: int, tmp_path: Path) -> None:
    shape = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": seq_len, "vocab_size": 64}
    (tmp_path / "odd.json").write_text(json.dumps(shape))
    flags = ["--model", str(tmp_path / "odd.json"), "--precision", "fp32", "--logs", str(tmp_path), "--name", "run"]
    main([*SYNTHETIC[2:], "--train-num-samples", str(seq_len * 16), *flags])
    assert len(losses(tmp_path / "run")) == 4 and all(loss < 6 for _, loss, _ in losses(tmp_path / "run"))


def test_fp8_rejects_an_indivisible_number_of_tokens(tmp_path: Path) -> None:
    shape = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": 20, "vocab_size": 64}
    (tmp_path / "odd.json").write_text(json.dumps(shape))
    flags = [
        "--model",
        str(tmp_path / "odd.json"),
        "--logs",
        str(tmp_path),
        "--name",
        "run",
        "--fp8",
        "--accum-freq",
        "4",
    ]
    with pytest.raises(ConfigError, match="2 sequences x 20 = 40 tokens: set --global-batch-size to a multiple of 16"):
        main([*SYNTHETIC[2:], *flags])


def test_evaluation_without_a_model_is_an_error(shared_dir: Path, tmp_path: Path) -> None:
    model = str(shared_dir / "compat/run/tiny_bytes.json")
    with pytest.raises(ConfigError, match="no model to evaluate: give its checkpoint"):
        main(["--model", model, *validation(shared_dir), "--logs", str(tmp_path), "--name", "run"])


@pytest.mark.processes
def test_mistakes_exit_with_one_message_and_write_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "open_lm.main", "--model", "open_lm_11n", "--dataset-type", "synthetic"]
    command += ["--train-num-samples", "4096", "--logs", str(tmp_path / "logs"), "--global-batch-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "open_lm_11m" in result.stderr and "Traceback" not in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.processes
def test_common_mistake_of_all_ranks_is_printed_once(
    shared_dir: Path, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model = str(shared_dir / "compat/run/tiny_bytes.json")
    flags = ["--model", model, "--train-data", "missing-{1..2}.tar", "--train-num-samples", "4096", "--workers", "0"]
    result = torchrun(2, "open_lm.main", *flags, check=False)
    assert result.returncode != 0 and result.stderr.count("error: No shard found") == 1
    assert result.stderr.count("missing-2.tar (of") == 1


@pytest.mark.processes
def test_help_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, open_lm.main\n"
        "try:\n    open_lm.main.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'webdataset', 'boto3', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    env = {**os.environ, "COLUMNS": "100"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert "--train-num-samples" in result.stdout


@pytest.mark.parametrize(("flags", "tensor"), [("--fsdp", 1), ("--tensor-parallel 2", 2)])
def test_float16_with_loss_scaling_rejects_sharded_parameters(flags: str, tensor: int) -> None:
    config = Config.from_namespace(parse_args(flags.split()))
    runtime = Runtime(world_size=2, device=torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=f"does not work with {flags.split(maxsplit=1)[0]}: give --precision amp_bfloat16"
    ):
        check_device(config, {}, runtime, MeshLayout(tensor=tensor))
