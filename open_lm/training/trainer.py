"""One optimizer step, and the loop around it.

Legend: B rows of this rank's batch, T sequence. A step's loss is the sum over all valid tokens of all ranks and
micro-batches divided by their number, so that neither the number of ranks nor accumulation changes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.config.layout import Layout
from open_lm.config.sections import FaultConfig
from open_lm.data.device import DeviceBatch, on_device
from open_lm.data.loader import TrainLoader
from open_lm.distributed.processes import Runtime, sum_over_ranks
from open_lm.model.losses import IGNORE_INDEX, TokenLoss
from open_lm.model.objective import batch_loss
from open_lm.monitor import watchdog
from open_lm.monitor.metrics import DeviceMeans, LateValues, TrainReading, peak_memory_bytes, short_labels, to_device
from open_lm.monitor.timing import PhaseClock, Stopwatch
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.build import clip_gradients, step_unless
from open_lm.optim.schedules import Schedule
from open_lm.parallel.parallelize import gradient_sync, unwrap, without_training
from open_lm.training.control import Agreed, RunControl
from open_lm.training.guard import Guard, TrainingDiverged, not_finite

__all__ = ["Agreed", "Report", "StepOptions", "StepResult", "Trainer", "TrainingDiverged", "train_step"]
_COMPILE_S = 1800.0  # what the first step of a compiled model may take on top
Report = Callable[[Mapping[str, Any], int], None]  # (values by name, step)


@dataclass(frozen=True)
class StepOptions:
    """How a step computes. `accum_freq` micro-batches have to divide the rows of a batch. With `end_of_text_id`
    attention stays inside the documents that it ends."""

    runtime: Runtime
    layout: Layout
    autocast: Callable[[], AbstractContextManager[object]]
    accum_freq: int = 1
    z_loss_coefficient: float = 0.0
    grad_clip_norm: float | None = None
    log_logit_mean: bool = False
    end_of_text_id: int | None = None


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device, the same on all ranks: `values` by name (loss, …), `grad_norm` before clipping, whether
    the update was `skipped` (bool), and of all ranks together `valid_tokens` with a target, `samples`, the sequences
    that held data, and the caller's `counts` (n,) (int64)."""

    values: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor
    valid_tokens: Tensor
    samples: Tensor
    counts: Tensor


def train_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: Optimizer,
    options: StepOptions,
    *,
    num_samples: int | None = None,
    counts: Sequence[int] = (),
    scaler: torch.amp.GradScaler | None = None,
    judge: Callable[[Tensor, Tensor], Tensor] = not_finite,
    enter: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """One update of `model` from this rank's inputs and targets, both (B,T) int64 on the device.

    num_samples: rows that hold data (default: all). counts: further numbers to be summed over ranks. judge: from the
    global loss and gradient norm, whether the update is skipped. enter: told the name of each phase as it begins: sums
    over ranks (where a rank waits for slower ones), forward, backward, optimizer. Nothing waits for the device.
    """
    enter("sums")
    layout = options.layout
    rows = len(inputs) if num_samples is None else num_samples
    own = to_device([rows if layout.counts_rows else 0, *counts], inputs.device)
    num_targets = (targets != IGNORE_INDEX).sum().reshape(1) * layout.counts_rows
    summed = sum_over_ranks(torch.cat([num_targets, own]))
    valid_tokens, samples = summed[0], summed[1]
    optimizer.zero_grad(set_to_none=True)
    parts: dict[str, Tensor] = {}
    for ids, labels, is_last in _micro_batches(inputs, targets, options.accum_freq):
        with gradient_sync(model, is_last):
            enter("forward")
            objective, more = _objective(model, ids, labels, valid_tokens, options)
            enter("backward")
            (objective if scaler is None else scaler.scale(objective)).backward()
        parts = {name: parts[name] + value if name in parts else value for name, value in more.items()}
    enter("sums")
    values = _sum_values(parts, layout)
    enter("optimizer")
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model.parameters(), options.grad_clip_norm)
    skipped = judge(values["loss"], grad_norm)
    step_unless(optimizer, skipped)  # a scaler's step() would skip for its overflows alone, which are not finite here
    if scaler is not None:
        scaler.update()
    return StepResult(values, grad_norm, skipped, valid_tokens, samples, summed[2:])


