"""Ladders: chosen within a budget, written as settings that the trainer accepts, trained, collected and shown."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from open_lm.errors import ConfigError, DataError, UserError
from open_lm.main import main as train
from open_lm.scaling import command
from open_lm.scaling.ladder import DECAY, Choices, Rung, choose, target_rung
from open_lm.scaling.ladder_files import read_ladder
from open_lm.scaling.runs import read_runs
from open_lm.scaling.shapes import FAMILY, generated_shape, named_shape, parse_sizes

TARGET = (7_000_000_000, 140_000_000_000)


def cost(rung: Rung) -> float:
    return rung.cost


def by_name(rungs: list[Rung]) -> dict[str, Rung]:
    return {rung.name: rung for rung in rungs}


@pytest.mark.parametrize("budget", [3e18, 5e19, 1e21])
def test_a_budget_gives_sizes_below_the_target_and_is_not_exceeded(budget: float) -> None:
    rungs = choose(Choices(target=TARGET), budget, cost)
    sizes = sorted({rung.shape.params for rung in rungs})
    assert 3 <= len(sizes) <= 5 and sizes[-1] < TARGET[0]
    assert {rung.shape.model for rung in rungs} <= set(FAMILY)
    assert 0.3 * budget < sum(map(cost, rungs)) <= budget
    assert all(any(rung.multiplier == 20 for rung in rungs if rung.shape.params == size) for size in sizes)


def test_branches_start_at_a_checkpoint_of_their_trunk_and_cost_their_decay_only() -> None:
    shape = named_shape("open_lm_25m")
    rungs = by_name(choose(Choices(shapes=[shape], multipliers=[10, 20, 80]), None, cost))
    trunk = rungs["open_lm_25m_m80"]
    for multiplier in (10, 20):
        branch = rungs[f"open_lm_25m_m{multiplier}"]
        assert branch.trunk == trunk.name and branch.start % trunk.milestone == 0
        assert branch.start == branch.steps * (1 - DECAY)
        assert branch.trained_tokens == pytest.approx(DECAY * branch.tokens)
        assert branch.tokens / shape.params == pytest.approx(multiplier, rel=0.02)
        assert (branch.lr, branch.warmup, branch.global_batch) == (trunk.lr, trunk.warmup, trunk.global_batch)
    separate = choose(Choices(shapes=[shape], multipliers=[10, 20, 80], branches=False), None, cost)
    assert sum(map(cost, rungs.values())) < sum(map(cost, separate))
    assert all(rung.trunk is None and rung.milestone == 0 for rung in separate)


@pytest.mark.parametrize("params", [1e5, 1e6, 8e6, 1e8, 2e9])
def test_generated_shapes_have_about_the_requested_size(params: float) -> None:
    shape = generated_shape(params, vocab_size=256, seq_len=128)
    assert 0.78 < shape.params / params < 1.28
    heads, width = (dict(shape.architecture)[key] for key in ("n_heads", "hidden_dim"))
    assert width % heads == 0 and (width // heads) % 2 == 0


def test_generated_sizes_match_real_models(tmp_path: Path) -> None:
    import torch

    from open_lm.model import create_model

    shape = generated_shape(3e5, vocab_size=256, seq_len=64)
    path = tmp_path / shape.model
    path.write_text(json.dumps(dict(shape.architecture)), encoding="utf-8")
    with torch.device("meta"):
        model = create_model(argparse.Namespace(model=str(path)))
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.params
    assert shape.active_params == shape.params - model.tok_embeddings.weight.numel()
    assert shape.params_non_embedding == shape.active_params - model.output.weight.numel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a budget"),
        (["--flops", "1e15"], "suffices for . sizes of the family, expected at least 3; raise it to about"),
        (["--flops", "5e18", "--target", "3e7:1e9"], "--target: 2 sizes of the family are smaller than 30,000,000"),
        (["--flops", "1e18", "--base", "missing.yaml"], "--base: cannot read missing.yaml"),
        (["--flops", "1e15", "--sizes", "open_lm_1b"], "these 1 runs cost .* more than the budget"),
        (["--sizes", "open_lm_2m"], "found 'open_lm_2m', expected numbers of parameters"),
        (["--sizes", "1e4"], "nearest shape with a vocabulary of 50432"),
        (["--flops", "1e18", "--tokens", "1e9"], "not allowed with"),
        (["--hours", "5", "--sizes", "1e8"], "a generated size, whose speed is not planned"),
        (["--sizes", "open_lm_11m", "--multipliers", "10", "10.01"], "would keep 1001 checkpoints"),
        (["--sizes", "1e6", "1.01e6", "--vocab-size", "256"], "give d=.* several times; choose sizes that differ more"),
        (["--sizes", "open_lm_11m", "--train-target"], "--train-target: found no --target N:D"),
        (["--sizes", "open_lm_11m", "--lr-exponent", "-0.2"], "--lr-exponent: found no --lr"),
        (["--sizes", "open_lm_11m", "--set", "lr=1"], "found lr, which the plan decides"),
        (["--sizes", "open_lm_11m", "--set", "checkpoint_dir=x"], "found checkpoint_dir, which the plan decides"),
        (["--sizes", "open_lm_11m", "--set", "precision"], "found 'precision', expected KEY=VALUE"),
        (["--sizes", "open_lm_11m", "--set", "precison=fp32"], "unknown key 'precison'"),
    ],
)
def test_unusable_plans_are_rejected(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = [str(tmp_path / "ladder")] if "--set" in arguments else []
    with pytest.raises(ConfigError, match=message):
        command.main(["plan", *output, *arguments])


def test_a_ladder_without_data_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--sizes", "1e6", "--vocab-size", "256", "--multipliers", "20"]
    command.main(["plan", str(tmp_path / "empty"), *sizes])
    warnings = capsys.readouterr().err
    assert "have no training data" in warnings and "have no val_data" in warnings
    command.main(["plan", str(tmp_path / "data"), *sizes, "--set", "train_data=[x.tar]", "val_data=[y.tar]"])
    assert not capsys.readouterr().err


def test_device_hours_come_from_the_planner(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["plan", "--hours", "1", "--sizes", "open_lm_11m", "--multipliers", "20", "--devices", "1", "--json"])
    content = json.loads(capsys.readouterr().out)
    (run,), (hours,) = content["runs"], content["device_hours"]
    assert 0 < hours < 1
    assert run["exact_flops"] / hours / 3600 < 989e12  # below the peak of the device


# ------------------------------------------------------------------------------------------- train and collect
@pytest.fixture(scope="module")
def ladder(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a ladder of one size with a trunk and a branch; the trunk is trained."""
    data = shared_dir / "compat" / "run" / "data"
    folder = tmp_path_factory.mktemp("scaling")
    base = {
        "dataset_manifest": [str(data / "manifest.jsonl")], "val_data": [str(data / "00000007.tar")],
        "val_max_batches": 4, "val_iter_ci": 50, "workers": 0,
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    command.main([
        "plan", str(folder / "ladder"), "--sizes", "3e4", "--multipliers", "0.5", "1", "--vocab-size", "256",
        "--seq-len", "64", "--global-batch-size", "32", "--base", str(folder / "base.yaml"),
    ])  # fmt: skip
    train(["--config", read_ladder(str(folder / "ladder")).runs[0].config])
    return folder / "ladder"


@pytest.mark.processes
def test_run_trains_what_is_missing_and_collect_reads_it(
    ladder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="contains a ladder already"):
        command.main(["plan", str(ladder), "--sizes", "3e4", "--vocab-size", "256"])
    command.main(["run", str(ladder)])
    output = capfd.readouterr().out
    assert "1 of 2 runs are finished" in output and "[1/1] d=32_l=2_h=4_m0.5" in output
    command.main(["run", str(ladder)])
    assert "2 of 2 runs are finished" in capfd.readouterr().out

    table = tmp_path / "runs.json"
    command.main(["collect", str(table), str(ladder), "--train", "bytes"])
    longest, branch = read_runs([str(table)])
    capfd.readouterr()
    command.main(["collect", str(tmp_path / "both.json"), str(table), str(ladder)])
    assert len(read_runs([str(tmp_path / "both.json")])) == 2
    assert capfd.readouterr().err.count("is part of an earlier source") == 2
    trunk_plan, branch_plan = read_ladder(str(ladder)).runs
    for run, planned in ((longest, trunk_plan), (branch, branch_plan)):
        assert (run.params, run.tokens, run.train) == (planned.params, planned.tokens, "bytes")
        loss, lower, upper = run.losses["00000007"]
        assert lower < loss < upper
        assert run.facts["flops"] > 0 and run.active_params is not None
    log = (Path(branch_plan.folder) / "out.log").read_text(encoding="utf-8")
    assert re.search(
        rf"this run continues .*{re.escape(trunk_plan.name)}/checkpoints/step_\d+ from epoch 0, step \d+", log
    )

    with pytest.raises(ConfigError, match="found 2 runs to fit, expected at least 3"):
        command.main(["fit", str(table), "--loss", "00000007", "--law", "compute"])


@pytest.mark.parametrize("launcher", ["slurm", "ray", "hosts"])
def test_jobs_are_written_for_schedulers(launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "it's a ladder"
    command.main(["plan", str(folder), "--sizes", "open_lm_11m", "--multipliers", "10", "20"])
    hosts = ["--hosts", "hosts.txt"] if launcher == "hosts" else []
    command.main(["run", str(folder), "--launcher", launcher, "--nproc-per-node", "4", *hosts])
    assert f"wrote {folder}" in capsys.readouterr().out
    lines = (folder / "jobs.sh").read_text(encoding="utf-8").splitlines()
    jobs = [line for line in lines if "--config" in line]
    assert len(jobs) == 2
    for line, planned in zip(jobs, read_ladder(str(folder)).runs, strict=True):
        words = shlex.split(line.partition("=$(")[2].rstrip(")") or line)
        assert words[-1] == planned.config
    if launcher == "slurm":
        assert '--dependency=afterok:"$job_0" ' in jobs[1] and "--dependency" not in jobs[0]


def test_unfinished_and_foreign_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to collect"):
        command.main(["collect", str(tmp_path / "runs.json"), str(tmp_path / "empty")])
    exported: list[dict[str, Any]] = [
        {
            "name": "first",
            "config": {"model": "open_lm_11m", "lr": {"value": 0.003}, "global_batch_size": 64},
            "summary": {"tokens": 2e8, "val/c4/loss": 4.5, "val/c4/loss_tokens_lower_95": 4.4,
                        "val/c4/loss_tokens_upper_95": 4.6},
        },
        {"name": "second", "config": {"model": "other"}, "summary": {"tokens": 2e8}},
        {"name": "third", "config": "{}", "summary": {}},
    ]  # fmt: skip
    path = tmp_path / "wandb.json"
    path.write_text(json.dumps(exported), encoding="utf-8")
    command.main(["collect", str(tmp_path / "runs.json"), str(path)])
    error = capsys.readouterr().err
    assert f"left out: {path}, run 1: params: found None" in error
    assert f"left out: {path}, run 2: expected an export of W&B" in error
    (run,) = read_runs([str(tmp_path / "runs.json")])
    assert run.losses == {"c4": (4.5, 4.4, 4.6)}
    assert (run.params, run.tokens, run.facts["lr"], run.facts["global_batch"]) == (11_014_848, 200_000_000, 0.003, 64)


def test_sizes_are_sorted_and_named() -> None:
    shapes = parse_sizes(["open_lm_25m", "2e7", "open_lm_11m"], 50432, 2048)
    assert [shape.params for shape in shapes] == sorted(shape.params for shape in shapes)


def test_dry_runs_print_commands_and_start_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ladder"
    command.main(["plan", str(folder), "--sizes", "open_lm_11m", "--multipliers", "10", "20"])
    capsys.readouterr()
    command.main(["run", str(folder), "--dry-run", "--nproc-per-node", "2", "--only", "open_lm_11m_m20"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 of 1 runs are finished"
    assert lines[1].endswith(f"-m open_lm.utils.torchrun --nproc-per-node 2 -m open_lm.main --config "
                             f"{folder}/configs/open_lm_11m_m20.yaml")  # fmt: skip
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "other"], "--only: found other, expected names of runs"),
        (["--launcher", "hosts"], "--launcher hosts and --hosts FILE belong together"),
        (["--hosts", "hosts.txt"], "--launcher hosts and --hosts FILE belong together"),
        (["--nproc-per-node", "0"], "--nproc-per-node: found 0, expected at least 1"),
    ],
)
def test_unusable_flags_of_run_are_rejected(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no ladder\.json, expected a folder that `plan` wrote"):
        command.main(["run", str(tmp_path)])
    command.main(["plan", str(tmp_path / "ladder"), "--sizes", "open_lm_11m", "--multipliers", "10"])
    with pytest.raises(ConfigError, match=message):
        command.main(["run", str(tmp_path / "ladder"), *arguments])


@pytest.mark.processes
def test_a_failed_run_is_reported_and_stops_the_ladder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.jsonl"
    command.main([
        "plan", str(tmp_path / "ladder"), "--sizes", "open_lm_11m", "--multipliers", "10", "20", "--set",
        f"dataset_manifest=[{missing}]",
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"open_lm_11m_m20 failed: .*missing.jsonl.* \(2 jobs are missing\)"):
        command.main(["run", str(tmp_path / "ladder")])
    assert "[2/2]" not in capfd.readouterr().out


def test_the_learning_rate_follows_a_power_of_the_size() -> None:
    shapes = parse_sizes(["1e5", "8e5"], 256, 64)
    choices = Choices(shapes=shapes, run_tokens=[1e5, 2e5], lr=0.01, lr_exponent=-0.25, batch=8)
    rungs = choose(choices, None, cost)
    assert [rung.tokens for rung in rungs] == [199_680, 99_840] * 2
    assert {rung.schedule for rung in rungs} == {"wsd"} and [rung.suffix for rung in rungs[:2]] == [
        "t200000",
        "t100000",
    ]
    target = target_rung(shapes[1], 2 * 10**5, choices, rungs)
    assert target.is_target and (target.steps, target.warmup) == (391, 19) and rungs[-1].warmup == 19
    for rung in [*rungs, target]:
        assert rung.lr == pytest.approx(0.01 * (rung.shape.params / shapes[0].params) ** -0.25)


def test_a_size_with_one_length_has_the_schedule_of_the_others() -> None:
    shape = named_shape("open_lm_25m")
    for branches, schedule in ((True, "wsd"), (False, "cosine")):
        (rung,) = choose(Choices(shapes=[shape], multipliers=[20], branches=branches), None, cost)
        assert (rung.schedule, rung.trunk, rung.milestone) == (schedule, None, 0)


def test_short_runs_get_the_batch_and_learning_rate_of_their_compute() -> None:
    shape = named_shape("open_lm_25m")
    short, optimal, long = (
        choose(Choices(shapes=[shape], multipliers=[multiplier]), None, cost)[0] for multiplier in (1, 20, 160)
    )
    assert short.global_batch < optimal.global_batch == long.global_batch
    assert short.lr > optimal.lr == long.lr


def test_generated_shapes_have_the_requested_aspect() -> None:
    shapes = parse_sizes(["1.3e5", "3.8e5", "8.5e5", "1.6e6", "2.8e6"], 264, 128, aspect=32)
    assert [shape.label for shape in shapes] == [f"d={32 * depth}_l={depth}_h=4" for depth in (2, 3, 4, 5, 6)]
