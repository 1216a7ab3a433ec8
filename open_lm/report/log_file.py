"""Read out.log: starts of the run and their settings, skipped steps, rollbacks, warnings, and how the run ended.

The original OpenLM writes no metrics.jsonl; its curves come from the lines "Train Epoch: ..." of this file.
"""

from __future__ import annotations

import calendar
import re
import time
from dataclasses import dataclass, field

from open_lm.report.metrics_file import MetricColumns, open_lines
from open_lm.report.records import (
    FAILED,
    FINISHED,
    RESTART,
    ROLLBACK,
    SKIPPED,
    STOPPED,
    UNFINISHED,
    Event,
    LogMessage,
    Metrics,
    Start,
)

_LINE = re.compile(r"(\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d) \| (\w+) \| (.*)")
_TRAIN = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[ *(?P<samples>\d+)/(?P<total>\d+) .*?Loss: (?P<loss>\S+) Data \(t\): (?P<data>\S+) "
    r"Batch \(t\): (?P<batch>[\d.]+), (?P<speed>[\d.e+]+)/s.*? LR: (?P<lr>[\d.e+-]+)"
    r"(?: Grad norm: (?P<norm>\S+))?(?: Tokens: (?P<tokens>\d+))?"
)
_SETTING = re.compile(r"  (\w+): (.*)")
_PLAN = re.compile(r"(\d+) steps of (\d+) tokens, (\d+) in total")
_PARAMETERS = re.compile(r"Model \(has (\d+) parameters\)|([\d,]+) trained parameters")
_PEAK = re.compile(r"MFU is relative to (\d+) GFLOP/s")
_DEVICE = re.compile(r"Running (?:with a single process|in distributed mode).*Device:? (\S+?)\.(?:\s|$)")
_TOTAL = re.compile(r"total (\d+)")
_LOADED = re.compile(r"^(?:loaded|=> resuming).*\(epoch \d+(?:, step (\d+))?\)")
_SKIPPED = re.compile(r"step (\d+) is (not finite|a spike) and was skipped.*")
_ROLLBACK = re.compile(r"loss spike at step (\d+): rolled back to the state of step (\d+).*")
_SIGNAL = re.compile(r"stopped by a signal after step (\d+)|stopped at step (\d+); continue with --resume")
_END = re.compile(r"Ending training\.|ending training\.|^saved \S+ and \S+checkpoints$")
_FAILED = "the run ended early: "
_MAX_MESSAGES, _MAX_EVENTS = 200, 2000


@dataclass
class RunLog:
    """What out.log says.

    Attributes:
        state: FINISHED, STOPPED, FAILED or UNFINISHED.
        failure: the error that ended the run.
        parameters: trained parameters; None if the log does not say.
        planned_steps, planned_tokens: length of the run.
        peak_flops: FLOP/s of a device to which MFU is relative.
        device, world_size: device of rank 0, number of ranks.
        metrics: the curves of a run without metrics.jsonl.
    """

    state: str = UNFINISHED
    failure: str = ""
    parameters: int | None = None
    planned_steps: int | None = None
    planned_tokens: int | None = None
    peak_flops: float | None = None
    device: str = ""
    world_size: int = 1
    starts: list[Start] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    messages: list[LogMessage] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics.empty)


def read_log(url: str, with_metrics: bool) -> RunLog:
    """Read an out.log.

    Args:
        url: path or URL of the file.
        with_metrics: whether to read the curves as well.

    Raises:
        StorageError: the file cannot be read.
    """
    reader = _Reader(with_metrics)
    with open_lines(url) as file:
        for line in file:
            reader.add(line)
    return reader.finish()