def _sum_values(parts: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The sums over ranks of float scalars, of which ranks with the same tokens have the same."""
    if not parts:
        return {}
    summed = sum_over_ranks(torch.stack([part.float() for part in parts.values()]) * layout.counts_tokens)
    return dict(zip(parts, summed.unbind(), strict=True))


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
    logit_means: list[Tensor] | None = [] if options.log_logit_mean else None
    token_loss = TokenLoss(labels, options.z_loss_coefficient, logit_means=logit_means)
    loss = batch_loss(model, ids, token_loss, options) / valid_tokens.clamp(min=1)
    ranks = options.layout.gradient_ranks
    share = 1 / (ranks * options.accum_freq)
    parts = {"loss": loss.detach()}
    if logit_means is not None:
        parts["logit_mean"] = logit_means[0] * share
    # Both DDP and FSDP average gradients over ranks, where the loss's have to be added.
    objective = loss * ranks
    auxiliary_loss = getattr(unwrap(model), "auxiliary_loss", lambda: None)()
    if auxiliary_loss is not None:
        objective = objective + auxiliary_loss / options.accum_freq
        parts["load_balancing_loss"] = auxiliary_loss.detach() * share
    return objective, parts


@dataclass
class _EpochRun:
    """An epoch on its way, from the step that it began with to the one that ends it."""

    epoch: int
    first_step: int
    end_step: int
    watch: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class Trainer:
    """All that a run of training needs, and how far it has come.

    `step` counts steps, skipped ones too; `data_state` is the loader's position after the last of them. `samples_seen`
    and `samples_per_source` count the sequences that held data, also where some of their targets are masked and where
    the step was skipped; filler rows are not among them but in `samples_skipped`. A sequence is `seq_len` tokens. All
    counts stand as of the last reading of the device, which a log line and `state` are. After a skipped step averaged
    models take the unchanged weights in once more.

    log_every: steps between readings. average_loss_every: steps between losses of the averaged models, 0 for none.
    flops_per_token and peak_flops (of one device) give the MFU; None leaves it out. after_step: called after each step
    with what all ranks agree on then; it may save `state`, go back with `restore`, or raise.
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
    faults: FaultConfig = field(default_factory=FaultConfig)
    control: RunControl | None = None
    after_step: Callable[[Agreed], None] | None = None
    step: int = 0
    samples_seen: int = 0
    samples_skipped: int = 0
    samples_per_source: dict[str, int] = field(default_factory=dict)
    data_state: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        device = self.options.runtime.device
        self._sources = [source.name for source in self.loader.sources]
        self._guard = Guard(self.faults, self.options.runtime, scaled=self.scaler is not None)
        self._compiles = any(getattr(m, "_compiled_call_impl", None) is not None for m in self.model.modules())
        self._window = DeviceMeans()
        self._phases = PhaseClock(device)
        self._late = LateValues(device)
        self._unread = torch.zeros(2 + len(self._sources), dtype=torch.int64, device=device)

    def run_epoch(self, epoch: int, end_step: int, first_step: int | None = None) -> None:
        """Train from the current step to `end_step`, or until `after_step` has gone back before the epoch.

        first_step: the step that the epoch began with, from which its log lines count (default: the current one).
        TrainingDiverged: too many steps were skipped; weights are those of the last good step, and step, counts and
        data_state fit them. On CUDA some good steps may have followed the last bad one.
        """
        run = _EpochRun(epoch, self.step if first_step is None else first_step, end_step)
        self.model.train()
        try:
            while run.first_step <= self.step < end_step:
                self._run_steps(run)
        except TrainingDiverged:
            self._read_counts()
            raise

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, step and data_state: JSON-able, the same on all ranks, whatever their
        number. Waits for the device."""
        self._read_counts()
        return {
            "samples_seen": self.samples_seen,
            "samples_skipped": self.samples_skipped,
            "samples_per_source": dict(self.samples_per_source),
            "window": self._window.state(),
            "guard": self._guard.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; who calls it sets weights, step and data_state and rewinds the loader."""
        self._late.clear()
        self._unread.zero_()
        self.samples_seen, self.samples_skipped = int(state["samples_seen"]), int(state["samples_skipped"])
        self.samples_per_source = dict(state["samples_per_source"])
        self._window.restore(state["window"], self.options.runtime.device)
        self._guard.restore(state["guard"])

    def _run_steps(self, run: _EpochRun) -> None:
        """Steps to the end of the epoch, or until `after_step` has gone to another place in the data."""
        for batch, state in self._batches(run):
            number, is_last = self.step - run.first_step, self.step + 1 == run.end_step
            lr = self.scheduler(self.step)
            result = self._train_step(batch)
            accepted = self._guard.accepted
            self._window.add(result.values, accepted)
            if self.averagers is not None:
                self.averagers.step()
                if self.average_loss_every and number % self.average_loss_every == 0:
                    losses = self._averaged_losses(batch.inputs, batch.targets, result.valid_tokens)
                    self._window.add(_sum_values(losses, self.options.layout), accepted)
            self._late.add(torch.cat([result.counts[:2].double(), self._guard.report()]), (self.step, lr))
            self.step, self.data_state = self.step + 1, state
            if is_last or number % self.log_every == 0:
                self._log(run, lr, result.grad_norm)
            agreed = self._agree(everything=is_last)
            if self.after_step is not None:
                self.after_step(agreed)
            if self.data_state is not state:
                return
            watchdog.beat("waiting for data", self.step)

    def _batches(self, run: _EpochRun) -> Iterator[tuple[DeviceBatch, dict[str, Any]]]:
        """The batches from here to the epoch's end; what waiting for them takes goes to the run's watch."""
        batches = on_device(self.loader.batches(run.end_step - self.step), self.options.runtime.device)
        while True:
            start = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            run.watch.data_arrived(time.perf_counter() - start)
            yield item

    def _train_step(self, batch: DeviceBatch) -> StepResult:
        stop, save = (0, 0) if self.control is None else self.control.wishes()
        watchdog.beat("step", self.step, allow_s=_COMPILE_S if self._compiles else 0.0)
        self._compiles = False
        own_rows = (batch.skipped, *batch.per_source)
        result = train_step(
            self.model,
            batch.inputs,
            batch.targets,
            self.optimizer,
            self.options,
            num_samples=batch.num_samples,
            counts=(stop, save, *(n if self.options.layout.counts_rows else 0 for n in own_rows)),
            scaler=self.scaler,
            judge=self._guard.judge,
            enter=self._phases.enter,
        )
        self._phases.end_step()
        self._unread += torch.cat([result.samples.reshape(1), result.counts[2:]])
        return result

    def _agree(self, everything: bool) -> Agreed:
        """What ranks agree on by what has come to the host, from this step or from earlier ones. TrainingDiverged."""
        stop = save = rollback = False
        for (stops, saves, *report), (step, lr) in self._late.take(everything):
            stop, save = stop or stops > 0, save or saves > 0
            rollback = self._guard.heed(report, step, lr) or rollback
        return Agreed(stop, save, rollback)

    def _averaged_losses(self, inputs: Tensor, targets: Tensor, valid_tokens: Tensor) -> dict[str, Tensor]:
        """This rank's part of the averaged models' losses on a batch, by "<averager>_loss"."""
        assert self.averagers is not None
        coefficient = self.options.z_loss_coefficient
        losses = {}
        for name, averager in self.averagers.avgs_dict.items():
            total = torch.zeros((), device=inputs.device)
            with averager.applied(), without_training(self.model):
                for ids, labels, _ in _micro_batches(inputs, targets, self.options.accum_freq):
                    total += batch_loss(self.model, ids, TokenLoss(labels, coefficient), self.options)
            losses[f"{name}_loss"] = total / valid_tokens.clamp(min=1)
        return losses

    def _log(self, run: _EpochRun, lr: float, grad_norm: Tensor) -> None:
        """Read the device's results since the last reading, and report them."""
        runtime = self.options.runtime
        means = self._window.pop()
        self._read_counts()
        phases = {f"{name}_time": seconds for name, seconds in self._phases.pop().items()}
        data_s, batch_s = run.watch.pop()
        step_tokens = self.global_batch_size * self.seq_len
        mfu = None
        if self.flops_per_token and self.peak_flops:
            mfu = self.flops_per_token * step_tokens / batch_s / (self.peak_flops * runtime.world_size)
        reading = TrainReading(
            epoch=run.epoch,
            samples=(self.step - run.first_step) * self.global_batch_size,
            epoch_samples=(run.end_step - run.first_step) * self.global_batch_size,
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
            extra={**means, **self._counted(), **phases},
        )
        if runtime.is_master:
            logging.info(reading.line())
        self.report({"tokens": reading.tokens, "train/epoch": run.epoch, **reading.metrics()}, self.step)

    def _counted(self) -> dict[str, float]:
        """Counts of the whole run so far, by name."""
        labels = short_labels(list(self.samples_per_source))
        tokens = {f"tokens/{labels[name]}": n * self.seq_len for name, n in self.samples_per_source.items()}
        return {**self._guard.counts(), "skipped_samples": self.samples_skipped, **tokens}

    def _read_counts(self) -> None:
        """Bring the counts up to date; waits for the device."""
        samples, skipped, *per_source = self._unread.tolist()
        self._unread.zero_()
        self.samples_seen += samples
        self.samples_skipped += skipped
        for name, number in zip(self._sources, per_source, strict=True):
            self.samples_per_source[name] = self.samples_per_source.get(name, 0) + number
