"""Bootstrap intervals of a mean loss over any number of ranks, in constant memory.

A resample of n losses out of n is a multinomial draw of how often each loss occurs. Losses of one narrow bin are nearly
equal, so the draw is made per bin, in time proportional to the bins instead of the losses. A normal variable adds the
variance inside the bins. The mean and the variance of a resample are therefore those of the exact bootstrap.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from open_lm.distributed.processes import Runtime, sum_over_ranks
from open_lm.monitor.watchdog import heartbeat

_NUM_BINS = 1 << 16  # the upper half of the bits of a float32: sign, exponent and 7 bits of the fraction
_CHUNK = 64  # resamples that are drawn at once, from one random stream


class LossHistogram:
    """The losses of this rank in bins of a relative width of 2^-7.

    `moments` (3, 65536) float64 holds for each bin the number of losses, and the sum and the sum of squares of their
    distances from the bin's edge that is nearest to zero.
    """

    def __init__(self, device: torch.device) -> None:
        self.moments = torch.zeros(3, _NUM_BINS, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, valid: Tensor) -> None:
        """Add the losses float32 that are valid (bool, same shape), without a synchronization with the device."""
        losses, weights = losses.float().flatten(), valid.flatten().to(torch.float64)
        bits = losses.contiguous().view(torch.int32)
        bins = (bits >> 16) & (_NUM_BINS - 1)
        distances = torch.where(valid.flatten(), (losses - _edges(bits)).to(torch.float64), 0.0)
        for row, values in zip(self.moments, (weights, distances, distances * distances), strict=True):
            row.index_add_(0, bins, values)


def bootstrap_interval(
    histogram: LossHistogram,
    iterations: int = 10_000,
    max_population: int | None = None,
    *,
    runtime: Runtime | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the interval (lower, upper) of the mean loss by the percentile bootstrap (Efron 1979). Collective.

    Return None without losses. With `max_population` m below the number n of losses, resamples have m losses and their
    spread is scaled by sqrt(m / n) (m-out-of-n bootstrap, Bickel et al. 1997), so the interval is that of n losses.
    The ranks share the resamples. Equal losses and seeds give equal intervals, on any number of ranks up to rounding.
    """
    runtime = runtime or Runtime()
    counts, means, variances = _bins(sum_over_ranks(histogram.moments.clone()).cpu().numpy())
    population = round(counts.sum())
    if not population:
        return None
    size = min(population, max_population or population)
    center = float(counts @ means) / population
    if not math.isfinite(center):
        return math.nan, math.nan
    rank, ranks = (runtime.rank, runtime.world_size) if runtime.distributed else (0, 1)
    resampled = np.zeros(iterations)
    for chunk in range(rank, -(-iterations // _CHUNK), ranks):
        heartbeat("computing an interval")
        part = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, iterations))
        generator = np.random.default_rng((seed, chunk))
        draws = generator.multinomial(size, counts / population, size=part.stop - part.start).astype(np.float64)
        noise = generator.standard_normal(len(draws)) * np.sqrt(draws @ variances)
        resampled[part] = (draws @ means + noise) / size
    heartbeat("exchanging the interval")
    resampled = sum_over_ranks(torch.from_numpy(resampled).to(histogram.moments.device)).cpu().numpy()
    resampled = center + (resampled - center) * math.sqrt(size / population)
    lower, upper = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def _bins(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number, the mean and the variance (float64) of the losses of each bin, the fullest bins first."""
    used = np.flatnonzero(moments[0])
    used = used[np.argsort(-moments[0, used], kind="stable")]
    counts, sums, squares = moments[:, used]
    edges = _edges(torch.from_numpy((used << 16).astype(np.uint32).view(np.int32))).numpy().astype(np.float64)
    distances = sums / counts
    return counts, edges + distances, np.maximum(squares / counts - distances**2, 0.0)


def _edges(bits: Tensor) -> Tensor:
    """Return the edges (float32) of the bins of losses, given as int32 bits."""
    return (bits & -_NUM_BINS).view(torch.float32)
