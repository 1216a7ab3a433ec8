"""Find problems in a run: in its curves, its evaluations, its data and its log."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from open_lm.report.formats import big, duration, percent
from open_lm.report.log_file import RunLog
from open_lm.report.records import (
    ERROR,
    FAILED,
    FINISHED,
    NOTE,
    ROLLBACK,
    SKIPPED,
    WARNING,
    Problem,
    Run,
)

_WINDOW, _MIN_VALUES = 128, 16  # values before a point that define the usual level, and the minimum to define one
_SPIKE_STD, _SPIKE_SHARE = 6.0, 0.05  # a spike is this many standard deviations and this share above the level
_NORM_STD, _NORM_SHARE = 8.0, 2.0
_STALL_FACTOR, _STALL_S = 10.0, 60.0  # a stall is this many times the usual interval and this many seconds
_DATA_SHARE = 0.1  # of a step's time
_SLOWER = 0.8  # of the speed of the best quarter of the run
_DIVERGED = 1.1  # last loss relative to the lowest one
_OVERFIT = 1.01
_MIXTURE_SHARE, _MIXTURE_TOKENS = 0.01, 1000
_MAX_PASSES = 4.0
_MAX_LISTED = 5
_ORDER = (ERROR, WARNING, NOTE)


def find_problems(run: Run, log: RunLog) -> list[Problem]:
    """Return the problems of a run, the gravest first."""
    finders = (_end, _not_finite, _loss_spikes, _norm_spikes, _divergence, _stalls, _data_wait, _slowdown, _overfitting)
    curves = [problem for finder in finders for problem in finder(run, log)]
    others = [problem for finder in (_evaluations, _mixture, _files, _messages) for problem in finder(run)]
    return sorted([*curves, *others], key=lambda problem: _ORDER.index(problem.severity))


# ---------------------------------------------------------------------------------------------- the end, bad steps
def _end(run: Run, log: RunLog) -> Iterator[Problem]:
    if log.state == FAILED:
        yield Problem(
            ERROR,
            "The run ended with an error",
            _last_step(run),
            log.failure,
            "The run has no final checkpoint; correct the cause and continue with --resume latest.",
        )
    elif run.summary.state != FINISHED and not len(run.metrics) and not run.evaluations and not run.validations:
        yield Problem(
            NOTE,
            "No results yet",
            run.name,
            "the run has neither a training record nor an evaluation",
            "It has just started, or it ended before its first record: see out.log.",
        )


def _last_step(run: Run) -> str:
    return f"step {run.metrics.steps[-1]:,}" if len(run.metrics) else "before the first record"


def _not_finite(run: Run, log: RunLog) -> Iterator[Problem]:
    steps, losses = run.metrics.get("train/loss")
    broken = steps[~np.isfinite(losses)]
    skipped = run.metrics.last("train/skipped_steps")
    if len(broken) or skipped:
        events = [event for event in run.events if event.kind == SKIPPED and "not finite" in event.text]
        where = _steps([event.step for event in events] or broken.tolist())
        parts = [f"{int(skipped):,} steps were skipped"] if skipped else []
        parts += [f"{len(broken):,} records have no finite loss"] if len(broken) else []
        yield Problem(
            ERROR if len(broken) else WARNING,
            "Loss or gradient not finite",
            where,
            "; ".join(parts),
            "A skipped step leaves the weights unchanged, but repeated ones point to a learning rate that is too high, "
            "float16 without loss scaling, or broken data.",
        )
    spikes = run.metrics.last("train/spikes")
    if spikes:
        events = [event for event in run.events if event.kind == SKIPPED and "spike" in event.text]
        yield Problem(
            WARNING,
            "Steps skipped as loss spikes",
            _steps([event.step for event in events]),
            f"{int(spikes):,} steps were skipped by --skip-loss-spikes or --rollback-loss-spikes",
            "Their data were not learned. Many of them mean a threshold that is too low or an unstable training.",
        )
    rollbacks = [event for event in run.events if event.kind == ROLLBACK]
    if rollbacks:
        yield Problem(
            WARNING,
            "Rollbacks",
            _steps([event.step for event in rollbacks]),
            f"the run went back to an earlier checkpoint {len(rollbacks)} times",
            "The steps since that checkpoint were lost, and their data skipped.",
        )


# ---------------------------------------------------------------------------------------------- spikes
def find_spikes(values: np.ndarray, num_std: float = _SPIKE_STD, share: float = _SPIKE_SHARE) -> np.ndarray:
    """Return the positions of values that are far above those before them; one position per group of neighbors.

    A value is a spike if it exceeds the mean of the finite values among the 128 before it by `num_std` of their
    standard deviations and by `share` of the mean.
    """
    finite = np.isfinite(values)
    level = float(np.nanmean(values)) if finite.any() else 0.0
    shifted = np.where(finite, values.astype(np.float64) - level, 0.0)  # smaller numbers, so that sums stay exact
    count, total, squares = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (finite.astype(np.float64), shifted, shifted**2)
    )
    ends = np.arange(len(values))
    starts = np.maximum(ends - _WINDOW, 0)
    number = count[ends] - count[starts]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (total[ends] - total[starts]) / number
        std = np.sqrt(np.maximum((squares[ends] - squares[starts]) / number - mean**2, 0.0))
        excess = shifted - mean
        is_spike = finite & (number >= _MIN_VALUES) & (excess > num_std * std) & (excess > share * np.abs(mean + level))
    positions = np.flatnonzero(is_spike)
    if not len(positions):
        return positions
    groups = np.split(positions, np.flatnonzero(np.diff(positions) > _MIN_VALUES) + 1)
    return np.array([group[np.argmax(values[group])] for group in groups])


def _loss_spikes(run: Run, log: RunLog) -> Iterator[Problem]:
    steps, losses = run.metrics.get("train/loss")
    spikes = find_spikes(losses)
    if len(spikes):
        highest = spikes[np.argmax(losses[spikes])]
        yield Problem(
            WARNING,
            "Loss spikes",
            _steps(steps[spikes].tolist()),
            f"{len(spikes)} in {len(losses):,} records, the highest {losses[highest]:.3f} at step {steps[highest]:,}",
            "A spike that does not recover costs quality. --grad-clip-norm, a lower --lr, a longer --warmup or "
            "--rollback-loss-spikes help; check the data of these steps.",
        )


def _norm_spikes(run: Run, log: RunLog) -> Iterator[Problem]:
    steps, norms = run.metrics.get("train/grad_norm")
    spikes = find_spikes(norms, _NORM_STD, _NORM_SHARE)
    if len(spikes):
        highest = spikes[np.argmax(norms[spikes])]
        yield Problem(
            NOTE,
            "Spikes of the gradient norm",
            _steps(steps[spikes].tolist()),
            f"{len(spikes)} in {len(norms):,} records, the highest {norms[highest]:.3g} at step {steps[highest]:,}",
            "Large gradients often precede loss spikes. --grad-clip-norm limits their effect.",
        )


def _divergence(run: Run, log: RunLog) -> Iterator[Problem]:
    """Report a run that ends far above its lowest loss, both as means over a twentieth of the run."""
    steps, losses = run.metrics.get("train/loss")
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite].astype(np.float64)
    width = max(len(losses) // 20, 1)
    if len(losses) < 4 * _MIN_VALUES:
        return
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    means = (sums[width:] - sums[:-width]) / width
    lowest = int(np.argmin(means))
    if means[-1] > _DIVERGED * means[lowest]:
        yield Problem(
            ERROR,
            "The loss rose again",
            f"from step {steps[lowest + width - 1]:,} to {steps[-1]:,}",
            f"from {means[lowest]:.3f} to {means[-1]:.3f}, means over {width} records",
            "The training has diverged, or the data changed. Continue from a checkpoint before the rise with a lower "
            "--lr.",
        )


# ---------------------------------------------------------------------------------------------- speed
def find_stalls(times: np.ndarray) -> np.ndarray:
    """Return the positions of records that came much later after their predecessor than usual."""
    gaps = np.diff(times)
    known = gaps[np.isfinite(gaps)]
    if len(known) < 3:
        return np.zeros(0, dtype=np.int64)
    limit = max(_STALL_FACTOR * float(np.median(known)), _STALL_S)
    return np.flatnonzero(gaps > limit) + 1


def _stalls(run: Run, log: RunLog) -> Iterator[Problem]:
    metrics = run.metrics
    rows = metrics.metrics["train/loss"].rows if "train/loss" in metrics.metrics else np.arange(0)
    times, steps = metrics.times[rows], metrics.steps[rows]
    stalls = find_stalls(times)
    if not len(stalls):
        return
    lost = times[stalls] - times[stalls - 1]
    longest = int(np.argmax(lost))
    wall = float(np.nanmax(times) - np.nanmin(times))
    resumed = [start.step for start in run.starts if start.step is not None]
    num_starts = sum(1 for row in stalls if any(steps[row - 1] - 1 <= step < steps[row] for step in resumed))
    restarts = f"; {num_starts} of them at a restart" if num_starts else ""
    yield Problem(
        WARNING if lost.sum() > 0.05 * wall else NOTE,
        "Stalls",
        _steps(steps[stalls].tolist()),
        f"{len(stalls)} pauses of {duration(float(lost.sum()))} in total, {percent(float(lost.sum()) / wall)} of the "
        f"time; the longest took {duration(float(lost[longest]))} before step {steps[stalls[longest]]:,}{restarts}",
        "Devices are idle meanwhile: a restart, a slow save or evaluation, storage, or a rank that others wait for.",
    )


def _data_wait(run: Run, log: RunLog) -> Iterator[Problem]:
    wait, step = run.metrics.get("train/data_time")[1], run.metrics.get("train/batch_time")[1]
    if len(wait) != len(step) or len(wait) < _MIN_VALUES // 2:
        return
    share = float(np.nansum(wait[1:]) / max(np.nansum(step[1:]), 1e-9))  # the first step waits for the workers
    if share > _DATA_SHARE:
        yield Problem(
            WARNING,
            "Training waits for data",
            "the whole run",
            f"{percent(share)} of the time of the steps",
            "The devices are idle meanwhile. More --workers, larger shards or a --cache-dir help.",
        )


def _slowdown(run: Run, log: RunLog) -> Iterator[Problem]:
    steps, speeds = run.metrics.get("train/tokens_per_second")
    finite = np.isfinite(speeds)
    quarters = np.array_split(np.flatnonzero(finite)[1:], 4)
    if finite.sum() < 4 * _MIN_VALUES:
        return
    medians = [float(np.median(speeds[quarter])) for quarter in quarters]
    best = int(np.argmax(medians))
    if medians[-1] < _SLOWER * medians[best]:
        yield Problem(
            WARNING,
            "The run became slower",
            f"from step {steps[quarters[-1][0]]:,}",
            f"median of {big(medians[-1])} tokens/s in the last quarter, {big(medians[best])} in the fastest one",
            "Look for other programs on the machines, thermal limits, a slow rank, or growing evaluation times.",
        )


# ---------------------------------------------------------------------------------------------- results and data
def _overfitting(run: Run, log: RunLog) -> Iterator[Problem]:
    losses = [(validation.tokens, loss) for validation in run.validations if (loss := validation.loss) is not None]
    if len(losses) < 3:
        return
    lowest = min(losses, key=lambda item: item[1])
    tokens, last = losses[-1]
    train = run.metrics.last("train/loss")
    if last > _OVERFIT * lowest[1] and train is not None:
        yield Problem(
            WARNING,
            "The validation loss rose again",
            f"from {big(lowest[0])} to {big(tokens)} tokens" if lowest[0] and tokens else "at the end",
            f"from {lowest[1]:.4f} to {last:.4f}",
            "With a falling training loss this is overfitting: too many passes over the data. An earlier checkpoint is "
            "better.",
        )


def _evaluations(run: Run) -> Iterator[Problem]:
    for evaluation in run.evaluations:
        failed = [task for task in evaluation.tasks if task.problem]
        if failed:
            yield Problem(
                WARNING,
                "Tasks that did not run",
                evaluation.origin,
                "; ".join(f"{task.label}: {task.problem}" for task in failed[:_MAX_LISTED]),
                "Averages and aggregates leave them out.",
            )
        cut = [task for task in evaluation.tasks if task.truncated]
        if cut:
            some = [f"{task.label}: {task.truncated:,} of {task.sequences:,}" for task in cut[:_MAX_LISTED]]
            hidden = f" and {len(cut) - _MAX_LISTED} more tasks" if len(cut) > _MAX_LISTED else ""
            is_common = any(task.truncated * 20 > task.sequences for task in cut)
            yield Problem(
                WARNING if is_common else NOTE,
                "Truncated contexts",
                evaluation.origin,
                f"contexts that lost their beginning to fit the model: {'; '.join(some)}{hidden}",
                "The model did not see all examples of these prompts, so the scores may be too low.",
            )
    for validation in run.validations:
        for part in validation.sets:
            if part.loss is None:
                yield Problem(
                    ERROR,
                    "Validation loss not finite",
                    f"{part.name}, at {big(validation.tokens)} tokens" if validation.tokens else part.name,
                    "the loss is not a number",
                    "The weights of this checkpoint are damaged.",
                )


def _mixture(run: Run) -> Iterator[Problem]:
    total = sum(source.seen_tokens or 0 for source in run.sources)
    for source in run.sources:
        if source.seen_tokens is None or source.planned_share is None:
            continue
        share = source.seen_tokens / max(total, 1)
        if abs(share - source.planned_share) > _MIXTURE_SHARE and total > _MIXTURE_TOKENS * len(run.sources):
            yield Problem(
                NOTE,
                "The mixture differs from its weights",
                source.name,
                f"{percent(share)} of the tokens seen, {percent(source.planned_share)} planned",
                "A short run, changed weights, or sequences that were skipped.",
            )
        if (source.passes or 0) > _MAX_PASSES:
            yield Problem(
                NOTE,
                "Data repeated many times",
                source.name,
                f"{source.passes:.1f} passes over {big(source.stored_tokens)} tokens",
                "After about 4 passes, further ones add little (Muennighoff et al. 2023, arXiv:2305.16264).",
            )
    skipped = run.metrics.last("train/skipped_samples")
    if skipped:
        yield Problem(
            WARNING,
            "Unusable sequences",
            "training data",
            f"{int(skipped):,} sequences were too short or broken and replaced by masked ones",
            "Their places in the batches trained nothing.",
        )


def _files(run: Run) -> Iterator[Problem]:
    if run.metrics.num_damaged:
        yield Problem(
            WARNING,
            "Damaged lines",
            "metrics.jsonl",
            f"{run.metrics.num_damaged:,} lines are not in the expected format and left out",
            "A killed process can leave one incomplete line; more of them mean a damaged disk or two writers.",
        )
    broken = [checkpoint.name for checkpoint in run.checkpoints if not checkpoint.is_complete]
    if broken:
        yield Problem(
            NOTE,
            "Incomplete checkpoints",
            "checkpoints/",
            ", ".join(broken[:_MAX_LISTED])
            + (f" and {len(broken) - _MAX_LISTED} more" if len(broken) > _MAX_LISTED else ""),
            "A save was interrupted, or is in progress. The run resumes from an earlier one.",
        )


def _messages(run: Run) -> Iterator[Problem]:
    errors = [message for message in run.messages if message.level in ("ERROR", "CRITICAL")]
    for message in errors[:_MAX_LISTED]:
        yield Problem(ERROR, "Error in the log", message.time, message.text, "See out.log around this time.")
    truncated = [message for message in run.messages if "contexts are truncated" in message.text]
    for message in truncated[:_MAX_LISTED]:
        yield Problem(
            NOTE,
            "Truncated contexts",
            "evaluation during the training",
            message.text,
            "The model did not see all examples of these prompts, so the score may be too low.",
        )


def _steps(steps: list[int]) -> str:
    """Return steps as text: all of a few, else the first ones and the range."""
    steps = sorted(dict.fromkeys(steps))
    if not steps:
        return "steps unknown"
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    listed = ", ".join(f"{step:,}" for step in steps[:_MAX_LISTED])
    return f"steps {listed}" + (
        f" and {len(steps) - _MAX_LISTED} more up to {steps[-1]:,}" if len(steps) > _MAX_LISTED else ""
    )
