"""Skip bad steps on the device; the host reads the outcome later.

A step is skipped if its loss or gradient norm is not finite or, on request, if its loss is a spike. A skipped step
changes neither parameters nor moments nor step counts. Loss and norm are global values, so all ranks decide alike.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from open_lm.config.sections import FaultConfig
from open_lm.distributed.processes import Runtime
from open_lm.errors import UserError

RECENT_STEPS = 100  # window in which --max-skipped-steps are allowed
MAX_SPIKES = 50  # in that window; more means that the loss has changed its level, and every later step would be skipped
SPIKE_WINDOW, SPIKE_MIN_LOSSES = 128, 32  # accepted losses that define the usual level, and the minimum to define one
_ACCEPTED, _NOT_FINITE, _SPIKE = 0, 1, 2


class TrainingDiverged(UserError):
    """A loss or gradient that stays non-finite or spikes too often. Weights are those of the last good step."""

    on_every_rank = True


def not_finite(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Return whether loss or gradient norm is not finite: a bool scalar on the device."""
    return ~(loss.isfinite() & grad_norm.isfinite())


class Guard:
    """A guard that decides for each step whether to skip it.

    Keeps on the device: the outcomes of the last 100 steps, oldest first; the losses of the last 128 accepted steps
    (only if spikes are detected); the number of skipped steps and spikes of the run.

    Args:
        scaled: the loss is scaled by a GradScaler, whose gradient overflows are normal: skipped, but not counted.
    """

    def __init__(self, cfg: FaultConfig, runtime: Runtime, scaled: bool = False) -> None:
        self._cfg, self._runtime, self._scaled = cfg, runtime, scaled
        threshold = cfg.skip_loss_spikes if cfg.rollback_loss_spikes is None else cfg.rollback_loss_spikes
        self._threshold = threshold
        self._losses: Tensor
        self._recent: Tensor
        self._counts: Tensor
        self.restore({})

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether to skip the step with this global loss and gradient norm (float scalars): a bool scalar.

        Call once per step. Does not wait for the device.
        """
        broken = ~loss.isfinite() if self._scaled else not_finite(loss, grad_norm)
        outcome = broken.to(torch.uint8) * _NOT_FINITE
        if self._threshold is not None:
            outcome = torch.where(self._is_spike(loss) & ~broken, _SPIKE, outcome)
            accepted = torch.cat([self._losses[1:], loss.detach().double().reshape(1)])
            self._losses = torch.where(outcome == _ACCEPTED, accepted, self._losses)
        self._recent = torch.cat([self._recent[1:], outcome.reshape(1)])
        self._counts += torch.stack([outcome == _NOT_FINITE, outcome == _SPIKE])
        self._last = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        return (outcome != _ACCEPTED) | ~grad_norm.isfinite()

    def _is_spike(self, loss: Tensor) -> Tensor:
        known = self._losses.isfinite()
        number = known.sum()
        mean = torch.where(known, self._losses, 0).sum() / number
        std = (torch.where(known, self._losses - mean, 0).square().sum() / number).sqrt()
        assert self._threshold is not None
        return (number >= SPIKE_MIN_LOSSES) & (loss > mean + self._threshold * std)

    @property
    def accepted(self) -> Tensor:
        """Whether the last step's loss counts: a bool scalar on the device."""
        return self._recent[-1] == _ACCEPTED

    def report(self) -> Tensor:
        """Return the outcome of the last step for `handle_outcome`: float64 (5,) on the device."""
        numbers = [self._recent[-1], (self._recent == _NOT_FINITE).sum(), (self._recent == _SPIKE).sum()]
        return torch.cat([torch.stack([number.double() for number in numbers]), self._last])

    def handle_outcome(self, report: list[float], step: int, lr: float) -> bool:
        """Log the outcome of a step (counted from 0) and return whether to roll back.

        Raises:
            TrainingDiverged: more steps were skipped than allowed.
        """
        outcome, num_broken, num_spikes, loss, norm = report
        if outcome == _ACCEPTED:
            return False
        if num_broken > self._cfg.max_skipped_steps or num_spikes > MAX_SPIKES:
            reason = (
                f"{num_broken:.0f} of the last {RECENT_STEPS} steps were not finite, --max-skipped-steps is "
                f"{self._cfg.max_skipped_steps}"
                if outcome == _NOT_FINITE
                else f"{num_spikes:.0f} of the last {RECENT_STEPS} steps were spikes: the loss does not recover"
            )
            raise TrainingDiverged(
                f"training diverged at step {step} (learning rate {lr:g}): loss {loss}, gradient norm {norm}; {reason}"
                "; continue from an earlier checkpoint with a lower --lr, a longer --warmup or --grad-clip-norm, and "
                "check the data of this step"
            )
        if self._runtime.is_master:
            problem = "is not finite" if outcome == _NOT_FINITE else "is a spike"
            logging.warning(
                f"step {step} {problem} and was skipped (loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g}); "
                f"of the last {RECENT_STEPS} steps {num_broken:.0f} were not finite and {num_spikes:.0f} were spikes"
            )
        return outcome == _SPIKE and self._cfg.rollback_loss_spikes is not None

    def counts(self) -> dict[str, int]:
        """Return the numbers of skipped steps and spikes so far; waits for the device."""
        skipped, spikes = self._counts.tolist()
        return {"skipped_steps": skipped, "spikes": spikes}

    def state(self) -> dict[str, Any]:
        """Return a JSON-compatible state, equal on all ranks; waits for the device."""
        losses = self._losses[self._losses.isfinite()].tolist()
        return {"counts": self._counts.tolist(), "recent": self._recent.tolist(), "losses": losses}

    def forget_losses(self) -> None:
        """Reset the loss statistics: no step counts as a spike until new ones are known."""
        self._losses = torch.full_like(self._losses, float("nan"))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`, or start from zero if it is empty."""
        device = self._runtime.device
        losses = state.get("losses", [])[-SPIKE_WINDOW:]
        losses = [float("nan")] * (SPIKE_WINDOW - len(losses)) + losses
        self._losses = torch.tensor(losses, dtype=torch.float64, device=device)
        recent = state.get("recent", [_ACCEPTED] * RECENT_STEPS)
        self._recent = torch.tensor(recent, dtype=torch.uint8, device=device)
        self._counts = torch.tensor(state.get("counts", [0, 0]), dtype=torch.int64, device=device)
        self._last = torch.zeros(2, dtype=torch.float64, device=device)
