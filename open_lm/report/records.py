"""What a report knows of a run, as plain data. `collect` fills these classes; nothing here reads files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ERROR, WARNING, NOTE = "error", "warning", "note"  # severities of problems
SKIPPED, RESTART, ROLLBACK = "skipped", "restart", "rollback"  # kinds of events
FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"  # states of a run

SETTINGS_OF_A_PROCESS = frozenset({
    "resume", "rank", "local_rank", "log_path", "checkpoint_path", "failed_checkpoint_path", "tensorboard_path",
    "log_level", "name", "logs", "config", "tensorboard", "wandb",
})  # fmt: skip
"""Settings that differ between processes or runs without a meaning for the results."""


@dataclass
class Metric:
    """The values of a metric: line numbers (n,) int32 in metrics.jsonl, ascending, and values (n,) float32.

    A value that is not finite is NaN.
    """

    rows: np.ndarray
    values: np.ndarray


@dataclass
class Metrics:
    """The lines of metrics.jsonl, or of out.log of the original OpenLM, in the order of their steps.

    Attributes:
        steps: step of each line (n,) int64, ascending.
        times: time of each line (n,) float64, seconds since the epoch; NaN where unknown.
        tokens: tokens seen at each line (n,) float64; NaN where unknown.
        metrics: the metrics by name.
        num_damaged: lines that could not be read.
    """

    steps: np.ndarray
    times: np.ndarray
    tokens: np.ndarray
    metrics: dict[str, Metric] = field(default_factory=dict)
    num_damaged: int = 0

    @classmethod
    def empty(cls) -> Metrics:
        return cls(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps int64 and the values float32 of a metric, empty if it was not logged."""
        metric = self.metrics.get(name)
        if metric is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return self.steps[metric.rows], metric.values

    def last(self, name: str) -> float | None:
        """Return the last finite value of a metric, or None."""
        values = self.get(name)[1]
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def median(self, name: str) -> float | None:
        """Return the median of the finite values of a metric, or None."""
        values = self.get(name)[1]
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None


@dataclass(frozen=True)
class Event:
    """Something that happened at a step: its kind, and a sentence about it."""

    step: int
    kind: str
    text: str


@dataclass
class Start:
    """A start of the run: the first one, or a resumption.

    Attributes:
        time: when, as out.log has it.
        settings: the settings of this start as texts, by name.
        step: the step from which it continued; None if the log does not say.
    """

    time: str
    settings: dict[str, str] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True)
class SettingChange:
    """A setting with different values: one per start of a run, or one per run."""

    name: str
    values: tuple[str, ...]


@dataclass
class LogMessage:
    """A warning or an error of out.log, how often it occurred (with other numbers), and when it did first."""

    level: str
    text: str
    time: str
    count: int = 1


@dataclass(frozen=True)
class ValidationSet:
    """The loss of one validation set.

    Attributes:
        name: name of the set, or of its shards.
        loss: nats per token; None if it was not finite.
        interval: 95 % interval of the loss, or None.
        tokens: tokens of the set.
        bits_per_byte: bits per byte of text, or None.
        bytes: bytes of its text, or None.
    """

    name: str
    loss: float | None
    interval: tuple[float, float] | None
    tokens: int
    bits_per_byte: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Validation:
    """One validation, after `tokens` tokens of training; None if unknown."""

    tokens: int | None
    sets: tuple[ValidationSet, ...]
    checkpoint: str | None = None
    average: str | None = None

    @property
    def loss(self) -> float | None:
        """The mean over the tokens of all sets; None if a loss is missing."""
        total = sum(part.tokens for part in self.sets)
        if not total or any(part.loss is None for part in self.sets):
            return None
        return sum((part.loss or 0.0) * part.tokens for part in self.sets) / total


