"""Intervals of the validation loss: equal to those of the exact bootstrap, on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import on_ranks

from open_lm.distributed.processes import Runtime
from open_lm.evaluate.intervals import LossHistogram, bootstrap_interval

ITERATIONS = 4000
POPULATIONS = {
    "few": lambda rng: rng.exponential(size=7),
    "sequences": lambda rng: rng.normal(3.0, 0.2, size=400),
    "equal values": lambda rng: rng.integers(1, 4, size=300).astype(np.float64),
    "tokens": lambda rng: rng.exponential(size=4000) ** 2,
    "nearly constant": lambda rng: 2.0 + 1e-3 * rng.random(5000),  # all in one bin
    "rounded below zero": lambda rng: rng.normal(0.0, 1e-6, size=500),
}


def histogram(*losses: np.ndarray) -> LossHistogram:
    result = LossHistogram(torch.device("cpu"))
    for values in losses:
        tensor = torch.from_numpy(values.astype(np.float32))
        result.add(tensor, torch.ones_like(tensor, dtype=torch.bool))
    return result


def exact_bootstrap(losses: np.ndarray, iterations: int, size: int, seed: int) -> tuple[float, float]:
    """Draw every loss of every resample."""
    losses = losses.astype(np.float32).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.array([losses[generator.integers(len(losses), size=size)].mean() for _ in range(iterations)])
    means = losses.mean() + (means - losses.mean()) * math.sqrt(size / len(losses))
    lower, upper = np.quantile(means, [0.025, 0.975])
    return float(lower), float(upper)


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("max_population", [None, 150])
def test_intervals_equal_those_of_the_exact_bootstrap(name: str, max_population: int | None) -> None:
    losses = POPULATIONS[name](np.random.default_rng(3))
    size = min(len(losses), max_population or len(losses))
    interval = bootstrap_interval(histogram(losses), ITERATIONS, max_population)
    expected = exact_bootstrap(losses, ITERATIONS, size, seed=5)
    error = 2.7 / math.sqrt(ITERATIONS) * losses.std() / math.sqrt(len(losses))  # of the 2.5 % quantile of a normal
    assert interval == pytest.approx(expected, abs=6 * error, rel=0)
    assert interval[1] - interval[0] == pytest.approx(expected[1] - expected[0], rel=0.1)
    assert bootstrap_interval(histogram(losses), ITERATIONS, max_population) == interval
    if name == "tokens":  # means of few values are equal in other draws too
        assert bootstrap_interval(histogram(losses), ITERATIONS, max_population, seed=1) != interval


def test_batches_masks_and_values_that_are_not_finite() -> None:
    losses = np.random.default_rng(0).exponential(size=(6, 50))
    expected = bootstrap_interval(histogram(losses), 200)
    assert bootstrap_interval(histogram(losses[:2], losses[2:]), 200) == pytest.approx(expected, rel=1e-12)
    masked = histogram(losses)
    masked.add(torch.full((2, 9), math.nan), torch.zeros(2, 9, dtype=torch.bool))
    assert bootstrap_interval(masked, 200) == expected
    assert bootstrap_interval(histogram(np.array([2.0])), 10) == (2.0, 2.0)
    assert bootstrap_interval(histogram(), 10) is None
    for bad in (math.nan, math.inf):
        assert np.isnan(bootstrap_interval(histogram(losses, np.array([bad])), 10)).all()


def _interval_on_rank(rank: int, folder: Path) -> None:
    streams: list[int] = []
    create = np.random.default_rng

    def record(seed: tuple[int, int]) -> np.random.Generator:
        streams.append(seed[1])
        return create(seed)

    np.random.default_rng = record  # type: ignore[assignment]
    losses = create(7).exponential(size=1000)
    local = (losses[:900], losses[900:], losses[:0])[rank]  # the last rank has no losses
    interval = bootstrap_interval(histogram(local), 1000, runtime=Runtime(rank=rank, world_size=3))
    (folder / f"{rank}.json").write_text(json.dumps([interval, streams]))


@pytest.mark.processes
def test_ranks_share_the_resamples_and_agree_with_a_single_process(tmp_path: Path) -> None:
    on_ranks(_interval_on_rank, tmp_path, world_size=3)
    intervals, streams = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)), strict=True)
    assert intervals[0] == intervals[1] == intervals[2]
    assert intervals[0] == pytest.approx(
        bootstrap_interval(histogram(np.random.default_rng(7).exponential(size=1000)), 1000), rel=1e-12
    )
    assert sorted(chunk for drawn in streams for chunk in drawn) == list(range(16)) and {
        len(drawn) for drawn in streams
    } == {5, 6}
