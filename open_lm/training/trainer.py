"""The training loop: optimizer steps of an epoch, their log lines, and the state that a checkpoint keeps of them.

Next on the path of a batch: open_lm.data.loader, where it comes from, and open_lm.training.step, where it goes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm.config.sections import FaultConfig
from open_lm.data.device import DeviceBatch, on_device
from open_lm.data.loader import TrainLoader
from open_lm.model.losses import TokenLoss, batch_loss
from open_lm.monitor import watchdog
from open_lm.monitor.metrics import DelayedReadback, DeviceMeans, TrainLogEntry, peak_memory_bytes
from open_lm.monitor.rank_times import RankTimes
from open_lm.monitor.timing import PhaseClock, Stopwatch
from open_lm.optim.averaging import ModelAverager
from open_lm.optim.schedules import Schedule
from open_lm.parallel.parallelize import evaluation_mode
from open_lm.system.names import short_labels
from open_lm.training.control import Decision, RunControl
from open_lm.training.gradient_noise import GradientNoise
from open_lm.training.guard import Guard, TrainingDiverged
from open_lm.training.step import StepOptions, StepResult, micro_batches, micro_documents, sum_values, train_step

_COMPILE_S = 1800.0  # extra time for the first step of a compiled model
Report = Callable[[Mapping[str, Any], int], None]  # (values by name, step)


@dataclass
class _Epoch:
    """An epoch in progress: its number, its first step, and the step after its last one."""

    number: int
    first_step: int
    end_step: int


@dataclass
class Trainer:
    """The training loop and its progress.

    Counts are up to date after a log line and after `state`, which read them from the device. Averaged models take
    part in skipped steps too: they average in the unchanged weights.

    Attributes:
        report: receives the values of each log line.
        seq_len: tokens per sequence.
        log_every: steps between log lines.
        average_loss_every: steps between losses of the averaged models; 0 for never.
        flops_per_token, peak_flops: for the MFU (peak_flops of one device); None leaves it out.
        after_step: called after each step with the decision of all ranks; may save `state`, roll back with `restore`,
            or raise.
        step: number of steps, skipped ones included.
        samples_seen, samples_per_source: sequences that held data, including partly masked ones and those of skipped
            steps; without filler sequences.
        samples_skipped: filler sequences in place of unusable ones.
        data_state: position of the loader after the last step.
        stopwatch: measures the steps of the epoch.
        rank_times: compares the ranks at each log line.
        gradient_noise: measures the gradient noise scale; None without --log-gradient-noise.
        num_steps: number of steps of this process, repeated ones included.
        at_step: called with the step before each step and at the end, and with the clock of the phases.
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
    after_step: Callable[[Decision], None] | None = None
    step: int = 0
    samples_seen: int = 0
    samples_skipped: int = 0
    samples_per_source: dict[str, int] = field(default_factory=dict)
    data_state: dict[str, Any] | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    rank_times: RankTimes | None = None
    gradient_noise: GradientNoise | None = None
    num_steps: int = 0
    at_step: Callable[[int, PhaseClock], None] | None = None

    def __post_init__(self) -> None:
        device = self.options.runtime.device
        self._sources = [source.name for source in self.loader.sources]
        self._guard = Guard(self.faults, self.options.runtime, scaled=self.scaler is not None)
        self._compiles = any(getattr(m, "_compiled_call_impl", None) is not None for m in self.model.modules())
        self._window = DeviceMeans()
        self._phases = PhaseClock(device)
        self._late = DelayedReadback(device)
        self._unread = torch.zeros(2 + len(self._sources), dtype=torch.int64, device=device)

    def run_epoch(self, epoch: int, end_step: int, first_step: int | None = None) -> None:
        """Train from the current step to `end_step`, or until `after_step` rolls back to before the epoch.

        Args:
            first_step: first step of the epoch, from which its log lines count (default: the current step).

        Raises:
            TrainingDiverged: too many steps were skipped. Weights are those of the last good step; step, counts and
                data_state match them. On CUDA some good steps may follow the last bad one.
        """
        current = _Epoch(epoch, self.step if first_step is None else first_step, end_step)
        self.stopwatch = Stopwatch()
        self.model.train()
        try:
            while current.first_step <= self.step < end_step:
                self._run_steps(current)
        except TrainingDiverged:
            self._read_counts()
            raise

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps in addition to weights, step and data_state; waits for the device.

        JSON-compatible, equal on all ranks and independent of their number.
        """
        self._read_counts()
        return {
            "samples_seen": self.samples_seen,
            "samples_skipped": self.samples_skipped,
            "samples_per_source": dict(self.samples_per_source),
            "window": self._window.state(),
            "guard": self._guard.state(),
            **({} if self.gradient_noise is None else {"gradient_noise": self.gradient_noise.state()}),
        }

    def progress(self) -> dict[str, Any]:
        """Return what this process has computed: the step, and tokens and FLOPs, repeated steps included."""
        tokens = self.num_steps * self.global_batch_size * self.seq_len
        flops = {} if self.flops_per_token is None else {"flops": tokens * self.flops_per_token}
        return {"step": self.step, "tokens": tokens, **flops}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state`; the caller restores weights, step, data_state and the loader."""
        self._late.clear()
        self._unread.zero_()
        self.samples_seen, self.samples_skipped = int(state["samples_seen"]), int(state["samples_skipped"])
        self.samples_per_source = dict(state["samples_per_source"])
        self._window.restore(state["window"], self.options.runtime.device)
        self._guard.restore(state["guard"])
        if self.gradient_noise is not None:
            self.gradient_noise.restore(state.get("gradient_noise", ()))

    def forget_losses(self) -> None:
        """Reset the loss statistics of the spike detection, because other data follow."""
        self._guard.forget_losses()

    def _run_steps(self, epoch: _Epoch) -> None:
        """Train to the end of the epoch, or until `after_step` moves to another position in the data."""
        self._at_step()
        for batch, state in self._batches(epoch):
            number, is_last = self.step - epoch.first_step, self.step + 1 == epoch.end_step
            lr = self.scheduler(self.step)
            result = self._train_step(batch)
            accepted = self._guard.accepted
            self._window.add(result.values, accepted)
            if self.averagers is not None:
                self.averagers.step()
                if self.average_loss_every and number % self.average_loss_every == 0:
                    losses = self._averaged_losses(batch, result.valid_tokens)
                    self._window.add(sum_values(losses, self.options.layout), accepted)
            self._late.add(torch.cat([result.counts[:2].double(), self._guard.report()]), (self.step, lr))
            self.step, self.data_state, self.num_steps = self.step + 1, state, self.num_steps + 1
            if is_last or number % self.log_every == 0:
                self._log(epoch, lr, result.grad_norm)
            decision = self._decide(wait=is_last)
            if self.after_step is not None:
                self.after_step(decision)
            self._at_step()
            if self.data_state is not state:
                return
            watchdog.heartbeat("waiting for data", self.step)

    def _at_step(self) -> None:
        if self.at_step is not None:
            with self.stopwatch.paused():
                self.at_step(self.step, self._phases)

    def _batches(self, epoch: _Epoch) -> Iterator[tuple[DeviceBatch, dict[str, Any]]]:
        """Yield the batches to the end of the epoch with the loader's state; the stopwatch measures waiting time."""
        options = self.options
        batches = on_device(
            self.loader.batches(epoch.end_step - self.step), options.runtime.device, options.end_of_text_id
        )
        while True:
            start = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self.stopwatch.record_step(time.perf_counter() - start)
            yield item

    def _train_step(self, batch: DeviceBatch) -> StepResult:
        stop, save = (0, 0) if self.control is None else self.control.requests()
        watchdog.heartbeat("step", self.step, extra_time_s=_COMPILE_S if self._compiles else 0.0)
        self._compiles = False
        sequence_counts = (batch.skipped, *batch.per_source)
        if self.gradient_noise is not None:
            self.gradient_noise.start(self.scaler)
        result = train_step(
            self.model,
            batch.inputs,
            batch.targets,
            self.optimizer,
            self.options,
            documents=batch.documents,
            stored=batch.stored,
            num_samples=batch.num_samples,
            counts=(stop, save, *(n if self.options.layout.contributes_sequences else 0 for n in sequence_counts)),
            scaler=self.scaler,
            should_skip=self._guard.should_skip,
            enter_phase=self._phases.enter,
        )
        if self.gradient_noise is not None:
            self.gradient_noise.finish(batch.targets, result.grad_norm, self._guard.accepted)
        self._phases.end_step()
        self._unread += torch.cat([result.samples.reshape(1), result.counts[2:]])
        return result

    def _decide(self, wait: bool) -> Decision:
        """Return the decision of all ranks, from the step results that have reached the host.

        wait: wait for all results. Raises TrainingDiverged if too many steps were skipped.
        """
        stop = save = rollback = False
        for (stops, saves, *outcome), (step, lr) in self._late.read(wait):
            stop, save = stop or stops > 0, save or saves > 0
            rollback = self._guard.handle_outcome(outcome, step, lr) or rollback
        return Decision(stop, save, rollback)

    def _averaged_losses(self, batch: DeviceBatch, valid_tokens: Tensor) -> dict[str, Tensor]:
        """Return this rank's share of the averaged models' losses on a batch, by "<averager>_loss"."""
        assert self.averagers is not None
        coefficient, count = self.options.z_loss_coefficient, self.options.accum_freq
        losses = {}
        for name, averager in self.averagers.avgs_dict.items():
            total = torch.zeros((), device=batch.inputs.device)
            documents = micro_documents(batch.documents, count)
            with averager.applied(), evaluation_mode(self.model):
                for ids, labels, _ in micro_batches(batch.inputs, batch.targets, count):
                    loss = TokenLoss(labels, coefficient)
                    total += batch_loss(self.model, ids, loss, self.options, next(documents))
            losses[f"{name}_loss"] = total / valid_tokens.clamp(min=1)
        return losses

    def _log(self, epoch: _Epoch, lr: float, grad_norm: Tensor) -> None:
        """Read the results since the last log line from the device and report them."""
        runtime = self.options.runtime
        means = self._window.pop()
        noise = {} if self.gradient_noise is None else self.gradient_noise.values()
        self._read_counts()
        seconds, num_steps = self._phases.pop(), self.stopwatch.num_steps
        phases = {f"{name}_time": value for name, value in seconds.items()}
        data_s, batch_s = self.stopwatch.pop()
        step_tokens = self.global_batch_size * self.seq_len
        mfu = None
        if self.flops_per_token and self.peak_flops:
            mfu = self.flops_per_token * step_tokens / batch_s / (self.peak_flops * runtime.world_size)
        reading = TrainLogEntry(
            epoch=epoch.number,
            samples=(self.step - epoch.first_step) * self.global_batch_size,
            epoch_samples=(epoch.end_step - epoch.first_step) * self.global_batch_size,
            loss=means.pop("loss"),
            grad_norm=float(grad_norm.item()),
            lr=lr,
            data_s=data_s,
            batch_s=batch_s,
            tokens=self.samples_seen * self.seq_len,
            step_tokens=step_tokens,
            world_size=runtime.world_size,
            memory_bytes=peak_memory_bytes(runtime.device),
            remaining_s=(self.total_steps - self.step) * batch_s,
            mfu=mfu,
            extra={**means, **noise, **self._counted(), **phases},
        )
        if runtime.is_master:
            logging.info(reading.line())
        values = {"tokens": reading.tokens, "train/epoch": epoch.number, **reading.metrics()}
        if self.rank_times is not None:
            values |= self.rank_times.exchange({"data": data_s, **seconds}, batch_s, num_steps)
        self.report(values, self.step)

    def _counted(self) -> dict[str, float]:
        """Return counts of the run so far, by name."""
        labels = short_labels(list(self.samples_per_source))
        tokens = {f"tokens/{labels[name]}": n * self.seq_len for name, n in self.samples_per_source.items()}
        return {**self._guard.counts(), "skipped_samples": self.samples_skipped, **tokens}

    def _read_counts(self) -> None:
        """Read the counts from the device, which this waits for."""
        samples, skipped, *per_source = self._unread.tolist()
        self._unread.zero_()
        self.samples_seen += samples
        self.samples_skipped += skipped
        for name, number in zip(self._sources, per_source, strict=True):
            self.samples_per_source[name] = self.samples_per_source.get(name, 0) + number
