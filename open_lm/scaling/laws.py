"""Laws of the loss as a function of parameters N and tokens D, as the registry SCALING_LAWS.

A law is a sum of powers. Each term is exp(X theta), where theta holds the logarithms of the amplitudes and the
exponents, and X holds 0, 1 and the logarithms of N and D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.config.registry import SCALING_LAWS
from open_lm.scaling.solve import Array

_LOG_AMPLITUDES = (-12.0, 40.0)
_AMPLITUDE_STARTS = (2.0, 5.0, 8.0)
_LOG_OFFSETS = (-7.0, 3.0)
_OFFSET_STARTS = (0.0, 0.5)


@dataclass(frozen=True)
class Coefficient:
    """A coefficient of a law.

    Attributes:
        name: its name in results.
        bounds: smallest and largest value of theta.
        starts: values of theta from which the fit starts.
        is_log: theta is the logarithm of the coefficient.
    """

    name: str
    bounds: tuple[float, float]
    starts: tuple[float, ...]
    is_log: bool = False


@dataclass(frozen=True)
class Law:
    """A sum of powers.

    Attributes:
        formula: text for people.
        coefficients: coefficients in the order of theta.
        terms: function of log N and log D (points,) that returns X (terms, points, coefficients).
        robust: fit with the Huber loss of log residuals; else with least squares of the loss.
    """

    formula: str
    coefficients: tuple[Coefficient, ...]
    terms: Callable[[Array, Array], Array]
    robust: bool

    def design(self, params: Sequence[float], tokens: Sequence[float]) -> Array:
        """Return X (terms, points, coefficients) of the given N and D."""
        return self.terms(np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float)))

    def values(self, theta: Array) -> dict[str, float]:
        """Return the coefficients by name."""
        return {
            item.name: float(math.exp(value) if item.is_log else value)
            for item, value in zip(self.coefficients, theta, strict=True)
        }

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Smallest and largest theta."""
        low, high = zip(*(item.bounds for item in self.coefficients), strict=True)
        return np.array(low), np.array(high)

    @property
    def starts(self) -> Array:
        """All combinations of starts (starts, coefficients)."""
        return np.array(list(itertools.product(*(item.starts for item in self.coefficients))))

    def at_bounds(self, theta: Array) -> list[str]:
        """Return a description of each coefficient that is at a bound."""
        names = []
        for item, value, name in zip(self.coefficients, theta, self.values(theta), strict=True):
            low, high = item.bounds
            margin = 1e-6 * (high - low)
            if not low + margin < value < high - margin:
                limit = low if value <= low + margin else high
                names.append(f"{name} = {math.exp(limit) if item.is_log else limit:.4g}")
        return names


def _offset(name: str = "E") -> Coefficient:
    return Coefficient(name, _LOG_OFFSETS, _OFFSET_STARTS, is_log=True)


def _amplitude(name: str) -> Coefficient:
    return Coefficient(name, _LOG_AMPLITUDES, _AMPLITUDE_STARTS, is_log=True)


def _over_training_terms(log_n: Array, log_d: Array) -> Array:
    terms = np.zeros((3, len(log_n), 4))
    terms[0, :, 3] = terms[1, :, 0] = terms[2, :, 1] = 1
    terms[1, :, 2] = log_n
    terms[2, :, 2] = log_d + math.log(6) / 2
    return terms


def _chinchilla_terms(log_n: Array, log_d: Array) -> Array:
    terms = np.zeros((3, len(log_n), 5))
    terms[0, :, 0] = terms[1, :, 1] = terms[2, :, 3] = 1
    terms[1, :, 2] = -log_n
    terms[2, :, 4] = -log_d
    return terms


def _compute_terms(log_n: Array, log_d: Array) -> Array:
    terms = np.zeros((2, len(log_n), 3))
    terms[0, :, 0] = terms[1, :, 1] = 1
    terms[1, :, 2] = -(log_n + log_d + math.log(6))
    return terms


# Gadre et al. 2024 (arXiv 2403.08540): the same exponent for N and D, so that the loss falls with the same power of
# compute at each token multiplier. Their parameterization has the factor 6^(eta / 2).
OVER_TRAINING = SCALING_LAWS.register("over-training", help="E + a N^eta + b 6^(eta/2) D^eta, by least squares")(
    Law(
        "L = E + a N^eta + b 6^(eta/2) D^eta",
        (
            _amplitude("a"),
            _amplitude("b"),
            Coefficient("eta", (-2.0, -0.01), (-0.5, -0.35, -0.25, -0.15)),
            _offset(),
        ),
        _over_training_terms,
        robust=False,
    )
)
# Hoffmann et al. 2022 (arXiv 2203.15556), approach 3.
CHINCHILLA = SCALING_LAWS.register("chinchilla", help="E + A N^-alpha + B D^-beta, Huber loss of log residuals")(
    Law(
        "L = E + A N^-alpha + B D^-beta",
        (
            _offset(),
            _amplitude("A"),
            Coefficient("alpha", (0.01, 2.0), (0.2, 0.35, 0.5)),
            _amplitude("B"),
            Coefficient("beta", (0.01, 2.0), (0.2, 0.35, 0.5)),
        ),
        _chinchilla_terms,
        robust=True,
    )
)
COMPUTE = SCALING_LAWS.register("compute", help="E + A C^-alpha with C = 6 N D, Huber loss of log residuals")(
    Law(
        "L = E + A C^-alpha",
        (_offset(), _amplitude("A"), Coefficient("alpha", (0.005, 1.0), (0.05, 0.1, 0.2))),
        _compute_terms,
        robust=True,
    )
)
