"""Measure the gradient noise scale during training (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

A step's gradient is the sum of the gradients of its small batches, the micro-batches of all ranks. With N tokens in the
step, n_i in small batch i, G the true gradient of the mean loss and S the covariance of a token's gradient:

    E |g|^2   = |G|^2 + tr(S) / N           g = sum of g_i, the step's gradient
    E sum q_i = w |G|^2 + tr(S) / N         q_i = |g_i|^2, w = sum of (n_i / N)^2

which gives unbiased estimates of |G|^2 and tr(S). Their moving averages give the simple noise scale tr(S) / |G|^2, the
batch size in tokens at which noise and gradient are equal. Tokens of a sequence are not independent; tr(S) includes
their correlation, because small batches consist of whole sequences.

The gradients g_i are read where autograd adds them to a parameter's gradient: before DDP or FSDP2 reduce them, and
without another pass. The results of training stay bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import IGNORE_INDEX
from open_lm.distributed.processes import sum_over_ranks
from open_lm.errors import ConfigError
from open_lm.optim.build import total_norm
from open_lm.parallel.parallelize import unsharded_parameters

DECAY = 0.99  # of the moving averages, per step


class GradientNoise:
    """Estimates of the gradient noise scale of a training run.

    Args:
        model: the distributed model that is trained.
        layout: the mesh of ranks.
        accum_freq: micro-batches of a step.
        device: this rank's device.
        seq_len: tokens per sequence.
        global_batch_size: sequences per step.

    Raises:
        ConfigError: a step has a single small batch, or ranks share the tokens of a sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: MeshLayout,
        accum_freq: int,
        *,
        device: torch.device,
        seq_len: int,
        global_batch_size: int,
    ) -> None:
        _check_layout(layout, accum_freq)
        self._device = device
        self._accum_freq, self._ranks = accum_freq, layout.gradient_ranks
        self._seq_len, self._global_batch_size = seq_len, global_batch_size
        self._is_measuring = False
        self._norms: list[Tensor] = []
        self._averages: Tensor  # (3,) float64: of |G|^2, of tr(S), and of 1, which corrects for the start from zero
        self.restore(())
        self._scale: Tensor | None = None
        self._nodes = []  # autograd drops hooks with the nodes that have them
        for parameter in unsharded_parameters(model):
            node = get_gradient_edge(parameter).node
            node.register_prehook(self._record)
            self._nodes.append(node)

    def _record(self, gradients: Sequence[Tensor]) -> None:
        """Keep the norm of a parameter's gradient of one small batch; called by autograd."""
        if self._is_measuring:
            with torch.no_grad():
                self._norms.append(total_norm([gradient.detach() for gradient in gradients]))

    def start(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Start measuring a step, whose loss `scaler` scales."""
        self._norms.clear()
        self._is_measuring = True
        self._scale = None if scaler is None else scaler.scale(torch.ones((), device=self._device))

    def finish(self, targets: Tensor, grad_norm: Tensor, accepted: Tensor) -> None:
        """Add a finished step to the averages. Collective; never waits for the device.

        Args:
            targets: (B,T) int64 token ids, this rank's targets of the step.
            grad_norm: norm of the step's gradient, a float32 scalar.
            accepted: whether the step counts, a bool scalar.
        """
        self._is_measuring = False
        squares = torch.stack(self._norms).double().square().sum() / self._ranks**2
        self._norms.clear()
        if self._scale is not None:
            squares /= self._scale.double().square()
        tokens = (targets != IGNORE_INDEX).reshape(self._accum_freq, -1).sum(1).double()
        sums = sum_over_ranks(torch.stack([squares, tokens.square().sum(), tokens.sum()]))
        estimates = estimate(grad_norm.double().square(), *sums)
        updated = DECAY * self._averages + (1 - DECAY) * torch.stack([*estimates, torch.ones_like(estimates[0])])
        self._averages = torch.where(accepted & updated.isfinite().all(), updated, self._averages)

    def values(self) -> dict[str, float]:
        """Return the averages by metric name; waits for the device.

        There is no noise scale while the average of |G|^2 or of tr(S) is not positive.
        """
        signal, noise, weight = self.state()
        if not weight:
            return {}
        values = {"gradient_squared_norm": signal / weight, "gradient_variance": noise / weight}
        if signal > 0 and noise > 0:
            tokens = noise / signal
            values |= {"gradient_noise_scale": tokens / self._seq_len, "gradient_noise_scale_tokens": tokens}
            values["global_batch_size"] = self._global_batch_size
        return values

    def state(self) -> list[float]:
        """Return the three moving averages for a checkpoint; waits for the device."""
        averages: list[float] = self._averages.tolist()
        return averages

    def restore(self, state: Sequence[float]) -> None:
        """Continue from a result of `state`, or start from zero if it is empty."""
        self._averages = torch.tensor(list(state) or [0.0] * 3, dtype=torch.float64, device=self._device)


def estimate(full: Tensor, small: Tensor, squared_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return unbiased estimates of |G|^2 and of tr(S) per token; NaN if one small batch has all tokens.

    Args:
        full: squared norm of the step's gradient.
        small: sum of q_i, the squared norms of the small batches' contributions to it.
        squared_tokens: sum of the squared numbers of tokens of the small batches.
        tokens: number of tokens of the step.
    """
    weight = squared_tokens / tokens.square()
    signal = (full - small) / (1 - weight)
    return signal, tokens * (small - weight * signal)


def _check_layout(layout: MeshLayout, accum_freq: int) -> None:
    shared = {
        "--tensor-parallel": layout.tensor,
        "--context-parallel": layout.context,
        "--expert-parallel": layout.expert,
    }
    for flag, size in shared.items():
        if size > 1:
            raise ConfigError(
                f"--log-gradient-noise: found {flag} {size}, with which no rank has the gradient of its sequences; "
                "remove one of the two flags"
            )
    if layout.data_size * accum_freq < 2:
        raise ConfigError(
            "--log-gradient-noise compares the micro-batches of a step, and found one micro-batch on one rank; set "
            "--accum-freq 2, or start more ranks"
        )