class _Reader:
    def __init__(self, with_metrics: bool) -> None:
        self.log = RunLog()
        self._with_metrics = with_metrics
        self._in_settings = False
        self._messages: dict[str, LogMessage] = {}
        self._records: list[dict[str, float | int | None]] = []
        self._offset = _Offset()

    def add(self, raw: bytes) -> None:
        """Read a line."""
        if b"| Train Epoch: " in raw:
            if self._with_metrics:
                self._add_train_line(raw.decode("utf-8", errors="replace"))
            return
        match = _LINE.match(raw.decode("utf-8", errors="replace").rstrip("\n"))
        if match is None:
            return
        when, level, message = match.groups()
        if self._in_settings and (setting := _SETTING.fullmatch(message)):
            self.log.starts[-1].settings[setting[1]] = setting[2]
            return
        self._in_settings = message == "Params:" and bool(self.log.starts)
        self._add_message(when, level, message)

    def _add_message(self, when: str, level: str, message: str) -> None:
        log = self.log
        if device := _DEVICE.match(message):
            log.starts.append(Start(when))
            log.state, log.failure, log.device = UNFINISHED, "", device[1]
            log.world_size = int(total[1]) if (total := _TOTAL.search(message)) else 1
        elif plan := _PLAN.match(message):
            log.planned_steps, log.planned_tokens = int(plan[1]), int(plan[3])
        elif parameters := _PARAMETERS.match(message):
            log.parameters = int((parameters[1] or parameters[2]).replace(",", ""))
        elif peak := _PEAK.match(message):
            log.peak_flops = int(peak[1]) * 1e9
        elif loaded := _LOADED.match(message):
            self._resume(loaded[1])
        elif _END.search(message):
            log.state = FINISHED
            return
        elif signal := _SIGNAL.search(message):
            log.state = STOPPED
            log.events.append(Event(int(signal[1] or signal[2]), RESTART, f"stopped by a signal ({when})"))
        elif message.startswith(_FAILED):
            log.state, log.failure = FAILED, message.removeprefix(_FAILED)
            return
        elif self._add_event(message):
            return
        if level in ("WARNING", "ERROR", "CRITICAL"):
            self._count(when, level, message)

    def _resume(self, step: str | None) -> None:
        if self.log.starts and step is not None:
            start = self.log.starts[-1]
            start.step = int(step)
            if len(self.log.starts) > 1:
                self.log.events.append(Event(start.step, RESTART, f"resumed from step {start.step} ({start.time})"))

    def _add_event(self, message: str) -> bool:
        """Record a skipped step or a rollback; return whether it was one."""
        skipped, rollback = _SKIPPED.match(message), _ROLLBACK.match(message)
        if len(self.log.events) < _MAX_EVENTS:
            if skipped:
                self.log.events.append(Event(int(skipped[1]), SKIPPED, message))
            if rollback:
                self.log.events.append(Event(int(rollback[2]), ROLLBACK, message))
        return bool(skipped or rollback)

    def _count(self, when: str, level: str, message: str) -> None:
        """Add a warning or an error; those that differ in numbers only are one."""
        key = re.sub(r"\d+", "0", message)
        if key in self._messages:
            self._messages[key].count += 1
        elif len(self._messages) < _MAX_MESSAGES:
            self._messages[key] = LogMessage(level, message, when)

    def _add_train_line(self, line: str) -> None:
        match, head = _TRAIN.search(line), _LINE.match(line)
        if match is None or head is None:
            return
        settings = self.log.starts[-1].settings if self.log.starts else {}
        step, tokens = self._offset.position(match, settings)
        if match["tokens"]:
            tokens = int(match["tokens"])
        seconds = calendar.timegm(time.strptime(head[1], "%Y-%m-%d,%H:%M:%S"))  # only differences are used
        self._records.append({
            "step": step, "time": float(seconds), "tokens": tokens, "train/loss": _number(match["loss"]),
            "train/data_time": _number(match["data"]), "train/batch_time": _number(match["batch"]),
            "train/tokens_per_second": _number(match["speed"]), "train/lr": _number(match["lr"]),
            **({"train/grad_norm": _number(match["norm"])} if match["norm"] else {}),
        })  # fmt: skip

    def finish(self) -> RunLog:
        self.log.messages = list(self._messages.values())
        if self._records:
            columns = MetricColumns()
            columns.add_records(self._without_repeated_steps())
            self.log.metrics = columns.finish()
        return self.log

    def _without_repeated_steps(self) -> list[dict[str, float | int | None]]:
        """Return the records without those that a later start has trained again."""
        kept: list[dict[str, float | int | None]] = []
        for record in self._records:
            while kept and (kept[-1]["step"] or 0) >= (record["step"] or 0):
                kept.pop()
            kept.append(record)
        return kept


class _Offset:
    """Converts the samples of an epoch in a line of the log to steps and tokens of the run.

    The number of steps of earlier epochs is known from their lines.
    """

    def __init__(self) -> None:
        self._epoch_steps: dict[int, int] = {}

    def position(self, match: re.Match[str], settings: dict[str, str]) -> tuple[int, int | None]:
        """Return the step, counted from 1, and the tokens; None without the settings of the run."""
        batch = _integer(settings.get("global_batch_size")) or 1
        epoch = int(match["epoch"])
        self._epoch_steps[epoch] = -(-int(match["total"]) // batch)
        before = sum(self._epoch_steps.get(number, self._epoch_steps[epoch]) for number in range(epoch))
        step = before + -(-int(match["samples"]) // batch)
        seq_len = _integer(settings.get("seq_len"))
        return step, None if seq_len is None else step * batch * seq_len


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
