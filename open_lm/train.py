"""One optimizer step, and the loop around it.

Legend: B rows of this rank's batch, T sequence. A step's loss is the sum over all valid tokens of all ranks and
micro-batches divided by their number, so that neither the number of ranks nor accumulation changes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.averaging import ModelAverager
from open_lm.data.loader import Batch, TrainLoader
from open_lm.distributed import Runtime, sum_over_ranks
from open_lm.errors import UserError
from open_lm.losses import IGNORE_INDEX, token_loss
from open_lm.metrics import DeviceMeans, Stopwatch, TrainReading, peak_memory_bytes
from open_lm.optim import clip_gradients
from open_lm.parallelize import gradient_sync, unwrap, without_training
from open_lm.scheduler import Schedule

Report = Callable[[Mapping[str, Any], int], None]  # (values by name, step)


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class StepOptions:
    """How a step computes. `accum_freq` micro-batches have to divide the rows of a batch."""

    runtime: Runtime
    autocast: Callable[[], AbstractContextManager[object]]
    accum_freq: int = 1
    z_loss_coefficient: float = 0.0
    grad_clip_norm: float | None = None
    log_logit_mean: bool = False


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device. `parts` are this rank's shares of global values (their sum over ranks counts); the rest is
    global already: `grad_norm`, `valid_tokens` with a target and `samples`, the sequences that held data (int64)."""

    parts: dict[str, Tensor]
    grad_norm: Tensor
    valid_tokens: Tensor
    samples: Tensor


def train_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: Optimizer,
    options: StepOptions,
    *,
    num_samples: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    check: bool = False,
) -> StepResult:
    """One update of `model` from this rank's inputs and targets, both (B,T) int64 on the device.

    num_samples: rows that hold data (default: all). check: wait for the gradient norm, and raise TrainingDiverged
    before the update where it is not finite; without it nothing waits for the device.
    """
    rows = torch.full((), len(inputs) if num_samples is None else num_samples, device=inputs.device)
    valid_tokens, samples = sum_over_ranks(torch.stack([(targets != IGNORE_INDEX).sum(), rows])).unbind()
    optimizer.zero_grad(set_to_none=True)
    parts: dict[str, Tensor] = {}
    for ids, labels, is_last in _micro_batches(inputs, targets, options.accum_freq):
        with gradient_sync(model, is_last):
            objective, more = _objective(model, ids, labels, valid_tokens, options)
            (objective if scaler is None else scaler.scale(objective)).backward()
        parts = {name: parts[name] + value if name in parts else value for name, value in more.items()}
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model.parameters(), options.grad_clip_norm)
    # Overflows are the scaler's everyday business: it skips the update and lowers its scale.
    if check and scaler is None and not bool(torch.isfinite(grad_norm)):
        loss = sum_over_ranks(parts["loss"].clone()).item()
        raise TrainingDiverged(f"loss {loss}, gradient norm {grad_norm.item()}")
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return StepResult(parts, grad_norm, valid_tokens, samples)


