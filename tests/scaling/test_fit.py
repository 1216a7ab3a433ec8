"""Fits reproduce published numbers, recover known laws, and reject unusable tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_scaling
import numpy as np
import pytest

from open_lm.errors import ConfigError, DataError
from open_lm.scaling import command, solve
from open_lm.scaling.error_law import ErrorFits, ErrorPoints, fit_errors
from open_lm.scaling.fitting import fit_runs
from open_lm.scaling.frontier import Frontier
from open_lm.scaling.laws import CHINCHILLA, COMPUTE, OVER_TRAINING, Law
from open_lm.scaling.runs import parse_run, read_runs
from open_lm.scaling.settings import PAPER_TASKS, Settings
from open_lm.scaling.value import value_of_runs

# Gadre et al. 2024: relative errors (%) of predicted loss and top-1 error, by parameters and tokens.
PAPER = {
    "rpj": {(1_439_795_200, 921_468_928_000): (0.7103, 3.6364), (6_889_410_560, 137_788_211_200): (0.7320, 0.0463)},
    "c4_original": {(1_439_795_200, 115_183_616_000): (1.4980, None), (6_889_410_560, 137_788_211_200): (4.2952, None)},
}
PAPER_COEFFICIENTS = {
    "a": 166.2, "b": 366.7, "eta": -0.2729, "E": 1.837, "k": 2.206, "gamma": 0.7146, "epsilon": 0.857
}  # fmt: skip

Fit = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def published(shared_dir: Path) -> Path:
    path = shared_dir / "data" / "scaling" / "runs.json"
    if not path.is_file():
        pytest.skip(f"no table of runs at {path}")
    return path


@pytest.fixture
def fit(capsys: pytest.CaptureFixture[str]) -> Fit:
    """Return a function that runs `fit --json` and returns its output."""

    def run(*args: object) -> dict[str, Any]:
        command.main(["fit", *map(str, args), "--resamples", "40", "--json"])
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    return run


def run_of(params: float, tokens: float, loss: float, **facts: Any) -> dict[str, Any]:
    return {"params": int(params), "tokens": int(tokens), "losses": {"val": [loss, loss - 0.01, loss + 0.01]}, **facts}


def law_runs(law: Law, theta: np.ndarray) -> list[dict[str, Any]]:
    points = [(n, n * m) for n in (1e7, 5e7, 2e8, 8e8) for m in (10, 20, 40, 80, 160)]
    losses = solve.predict(law.design(*zip(*points, strict=True)), theta)
    return [run_of(n, d, round(float(loss), 9)) for (n, d), loss in zip(points, losses, strict=True)]


def write(path: Path, runs: Any) -> Path:
    path.write_text(json.dumps(runs), encoding="utf-8")
    return path


@pytest.mark.parametrize("train", PAPER)
def test_paper_points_give_the_published_errors(train: str, published: Path, fit: Fit) -> None:
    targets = [f"{params}:{tokens}" for params, tokens in PAPER[train]]
    values = fit(
        published, "--train", train, "--loss", "c4_val", "--law", "over-training", "--points", "paper",
        "--predict", *targets,
    )  # fmt: skip
    tasks = command_tasks()
    measured = {(run.params, run.tokens): run for run in read_runs([str(published)]) if run.train == train}
    for item, (point, (loss_error, error_error)) in zip(values["predictions"], PAPER[train].items(), strict=True):
        run = measured[point]
        assert set(item) == {"params", "tokens", "loss", "loss_interval", "error"}
        assert (item["params"], item["tokens"]) == point
        assert f"{100 * abs(item['loss'] / run.losses['c4_val'][0] - 1):.4f}" == f"{loss_error:.4f}"
        assert item["loss_interval"][0] < item["loss"] < item["loss_interval"][1]
        if error_error is not None:
            top_1 = 1 - float(np.mean([run.accuracy[task] for task in tasks]))
            assert f"{100 * abs(item['error'] / top_1 - 1):.4f}" == f"{error_error:.4f}"
    if train == "rpj":
        rounded = {name: float(f"{value:.4g}") for name, value in values["coefficients"].items()}
        assert rounded == PAPER_COEFFICIENTS


def command_tasks() -> tuple[str, ...]:
    assert len(PAPER_TASKS) == 17
    return PAPER_TASKS


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize(
    ("law", "theta"),
    [
        (OVER_TRAINING, np.array([5.1, 5.9, -0.27, 0.6])),
        (CHINCHILLA, np.array([0.5, 6.0, 0.34, 6.0, 0.28])),
        (COMPUTE, np.array([0.5, 5.0, 0.12])),
    ],
    ids=["over-training", "chinchilla", "compute"],
)
def test_a_fit_recovers_the_law_of_its_points(law: Law, theta: np.ndarray, robust: bool) -> None:
    runs = law_runs(law, theta)
    terms = law.design([run["params"] for run in runs], [run["tokens"] for run in runs])
    losses = np.array([run["losses"]["val"][0] for run in runs])
    fitted = solve.fit(terms, losses, law.starts, law.bounds, robust=robust)
    assert fitted == pytest.approx(theta, abs=1e-3)
    assert law.at_bounds(fitted) == []


def test_a_robust_fit_ignores_an_outlier() -> None:
    theta = np.array([5.1, 5.9, -0.27, 0.6])
    runs = law_runs(OVER_TRAINING, theta)
    terms = OVER_TRAINING.design([run["params"] for run in runs], [run["tokens"] for run in runs])
    losses = np.array([run["losses"]["val"][0] for run in runs])
    losses[0] *= 1.2
    robust = solve.fit(terms, losses, OVER_TRAINING.starts, OVER_TRAINING.bounds, robust=True)
    plain = solve.fit(terms, losses, OVER_TRAINING.starts, OVER_TRAINING.bounds, robust=False)
    assert abs(robust[2] - theta[2]) < 0.01 < abs(plain[2] - theta[2])


def test_many_problems_at_once_have_the_minimum_of_lbfgs() -> None:
    theta = np.array([0.5, 6.0, 0.34, 6.0, 0.28])
    runs = law_runs(CHINCHILLA, theta)
    terms = CHINCHILLA.design([run["params"] for run in runs], [run["tokens"] for run in runs])
    losses = np.array([run["losses"]["val"][0] for run in runs]) * np.exp(
        np.random.default_rng(0).normal(0, 0.004, len(runs))
    )
    best = solve.fit(terms, losses, CHINCHILLA.starts, CHINCHILLA.bounds, robust=True)
    start = (theta + 0.05)[None]
    refined, _ = solve.refine(
        terms, losses[None], np.ones((1, len(losses))), start, bounds=CHINCHILLA.bounds, robust=True
    )
    assert solve.predict(terms, refined[0]) == pytest.approx(solve.predict(terms, best), rel=1e-3)


def error_points(loss: np.ndarray, error: np.ndarray) -> ErrorPoints:
    return ErrorPoints(loss[None], error[None], np.ones((1, len(loss))))


def test_the_law_of_the_error_is_recovered() -> None:
    loss = np.linspace(2.4, 5.5, 9)
    (fitted,) = fit_errors([error_points(loss, 0.86 - 2.2 * np.exp(-0.71 * loss))])
    assert fitted.values() == pytest.approx({"k": 2.2, "gamma": 0.71, "epsilon": 0.86}, rel=1e-4)
    (falling,) = fit_errors([error_points(loss, 1 - loss / 10)])
    assert falling.at_bounds() == ["k = 0"]


def test_training_sets_share_the_exponent_of_the_error() -> None:
    loss = np.linspace(2.4, 5.5, 9)
    second = loss[:3] + 0.2
    fits: list[ErrorFits] = fit_errors([
        error_points(loss, 0.86 - 2.2 * np.exp(-0.71 * loss)),
        error_points(second, 0.8 - 1.9 * np.exp(-0.71 * second)),
    ])  # fmt: skip
    assert fits[0].values() == pytest.approx({"k": 2.2, "gamma": 0.71, "epsilon": 0.86}, rel=1e-4)
    assert fits[1].values() == pytest.approx({"k": 1.9, "gamma": 0.71, "epsilon": 0.8}, rel=1e-4)


# ------------------------------------------------------------------------------------------------- bad input
def over_training_runs() -> list[dict[str, Any]]:
    return law_runs(OVER_TRAINING, np.array([5.1, 5.9, -0.27, 0.6]))


def test_diverged_runs_are_excluded_and_listed(tmp_path: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    runs = over_training_runs()
    clean = fit(write(tmp_path / "clean.json", runs), "--loss", "val", "--law", "over-training")
    lost = [
        run_of(4e8, 8e9, 9.0, name="high"),
        {**run_of(4e8, 9e9, 3.0, name="nan"), "losses": {"val": [None, None, None]}},
        run_of(4e8, 7e9, 2.0, name="marked", diverged=True),
    ]
    path = write(tmp_path / "all.json", [*runs, *lost])
    command.main(["fit", str(path), "--loss", "val", "--law", "over-training", "--resamples", "40", "--json"])
    output = capsys.readouterr()
    assert json.loads(output.out)["coefficients"] == pytest.approx(clean["coefficients"])
    for name in ("high", "nan", "marked"):
        assert f"warning: excluded: {name} (" in output.err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda runs: [run | {"tokenizer": name} for run, name in zip(runs, "ab" * 10, strict=True)], DataError,
         r"2 tokenizers: a \(10, such as run .*; b \(10"),
        (lambda runs: [run | {"validation": {"val": name}} for run, name in zip(runs, "ab" * 10, strict=True)],
         DataError, "2 validation sets under the name val: a "),
        (lambda runs: [*runs[:-1], runs[-1] | {"losses": {"x": 2.0}}], DataError, "1 of 20 runs have no loss on val"),
        (lambda runs: [run | {"train": name} for run, name in zip(runs, "ab" * 10, strict=True)], ConfigError,
         "several training sets: 'a', 'b'; choose one with --train"),
        (lambda runs: runs[:3], ConfigError, r"found 3 runs to fit, expected at least 4.*\(a, b, eta, E\)"),
        (lambda runs: [], DataError, "no runs"),
        (lambda runs: {"runs": runs}, DataError, "found a dict, expected a list"),
        (lambda runs: [runs[0] | {"params": -1}, runs[1] | {"tokens": "x"}], DataError,
         r"(?s)invalid runs \(2\).*run 0: params: found -1.*run 1: tokens: found 'x'"),
        (lambda runs: [runs[0] | {"losses": {"val": [2.0, 3.0, 4.0]}}], DataError, "expected 0 < lower <= loss"),
        (lambda runs: [runs[0] | {"parameters": 3}], DataError, "unknown keys parameters"),
    ],
    ids=["tokenizers", "validation", "missing", "train", "few", "empty", "object", "counts", "interval", "key"],
)  # fmt: skip
def test_unusable_tables_are_rejected(
    change: Callable[[Any], Any], error: type[Exception], message: str, tmp_path: Path, fit: Fit
) -> None:
    path = write(tmp_path / "runs.json", change(over_training_runs()))
    with pytest.raises(error, match=message):
        fit(path, "--loss", "val", "--law", "over-training")


def test_far_targets_and_fits_at_bounds_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(n, n * 20, 1e4 * (6 * n * n * 20) ** -0.2) for n in (1e7, 3e7, 1e8, 3e8)]
    path = write(tmp_path / "runs.json", runs)
    for law in ("compute", "combined"):  # 4 runs determine no other law, so that all combined fits are at a bound
        command.main([
            "fit", str(path), "--loss", "val", "--law", law, "--predict", "6e9:1.2e11", "--resamples", "40"
        ])  # fmt: skip
        errors = capsys.readouterr().err
        assert "target 6,000,000,000:120,000,000,000 has 400 times the compute" in errors
        assert "the fit is at a bound (E = 0.0009119)" in errors


@pytest.mark.parametrize(("flag", "value"), [("--seed", "-1"), ("--level", "1"), ("--resamples", "5")])
def test_unusable_settings_of_resamples_are_rejected(flag: str, value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "runs.json", over_training_runs())
    with pytest.raises(ConfigError, match=f"{flag}: found {value}"):
        command.main(["fit", str(path), "--loss", "val", flag, value])


@pytest.mark.parametrize("text", ["7e9", "7e9:x", "0:5", "7e9:inf"])
def test_malformed_targets_are_rejected(text: str, tmp_path: Path, fit: Fit) -> None:
    with pytest.raises(ConfigError, match="expected PARAMETERS:TOKENS"):
        fit(write(tmp_path / "runs.json", over_training_runs()), "--loss", "val", "--predict", text)


# ------------------------------------------------------------------------------------- the default procedure
def test_the_default_has_a_lower_loss_error_than_the_paper_and_covers_all_targets(published: Path) -> None:
    runs = read_runs([str(published)])
    errors = []
    for train in check_scaling.TARGETS:
        for run, paper, default in check_scaling.predictions(runs, train, "c4_val", "loss", resamples=100):
            measured, *_ = run.losses["c4_val"]
            errors.append((abs(paper.loss / measured - 1), abs(default.loss / measured - 1)))
            assert default.loss_interval[0] <= measured <= default.loss_interval[1]
    paper_mean, default_mean = np.mean(errors, axis=0)
    assert default_mean < paper_mean == pytest.approx(0.018088, abs=1e-5)


def test_the_default_recovers_a_law_with_shared_exponents(tmp_path: Path, fit: Fit) -> None:
    theta = {"a": np.array([5.1, 5.9, -0.27, 0.6]), "b": np.array([4.8, 5.5, -0.27, 0.4])}
    runs = [run | {"train": name} for name in theta for run in law_runs(OVER_TRAINING, theta[name])]
    target = (4e9, 8e10)
    values = fit(write(tmp_path / "runs.json", runs), "--loss", "val", "--train", "b", "--predict", "4e9:8e10")
    truth = float(solve.predict(OVER_TRAINING.design([target[0]], [target[1]]), theta["b"])[0])
    (item,) = values["predictions"]
    assert item["loss"] == pytest.approx(truth, rel=0.002)
    assert item["loss_interval"][0] <= truth <= item["loss_interval"][1]


def test_targets_are_never_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*over_training_runs(), run_of(4e9, 8e10, 1.0, name="target")]
    path = write(tmp_path / "runs.json", runs)
    arguments = ["fit", str(path), "--loss", "val", "--law", "over-training", "--resamples", "40"]
    command.main([*arguments, "--predict", "4e9:8e10"])
    output = capsys.readouterr()
    assert "excluded: target (4,000,000,000 parameters" in output.err
    assert "fitted to 20 runs" in output.out
    command.main([*arguments, "--max-flops", "1e21"])
    assert "fitted to 20 runs; 1 above --max-flops\n" in capsys.readouterr().out


def test_a_combined_fit_of_two_sizes_is_rejected(tmp_path: Path, fit: Fit) -> None:
    runs = [run for run in over_training_runs() if run["params"] < 6e7]
    with pytest.raises(ConfigError, match=r"found 10 runs of 2 sizes.*at least 3 sizes"):
        fit(write(tmp_path / "runs.json", runs), "--loss", "val")


def test_a_stored_fit_gives_the_same_predictions_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run | {"accuracy": {"copa": 0.3 + 0.01 * index}} for index, run in enumerate(over_training_runs())]
    path, stored, page = write(tmp_path / "runs.json", runs), tmp_path / "fit.json", tmp_path / "page.html"
    command.main([
        "fit", str(path), "--loss", "val", "--law", "over-training", "--error-tasks", "copa", "--per-task", "--predict",
        "4e9:8e10", "--resamples", "40", "--output", str(stored), "--json",
    ])  # fmt: skip
    first = json.loads(capsys.readouterr().out)
    assert set(first["tasks"]) == {"copa"} and len(first["tasks"]["copa"]["errors"]) == 1
    command.main(["predict", str(stored), "4e9:8e10", "--json"])
    second = json.loads(capsys.readouterr().out)
    for key, value in first["predictions"][0].items():
        assert second["predictions"][0][key] == pytest.approx(value)
    further = second["further_runs"]
    assert further == sorted(further, key=lambda item: -item["reduction"])
    assert all(0 <= item["reduction"] < 1 and item["flops"] < 6 * 4e9 * 8e10 for item in further)
    command.main(["report", str(stored), str(page), "--predict", "4e9:8e10"])
    html = page.read_text(encoding="utf-8")
    for title in (
        "Predictions",
        "Residuals",
        "Error over loss",
        "Iso-FLOP curves",
        "Compute-optimal size",
        "Runs and cost",
    ):
        assert title in html
    assert "4,000,000,000" in html and len(html) < 5_000_000
    with pytest.raises(DataError, match="expected a file that `fit --output` wrote"):
        command.main(["predict", str(path), "4e9:8e10"])


def test_predictions_are_compared_with_runs_that_were_trained_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run | {"accuracy": {"copa": 0.3 + 0.01 * index}} for index, run in enumerate(over_training_runs())]
    path, stored, page = write(tmp_path / "runs.json", runs), tmp_path / "fit.json", tmp_path / "page.html"
    command.main([
        "fit", str(path), "--loss", "val", "--law", "over-training", "--error-tasks", "copa", "--predict", "4e9:8e10",
        "--resamples", "40", "--output", str(stored), "--json",
    ])  # fmt: skip
    (predicted,) = json.loads(capsys.readouterr().out)["predictions"]
    other = run_of(4e9, 9e10, 2.0, name="other tokens")
    trained = run_of(4.01e9, 8.01e10, 1.02 * predicted["loss"], name="trained", accuracy={"copa": 0.9})
    trained["started"] = "2031-05-06T07:08:09+00:00"
    measured = write(tmp_path / "measured.json", [other, trained])
    command.main(["predict", str(stored), "--measured", str(measured), "--json"])
    (item,) = json.loads(capsys.readouterr().out)["predictions"]
    comparison = item["measured"]
    assert comparison["run"].startswith("trained (") and comparison["loss"] == pytest.approx(1.02 * predicted["loss"])
    assert comparison["loss_difference"] == pytest.approx(1 / 1.02 - 1)
    low, high = item["loss_interval"]
    assert comparison["loss_covered"] == (low <= comparison["loss"] <= high)
    assert comparison["error"] == pytest.approx(0.1) and comparison["error_covered"] is False
    command.main(["report", str(stored), str(page), "--measured", str(measured)])
    html = page.read_text(encoding="utf-8")
    assert "Predicted and measured" in html and "trained (4,010,000,000 parameters" in html
    assert trained["started"] in html, "the page shows that the prediction was made before the training"
    with pytest.raises(ConfigError, match="found no run of the targets 4000000000:80000000000"):
        command.main(["predict", str(stored), "--measured", str(path)])


@pytest.mark.parametrize(("law", "theta"), [("over-training", (5.1, 5.9, -0.27, 0.6)),
                                            ("chinchilla", (0.5, 6.0, 0.34, 6.0, 0.28))])  # fmt: skip
def test_the_compute_optimal_size_is_that_of_the_closed_form(law: str, theta: tuple[float, ...]) -> None:
    form = {"over-training": OVER_TRAINING, "chinchilla": CHINCHILLA}[law]
    runs = [parse_run(run) for run in law_runs(form, np.array(theta))]
    frontier = Frontier(fit_runs(runs, Settings("val", law=law, resamples=20)), [])
    flops = 6e18
    if law == "over-training":  # the derivative of a N^eta + b 6^(eta/2) (C / 6N)^eta is 0
        log_a, log_b, eta, _ = theta
        expected = math.sqrt(flops / 6) * math.exp((log_b - log_a + eta / 2 * math.log(6)) / (2 * eta))
    else:  # Hoffmann et al. 2022, equation 4
        _, log_a, alpha, log_b, beta = theta
        gain = (alpha * math.exp(log_a) / (beta * math.exp(log_b))) ** (1 / (alpha + beta))
        expected = gain * (flops / 6) ** (beta / (alpha + beta))
    best = frontier.optimum(flops)
    assert best is not None
    assert best.params == pytest.approx(expected, rel=5e-3) and best.params * best.tokens * 6 == pytest.approx(flops)
    _, losses = frontier.curve(flops)
    assert best.loss <= losses.min()


def test_a_law_of_compute_only_has_no_compute_optimal_size() -> None:
    runs = [parse_run(run) for run in law_runs(COMPUTE, np.array([0.5, 5.0, 0.12]))]
    assert Frontier(fit_runs(runs, Settings("val", law="compute", resamples=20)), []).optimum(6e18) is None


def test_a_further_run_close_to_the_target_shrinks_its_interval_most() -> None:
    runs = [parse_run(run) for run in over_training_runs()]
    noise = np.random.default_rng(0).normal(0, 0.004, len(runs))
    noisy = [
        dataclasses.replace(run, losses={"val": (value := run.losses["val"][0] * math.exp(step), value, value)})
        for run, step in zip(runs, noise, strict=True)
    ]
    fit = fit_runs(noisy, Settings("val", law="over-training", resamples=200))
    target = (1_600_000_000, 32_000_000_000)
    best, *others = value_of_runs(fit, target, count=200)
    assert [best.flops, *(item.flops for item in others)] == sorted({best.flops, *(item.flops for item in others)})[
        ::-1
    ]
    draws = np.log(fit.law_draws(*target))
    other = np.log(fit.law_draws(best.params, best.tokens))
    line = np.polyfit(other, draws, 1)
    remaining = np.var(draws - np.polyval(line, other), ddof=1) + fit.held_out_error**2
    before = np.var(draws, ddof=1) + fit.held_out_error**2
    # The noise of the measurement keeps the reduction below that of the best linear estimate from an exact loss.
    assert 0 < best.reduction < 1 - math.sqrt(remaining / before)
    assert best.params > 2e8 and best.cost == pytest.approx(best.flops / sum(run.flops for run in runs))


def test_unknown_error_tasks_are_rejected(tmp_path: Path, fit: Fit) -> None:
    runs = [run | {"accuracy": {"copa": 0.5}} for run in over_training_runs()]
    with pytest.raises(ConfigError, match="found piqa, which no run has; expected some of copa"):
        fit(write(tmp_path / "runs.json", runs), "--loss", "val", "--error-tasks", "copa,piqa")