@dataclass(frozen=True)
class TaskScore:
    """The score of a task of in-context learning, from 0 to 1; see `open_lm.evaluate.icl.metrics.Outcome`."""

    task: str
    shots: int
    metric: str
    score: float | None
    baseline: float
    n: int
    interval: tuple[float, float] | None = None
    truncated: int = 0
    sequences: int = 0
    problem: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.shots

    @property
    def label(self) -> str:
        return f"{self.task} {self.shots}-shot"

    @property
    def centered(self) -> float | None:
        """(score - baseline) / (1 - baseline), or None without a score."""
        return None if self.score is None else (self.score - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class TaskEvaluation:
    """The tasks of one checkpoint.

    Attributes:
        origin: the file with the results: icl.jsonl for evaluations during the training, else evals/NAME.json.
        engine: what computed them: "native", "llm-foundry" or "lm-eval".
        aggregates: the available aggregate scores by title.
        examples_per_task: limit on the examples of a task, or None.
    """

    origin: str
    step: int | None
    tokens: int | None
    checkpoint: str | None
    tasks: tuple[TaskScore, ...]
    average: float | None
    centered_average: float | None
    engine: str = "native"
    aggregates: Mapping[str, float] = field(default_factory=dict)
    examples_per_task: int | None = None

    @property
    def is_live(self) -> bool:
        """Whether it was made during the training."""
        return self.origin == "icl.jsonl"


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation by the model after `step` steps."""

    step: int
    tokens: int | None
    number: int
    temperature: float
    prompt: str
    text: str


@dataclass(frozen=True)
class MixtureSource:
    """A source of the training data.

    Attributes:
        name: as the run names it.
        planned_share: share of the sequences that the weights request; None if unknown.
        seen_tokens: tokens that the run has trained on; None if unknown.
        stored_tokens: tokens of one pass; None if unknown.
        label: its name in metrics: train/tokens/LABEL.
        fingerprint: digest of the shards.
        datasets: the content of the dataset.json of its folders: settings, digests.
        parts: tokens of each source that was preprocessed to its folders, by name; empty if it is only one.
    """

    name: str
    planned_share: float | None
    seen_tokens: int | None
    stored_tokens: int | None
    label: str = ""
    fingerprint: str = ""
    num_shards: int = 0
    datasets: tuple[Mapping[str, Any], ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def passes(self) -> float | None:
        """How often the run has read the source; None if unknown."""
        return self.seen_tokens / self.stored_tokens if self.seen_tokens is not None and self.stored_tokens else None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the folder of the run. `modified` is the time of the file in seconds since the epoch."""

    name: str
    num_bytes: int
    modified: float | None
    is_complete: bool = True


@dataclass(frozen=True)
class Energy:
    """The energy of a run: how it was determined, whether it is an "estimate", and what is "missing" in it."""

    kwh: float
    method: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A problem of a run.

    Attributes:
        severity: ERROR, WARNING or NOTE.
        title: what was found.
        where: steps, tokens, task or file.
        detail: numbers.
        why: why it matters and what to do.
    """

    severity: str
    title: str
    where: str
    detail: str
    why: str


@dataclass
class Summary:
    """The main numbers of a run; None where it does not record them.

    Attributes:
        state: FINISHED, STOPPED (by a signal), FAILED or UNFINISHED.
        model: name of the model.
        parameters: trained parameters.
        step, planned_steps: optimizer steps done and planned.
        tokens, planned_tokens: tokens seen and planned.
        first_loss, last_loss: training loss of the first record, and mean of the last records, nats per token.
        validation: the last validation.
        tokens_per_second, mfu: medians over the run; MFU is a fraction of 1.
        peak_memory_bytes: the largest peak of a device, or of the process on CPU.
        wall_s: seconds from the first to the last record.
        flops, flops_method: floating point operations of the training, and how they were determined.
        devices: number and kind of devices.
        energy: energy of the run.
    """

    state: str = UNFINISHED
    model: str = ""
    parameters: int | None = None
    step: int | None = None
    planned_steps: int | None = None
    tokens: int | None = None
    planned_tokens: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    validation: Validation | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory_bytes: float | None = None
    wall_s: float | None = None
    flops: float | None = None
    flops_method: str = ""
    devices: str = ""
    energy: Energy | None = None


@dataclass
class Run:
    """Everything that a report shows of a run.

    Attributes:
        url: folder or URL of the run.
        name: its name, unique among the runs of the report.
        settings: the settings of params.txt as texts.
        architecture: content of model.json.
        changes: settings that changed between its starts.
        environment: content of environment.json: package versions, devices, code.
        code_sha256: digest of the copy of the source in code/, or None.
        files: the files of the run that the report has read.
    """

    url: str
    name: str
    summary: Summary = field(default_factory=Summary)
    settings: dict[str, str] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics.empty)
    events: list[Event] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    changes: list[SettingChange] = field(default_factory=list)
    messages: list[LogMessage] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    evaluations: list[TaskEvaluation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sources: list[MixtureSource] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    code_sha256: str | None = None
    problems: list[Problem] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def loss_unit(self) -> str:
        """The unit of the training loss: none if it is that of preferences or rewards."""
        return "" if {"train/margin", "train/reward"} & self.metrics.metrics.keys() else "nats per token"

    @property
    def environment_starts(self) -> list[dict[str, Any]]:
        """The records of environment.json, one per start of the run."""
        starts = self.environment.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