def _micro_batches(inputs: Tensor, targets: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """`count` equal slices of the rows, and whether each is the last."""
    if len(inputs) % count:
        raise ValueError(f"{len(inputs)} rows do not divide into {count} micro-batches")
    for number, (ids, labels) in enumerate(zip(inputs.chunk(count), targets.chunk(count), strict=True), start=1):
        yield ids, labels, number == count


def _objective(
    model: nn.Module, ids: Tensor, labels: Tensor, valid_tokens: Tensor, options: StepOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a micro-batch adds to the function that is minimised, and its parts of what is reported."""
    with options.autocast():
        logits = model(ids)[0]
    loss_sum, _ = token_loss(logits, labels, options.z_loss_coefficient)
    loss = loss_sum / valid_tokens.clamp(min=1)
    world_size = options.runtime.world_size
    share = 1 / (world_size * options.accum_freq)
    parts = {"loss": loss.detach()}
    if options.log_logit_mean:
        parts["logit_mean"] = logits.detach().mean() * share
    # Both DDP and FSDP average gradients over ranks, where the loss's have to be added.
    objective = loss * world_size
    auxiliary_loss = getattr(unwrap(model), "auxiliary_loss", lambda: None)()
    if auxiliary_loss is not None:
        objective = objective + auxiliary_loss / options.accum_freq
        parts["load_balancing_loss"] = auxiliary_loss.detach() * share
    return objective, parts


@dataclass
class _EpochRun:
    """What an epoch gathers between two readings. `unread_samples`: int64 scalar on the device."""

    epoch: int
    num_steps: int
    unread_samples: Tensor
    window: DeviceMeans = field(default_factory=DeviceMeans)
    watch: Stopwatch = field(default_factory=Stopwatch)
    steps_done: int = 0


@dataclass
class Trainer:
    """All that an epoch of training needs, and how far it has come.

    `step` counts optimizer updates, `data_state` is the loader's position after the last of them. log_every: steps
    between readings. average_loss_every: steps between losses of the averaged models, 0 for none.
    flops_per_token and peak_flops (of one device) give the MFU; None leaves it out.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Schedule
    loader: TrainLoader
    options: StepOptions
    report: Report
    seq_len: int
    global_batch_size: int
    total_steps: int
    log_every: int = 100
    scaler: torch.amp.GradScaler | None = None
    averagers: ModelAverager | None = None
    average_loss_every: int = 0
    flops_per_token: float | None = None
    peak_flops: float | None = None
    step: int = 0
    samples_seen: int = 0
    data_state: dict[str, Any] | None = None

    def run_epoch(self, epoch: int, end_step: int) -> None:
        """Train from the current step to `end_step`. TrainingDiverged leaves step and state as before the bad update;
        on CUDA, where only logged steps are checked, as found there."""
        unread = torch.zeros((), dtype=torch.int64, device=self.options.runtime.device)
        run = _EpochRun(epoch, end_step - self.step, unread)
        self.model.train()
        try:
            self._run_steps(run)
        except TrainingDiverged:
            self._read_samples(run)
            raise

    def _run_steps(self, run: _EpochRun) -> None:
        device = self.options.runtime.device
        for number, (batch, state) in enumerate(self._batches(run)):
            is_logged = number % self.log_every == 0 or number == run.num_steps - 1
            lr = self.scheduler(self.step)
            inputs = batch.inputs.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            result = self._checked_step(inputs, targets, batch.num_samples, lr, is_logged)
            run.window.add(result.parts)
            run.unread_samples += result.samples
            if self.averagers is not None:
                self.averagers.step()
                if self.average_loss_every and number % self.average_loss_every == 0:
                    run.window.add(self._averaged_losses(inputs, targets, result.valid_tokens))
            self.step, self.data_state, run.steps_done = self.step + 1, state, number + 1
            if is_logged:
                self._log(run, lr, result.grad_norm)

    def _batches(self, run: _EpochRun) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """The epoch's batches; what waiting for them takes goes to the run's watch."""
        batches = self.loader.batches(run.num_steps)
        while True:
            start = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            run.watch.data_arrived(time.perf_counter() - start)
            yield item

    def _checked_step(
        self, inputs: Tensor, targets: Tensor, num_samples: int, lr: float, is_logged: bool
    ) -> StepResult:
        check = is_logged or inputs.device.type == "cpu"  # elsewhere reading a value means waiting for the device
        try:
            return train_step(
                self.model,
                inputs,
                targets,
                self.optimizer,
                self.options,
                num_samples=num_samples,
                scaler=self.scaler,
                check=check,
            )
        except TrainingDiverged as error:
            raise TrainingDiverged(
                f"training diverged at step {self.step} (learning rate {lr:g}): {error}; continue from an earlier "
                "checkpoint with a lower --lr, a longer --warmup or --grad-clip-norm, and check the data of this step"
            ) from None

    def _averaged_losses(self, inputs: Tensor, targets: Tensor, valid_tokens: Tensor) -> dict[str, Tensor]:
        """This rank's part of the averaged models' losses on a batch, by "<averager>_loss"."""
        assert self.averagers is not None
        losses = {}
        for name, averager in self.averagers.avgs_dict.items():
            total = torch.zeros((), device=inputs.device)
            with averager.applied(), without_training(self.model):
                for ids, labels, _ in _micro_batches(inputs, targets, self.options.accum_freq):
                    with self.options.autocast():
                        logits = self.model(ids)[0]
                    total += token_loss(logits, labels, self.options.z_loss_coefficient)[0]
            losses[f"{name}_loss"] = total / valid_tokens.clamp(min=1)
        return losses

    def _log(self, run: _EpochRun, lr: float, grad_norm: Tensor) -> None:
        """Read the device's results since the last reading, and report them."""
        runtime = self.options.runtime
        means = run.window.pop()
        self._read_samples(run)
        data_s, batch_s = run.watch.pop()
        step_tokens = self.global_batch_size * self.seq_len
        mfu = None
        if self.flops_per_token and self.peak_flops:
            mfu = self.flops_per_token * step_tokens / batch_s / (self.peak_flops * runtime.world_size)
        reading = TrainReading(
            epoch=run.epoch,
            samples=run.steps_done * self.global_batch_size,
            epoch_samples=run.num_steps * self.global_batch_size,
            loss=means.pop("loss"),
            grad_norm=float(grad_norm.item()),
            lr=lr,
            data_s=data_s,
            batch_s=batch_s,
            tokens=self.samples_seen * self.seq_len,
            step_tokens=step_tokens,
            world_size=runtime.world_size,
            memory_bytes=peak_memory_bytes(runtime.device),
            left_s=(self.total_steps - self.step) * batch_s,
            mfu=mfu,
            extra=means,
        )
        if runtime.is_master:
            logging.info(reading.line())
        self.report({"tokens": reading.tokens, "train/epoch": run.epoch, **reading.metrics()}, self.step)

    def _read_samples(self, run: _EpochRun) -> None:
        self.samples_seen += int(run.unread_samples.item())
        run.unread_samples.zero_()
