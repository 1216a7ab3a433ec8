"""What keeps a bad step away from the weights: decided on the device, told to the host where it next reads.

A step whose loss or gradient norm is not finite, or whose loss is a spike where that is asked for, changes neither
parameters nor moments nor step counts. Loss and norm are global values, so that all ranks decide alike.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from open_lm.config.sections import FaultConfig
from open_lm.distributed.processes import Runtime
from open_lm.errors import UserError

RECENT_STEPS = 100  # of these --max-skipped-steps may be skipped
MOST_SPIKES = 50  # of them: then the loss has found another level, and no step would ever be accepted again
SPIKE_WINDOW, SPIKE_LEAST = 128, 32  # accepted losses that a spike is measured against, and the fewest that do
_ACCEPTED, _NOT_FINITE, _SPIKE = 0, 1, 2


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer a number, step after step. Weights are those of the last good step."""

    on_every_rank = True


def not_finite(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether a step is to be skipped, as a bool scalar on the device: loss or gradient norm is not finite."""
    return ~(loss.isfinite() & grad_norm.isfinite())


class Guard:
    """Judges each step of a run, and keeps what the judgement needs: what became of the last 100 steps, oldest first,
    the losses of the last 128 accepted ones (only where spikes are looked for), and counts over the whole run.

    scaled: a GradScaler scales the loss, whose overflows are its everyday business: skipped, but not counted.
    """

    def __init__(self, cfg: FaultConfig, runtime: Runtime, scaled: bool = False) -> None:
        self._cfg, self._runtime, self._scaled = cfg, runtime, scaled
        threshold = cfg.skip_loss_spikes if cfg.rollback_loss_spikes is None else cfg.rollback_loss_spikes
        self._threshold = threshold
        self._losses: Tensor
        self._recent: Tensor
        self._counts: Tensor
        self.restore({})

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the step with this global loss and norm, float scalars, is to be skipped: a bool scalar. No waiting
        for the device. Once for each step."""
        broken = ~loss.isfinite() if self._scaled else not_finite(loss, grad_norm)
        kind = broken.to(torch.uint8) * _NOT_FINITE
        if self._threshold is not None:
            kind = torch.where(self._is_spike(loss) & ~broken, _SPIKE, kind)
            accepted = torch.cat([self._losses[1:], loss.detach().double().reshape(1)])
            self._losses = torch.where(kind == _ACCEPTED, accepted, self._losses)
        self._recent = torch.cat([self._recent[1:], kind.reshape(1)])
        self._counts += torch.stack([kind == _NOT_FINITE, kind == _SPIKE])
        self._last = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        return (kind != _ACCEPTED) | ~grad_norm.isfinite()

    def _is_spike(self, loss: Tensor) -> Tensor:
        known = self._losses.isfinite()
        number = known.sum()
        mean = torch.where(known, self._losses, 0).sum() / number
        std = (torch.where(known, self._losses - mean, 0).square().sum() / number).sqrt()
        assert self._threshold is not None
        return (number >= SPIKE_LEAST) & (loss > mean + self._threshold * std)

    @property
    def accepted(self) -> Tensor:
        """Whether the last step's loss counts: a bool scalar on the device."""
        return self._recent[-1] == _ACCEPTED

    def report(self) -> Tensor:
        """What `heed` needs to know of the step just judged: float64 (5,) on the device."""
        found = [self._recent[-1], (self._recent == _NOT_FINITE).sum(), (self._recent == _SPIKE).sum()]
        return torch.cat([torch.stack([value.double() for value in found]), self._last])

    def heed(self, report: list[float], step: int, lr: float) -> bool:
        """Say aloud what became of a step (counted from 0) and its learning rate; whether the run is to go back.

        TrainingDiverged: more steps were skipped than are allowed.
        """
        kind, num_broken, num_spikes, loss, norm = report
        if kind == _ACCEPTED:
            return False
        if num_broken > self._cfg.max_skipped_steps or num_spikes > MOST_SPIKES:
            why = (
                f"{num_broken:.0f} of the last {RECENT_STEPS} steps were not finite, --max-skipped-steps is "
                f"{self._cfg.max_skipped_steps}"
                if kind == _NOT_FINITE
                else f"{num_spikes:.0f} of the last {RECENT_STEPS} steps were spikes, so the loss does not come back"
            )
            raise TrainingDiverged(
                f"training diverged at step {step} (learning rate {lr:g}): loss {loss}, gradient norm {norm}; {why}; "
                "continue from an earlier checkpoint with a lower --lr, a longer --warmup or --grad-clip-norm, and "
                "check the data of this step"
            )
        if self._runtime.is_master:
            what = "is not finite" if kind == _NOT_FINITE else "is a spike"
            logging.warning(
                f"step {step} {what} and was skipped (loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g}); of "
                f"the last {RECENT_STEPS} steps {num_broken:.0f} were not finite and {num_spikes:.0f} spikes"
            )
        return kind == _SPIKE and self._cfg.rollback_loss_spikes is not None

    def counts(self) -> dict[str, int]:
        """Steps skipped so far, by name; waits for the device."""
        skipped, spikes = self._counts.tolist()
        return {"skipped_steps": skipped, "spikes": spikes}

    def state(self) -> dict[str, Any]:
        """JSON-able and the same on all ranks; waits for the device."""
        losses = self._losses[self._losses.isfinite()].tolist()
        return {"counts": self._counts.tolist(), "recent": self._recent.tolist(), "losses": losses}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; from nothing where it is empty."""
        device = self._runtime.device
        losses = state.get("losses", [])[-SPIKE_WINDOW:]
        losses = [float("nan")] * (SPIKE_WINDOW - len(losses)) + losses
        self._losses = torch.tensor(losses, dtype=torch.float64, device=device)
        recent = state.get("recent", [_ACCEPTED] * RECENT_STEPS)
        self._recent = torch.tensor(recent, dtype=torch.uint8, device=device)
        self._counts = torch.tensor(state.get("counts", [0, 0]), dtype=torch.int64, device=device)
        self._last = torch.zeros(2, dtype=torch.float64, device=device)
