"""Sweeps and the coordinate check: grids, scaled models, minima, trained runs, and sizes of activations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source

from open_lm.errors import ConfigError, UserError
from open_lm.scaling import command
from open_lm.scaling.jobs import is_trained
from open_lm.scaling.ladder_files import PlannedRun
from open_lm.scaling.sweep import SweepRun, mup_settings, parse_grid, read_sweep, scaled_architecture
from open_lm.scaling.sweep_fit import DIVERGED, FINISHED, MISSING, Minimum, Result, find_minima, find_shifts, result_of

MODEL = {
    "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE,
    "post_embed_norm": False, "weight_tying": False,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ grids and models
def test_grids_are_even_in_the_logarithm() -> None:
    grid = parse_grid(["lr=1e-3:1.6e-2:5", "global-batch-size=8,4", "seed=1,2"])
    assert list(grid) == ["lr", "global_batch_size", "seed"]
    assert grid["lr"] == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert grid["global_batch_size"] == [4, 8]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr=1e-3,1e-2"], "at least 3 values of the first setting"),
        (["lr=0:1:3"], "expected KEY=LOW:HIGH:NUMBER"),
        (["lr=1:2:x"], "expected KEY=LOW:HIGH:NUMBER"),
        (["lr=1,2,nan"], "expected KEY=LOW:HIGH:NUMBER"),
        (["precision=1,2,3"], "expected a numeric flag of open_lm.main"),
        (["lrr=1,2,3"], "expected a numeric flag"),
        (["lr=1,2,3", "lr=1,2,3"], "expected a numeric flag of open_lm.main, once"),
        (["seed=1,2,3"], "whose minimum is fitted"),
        (["lr=1,2,2.0"], "at least 3 values"),
        (["lr=1,2,3", "seed=1:2:0"], "expected KEY=LOW:HIGH:NUMBER"),
        (["lr=1,2,3", "seed=1,1.5"], "expected integers"),
    ],
)
def test_unusable_grids_are_rejected(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid(texts)


def test_wider_models_have_more_heads_of_the_same_width() -> None:
    base = {**MODEL, "hidden_dim": 96, "n_heads": 6, "n_kv_heads": 2}
    wide = scaled_architecture(base, 192, "gelu")
    names = ("hidden_dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "n_layers")
    assert [wide[name] for name in names] == [192, 12, 4, 16, 768, 1]
    assert scaled_architecture({**base, "ffn_dim": 100}, 48, "swiglu")["ffn_dim"] == 50
    with pytest.raises(ConfigError, match="found 64, expected multiples of 48"):
        scaled_architecture(base, 64, "gelu")
    experts = scaled_architecture({**base, "moe_freq": 1, "moe_ffn_dim": 64}, 48, "gelu")
    assert experts["moe_ffn_dim"] == 32 and "ffn_dim" not in experts
    gemma = scaled_architecture({**base, "embedding_scale": 9.8}, 384, "gelu")  # sqrt(96), rounded
    assert gemma["embedding_scale"] == math.sqrt(384)
    assert scaled_architecture({**base, "embedding_scale": 2.0}, 384, "gelu")["embedding_scale"] == 2.0


def test_the_base_model_of_a_sweep_sets_the_head_width_of_mup() -> None:
    models = [{"hidden_dim": 1024, "n_heads": 16}, {"hidden_dim": 256, "n_heads": 4}]  # heads of 64
    assert mup_settings(models, None) == {"mup": True, "mup_base_width": 256, "mup_base_head_dim": 64}
    assert mup_settings(models, 1024)["mup_base_head_dim"] == 64
    assert "mup_base_head_dim" not in mup_settings(models, 512)


# ------------------------------------------------------------------------------------------------ minima
def results(width: int, best: float, noise: float = 0.0, values: Any = None, **settings: float) -> list[Result]:
    random = np.random.default_rng(width)
    values = np.geomspace(1e-3, 3.2e-2, 6) if values is None else values
    found = []
    for value in values:
        run = SweepRun(f"{width}_{value}", f"w{width}", width, "mup", {"lr": float(value), **settings})
        loss = 2 + 0.1 * math.log(value / best) ** 2 + noise * random.standard_normal()
        found.append(Result(run, FINISHED, loss))
    return found


def test_the_vertex_is_found_between_the_points_with_its_error() -> None:
    (exact,) = find_minima(results(64, 5e-3))
    assert exact.best == pytest.approx(5e-3) and exact.loss == pytest.approx(2.0) and not exact.note
    assert exact.coefficients is not None
    assert np.polynomial.Polynomial(exact.coefficients)(math.log(5e-3)) == pytest.approx(2.0)
    covered = 0
    for width in range(100):
        (noisy,) = find_minima(results(width, 5e-3, noise=0.01))
        assert noisy.interval is not None
        covered += noisy.interval[0] <= 5e-3 <= noisy.interval[1]
    assert 45 <= covered <= 80  # one standard error, estimated with two degrees of freedom, holds 58 %


def test_a_value_of_zero_is_compared_but_not_fitted() -> None:
    values = [0.0, 0.01, 0.1, 1.0]

    def minimum(*losses: float) -> Minimum:
        items = zip(results(64, 0.1, values=[1.0] * 4), values, losses, strict=True)
        runs = [(SweepRun(f"wd{value}", "w64", 64, "mup", {"wd": value}), loss) for _, value, loss in items]
        (found,) = find_minima([Result(run, FINISHED, loss) for run, loss in runs])
        return found

    inner = minimum(3.0, 2.5, 2.2, 2.5)
    assert inner.best == pytest.approx(0.1) and not inner.note
    assert minimum(3.0, 2.1, 2.2, 2.6).note == "at the edge of the grid: lower it"
    zero = minimum(2.0, 2.1, 2.2, 2.6)
    assert (zero.best, zero.loss, zero.note) == (0.0, 2.0, "no value above 0 is better")


def test_seeds_are_averaged_and_other_settings_give_curves_of_their_own() -> None:
    several = [item for seed in (1, 2) for item in results(64, 5e-3, seed=seed)]
    (minimum,) = find_minima(several)
    assert [count for *_, count in minimum.points] == [2] * 6
    curves = find_minima([*results(64, 5e-3, wd=0.1), *results(64, 1e-2, wd=0.2)])
    assert [curve.settings for curve in curves] == [{"wd": 0.1}, {"wd": 0.2}]
    assert [shift.factor for shift in find_shifts(curves)] == []


def test_edges_and_diverged_runs_are_stated() -> None:
    (low,) = find_minima(results(64, 1e-5))
    assert low.note == "at the edge of the grid: lower it" and low.best == 1e-3 and low.interval is None
    points = results(64, 5e-3)
    points[3:] = [Result(item.run, DIVERGED) for item in points[3:]]
    (blocked,) = find_minima(points)
    assert blocked.note == "at the edge of the grid: higher values diverge"
    assert blocked.best == pytest.approx(4e-3) and len(blocked.diverged) == 3
    (bent,) = find_minima(
        [Result(item.run, FINISHED, loss) for item, loss in zip(points, (3, 2, 1, 2, 2, 2), strict=True)]
    )
    assert bent.best < 1e-2 and bent.coefficients is not None
    (nothing,) = find_minima([Result(item.run, MISSING) for item in points])
    assert math.isnan(nothing.best) and nothing.points == []


def test_shifts_compare_the_widths() -> None:
    minima = [*find_minima(results(64, 4e-3)), *find_minima(results(512, 5e-3))]
    (shift,) = find_shifts(minima)
    assert shift.factor == pytest.approx(1.25) and shift.widths == (64, 512) and not shift.is_bound
    (bound,) = find_shifts([*find_minima(results(64, 4e-3)), *find_minima(results(512, 1e-5))])
    assert bound.is_bound and bound.factor == pytest.approx(4)
    assert find_shifts([Minimum("w64", 64, "mup", {})]) == []


# ------------------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with settings of all runs."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    settings = {
        "model": str(folder / "tiny.json"), "dataset_manifest": [write_source(folder / "data", [100, 100])],
        "data_key": "npy", "global_batch_size": 4, "train_num_samples": 4 * 4 * SEQ_LEN, "workers": 0,
        "warmup": 1, "log_every_n_steps": 1, "ffn_type": "gelu", "precision": "fp32",
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    return folder / "base.yaml"


def test_a_sweep_trains_what_is_missing_and_shows_the_best_values(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    start = ["sweep", str(folder), "--base", str(base), "--vary", "lr=1e-3,1e-2,1e9", "--widths", "16", "32"]
    start += ["--parametrization", "standard", "mup", "--set", "max_skipped_steps=0"]
    command.main([*start, "--launcher", "slurm"])
    assert (folder / "jobs.sh").read_text().count("--job-name=") == 12
    capsys.readouterr()
    command.main([*start, "--launcher", "slurm", "--json"])
    assert capsys.readouterr().out == ""  # no results yet; the path of the jobs is not JSON
    command.main(start)
    output = capsys.readouterr().out
    assert "0 of 12 runs are done" in output and "[12/12] w32_mup_lr1e+09: diverged" in output
    content = json.loads((folder / "results.json").read_text())
    assert content["axis"] == "lr" and [run["state"] for run in content["runs"]].count("diverged") == 4
    losses = {run["name"]: run["loss"] for run in content["runs"]}
    assert losses["w16_standard_lr0.01"] == losses["w16_mup_lr0.01"]  # 16 is the base width
    assert losses["w32_standard_lr0.01"] != losses["w32_mup_lr0.01"]
    assert {shift["parametrization"] for shift in content["shifts"]} == {"standard", "mup"}
    page = (folder / "sweep.html").read_text()
    assert "Best values" in page and "at the edge of the grid" in page
    command.main(["sweep", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out) == content
    with pytest.raises(ConfigError, match="contains another sweep"):
        command.main([*start, "beta2=0.9"])
    with pytest.raises(ConfigError, match=r"found no sweep\.json; start a sweep with --vary"):
        command.main(["sweep", str(tmp_path)])
    with pytest.raises(ConfigError, match="found lr, which the sweep decides"):
        command.main([*start, "lr=1"])
    with pytest.raises(ConfigError, match="--base: found mup, which the command decides"):
        command.main([*start, "mup=true"])


def test_a_run_has_diverged_if_its_training_loss_has_risen(tmp_path: Path) -> None:
    run = SweepRun("run", "w64", 64, "mup", {"lr": 1.0})
    assert result_of(run, str(tmp_path / "none")).state == MISSING
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.lock").touch()  # killed before its first file
    assert result_of(run, str(folder)).state == MISSING
    assert not is_trained(PlannedRun("run", "", str(folder), None, params=1, tokens=1, cost_flops=1.0))

    def result(first: float, last: float, length: int | None = None) -> Result:
        rows = [
            {"step": 1, "tokens": 8, "train/loss": first}, {"step": 2, "tokens": 16, "train/loss": last},
            {"step": 2, "tokens": 16, "val/loss": 4.0}, {"step": 2, "tokens": 16, "train/epochs_done": 1},
        ][:length]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "params.txt").write_text("name: run\n")
        (folder / "out.log").write_text(
            "2026-01-01,00:00:00 | INFO | step: 2 has reached/exceeded total_steps: 2. ending training.\n"
        )
        return result_of(run, str(folder))

    assert result(3.0, 2.0) == Result(run, FINISHED, 4.0)  # fine-tuning, with validation on other data
    assert result(3.0, 3.5) == Result(run, DIVERGED, 4.0)
    assert result(3.0, 3.02) == Result(run, FINISHED, 4.0)  # a learning rate that is too low
    for length in (2, 3):  # killed during or right after the last validation
        assert result(3.0, 2.0, length).state == MISSING
    result(3.0, 2.0)
    (folder / "checkpoints" / "step_00000002.incomplete").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000002.incomplete" / "part").touch()
    assert result_of(run, str(folder)).state == MISSING


def test_settings_that_a_sweep_cannot_use_are_rejected(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "sweep", base.parent / "tiny.json"
    start = ["sweep", str(folder), "--base", str(base), "--dry-run", "--vary", "lr=1,2,3"]
    command.main([*start, "seed=20240101,20240102"])
    names = [run.name for run in read_sweep(str(folder))]
    assert len(set(names)) == 6 and "tiny_standard_lr1_seed20240102" in names
    monkeypatch.chdir(tmp_path)
    command.main(["sweep", "relative", *start[2:]])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny.json").write_text(model.read_text())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    start[1] = str(tmp_path / "new")
    for flags, message in (
        (["sweep", str(folder), "--widths", "64", "--set", "lr=1"], "found --widths, --set without --vary"),
        ([*start, "--mup-base-width", "16"], "--mup-base-width 16 has no effect without --parametrization mup"),
        ([*start, "--parametrization", "mup", "--mup-base-width", "0"], "--mup-base-width: found 0"),
        ([*start, "--models", str(model), str(tmp_path / "other" / "tiny.json")], "files with different names"),
        ([*start, "--set", "checkpoint_dir=x"], "found checkpoint_dir, which the sweep decides"),
        ([*start, "--set", "wd=["], r"--set: found 'wd=\[', whose value is not valid YAML"),
        (["sweep", str(model), *start[2:]], "tiny.json"),
        (["sweep", str(tmp_path / "broken"), *start[2:]], r"sweep\.json: not a sweep"),
        (["coordinate-check", "--models", str(model), str(model)], "expected files with different names"),
        (["coordinate-check", "--base", str(base), "--set", "global_batch_size=x"], "global_batch_size: found 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            command.main(flags)
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"yaml: found logs: relative/runs, expected the folder \.\./relative/runs"):
        command.main(["sweep", "../relative"])


def test_the_coordinate_check_passes_with_mup_only(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "check.html"
    flags = ["coordinate-check", str(page), "--base", str(base), "--widths", "32", "256", "--seeds", "1"]
    flags += ["--set", "lr=1e-2", "--steps", "4"]
    command.main(flags)
    output = capsys.readouterr().out
    assert "standard: the sizes of activations depend on the width: " in output
    assert "mup: the sizes of activations do not depend on the width" in output
    assert "Size of attention logits" in page.read_text()
    command.main([*flags[:1], *flags[2:], "--json"])
    standard, mup = json.loads(capsys.readouterr().out)
    assert standard["slopes"]["residual"][-1] > 2 * 0.25 > abs(mup["slopes"]["residual"][-1])
    assert len(mup["sizes"]["output logits"]) == 2 and len(mup["sizes"]["output logits"][0]) == 5
    with pytest.raises(ConfigError, match="found models of width 32, expected at least two"):
        command.main([*flags[:4], "--widths", "32"])
