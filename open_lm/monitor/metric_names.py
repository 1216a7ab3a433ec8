"""The names of all metrics with their units and meanings: in metrics.jsonl, TensorBoard, Weights & Biases and trackio.

The part before the first slash groups the metrics in all of them. Imports no torch.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

FRACTION = "fraction"  # unit of numbers between 0 and 1


@dataclass(frozen=True)
class Metric:
    """A metric. `name` may have parts in braces, such as {task}; `unit` is "" for a plain number."""

    name: str
    unit: str
    description: str


_TRAINING = (
    Metric("tokens", "tokens", "tokens trained on, without filler sequences"),
    Metric("train/loss", "nats/token", "training loss, mean over the steps since the last line"),
    Metric("train/ce_loss", "nats/token", "with distillation, the cross entropy in the loss"),
    Metric("train/distill_loss", "nats/token", "with distillation, the divergence from the teacher"),
    Metric("train/load_balancing_loss", "", "mixture of experts: load-balancing loss"),
    Metric("train/{averager}_loss", "nats/token", "training loss of averaged weights"),
    Metric("train/logit_mean", "", "mean of the logits (--log-logit-mean)"),
    Metric("train/lr", "", "learning rate of the last step"),
    Metric("train/grad_norm", "", "norm of the gradient of the last step, before clipping"),
    Metric(
        "train/gradient_noise_scale",
        "sequences",
        "batch size at which the noise of the gradient equals its norm (--log-gradient-noise)",
    ),
    Metric("train/gradient_noise_scale_tokens", "tokens", "the same in tokens"),
    Metric("train/gradient_squared_norm", "", "squared norm of the gradient without noise"),
    Metric("train/gradient_variance", "", "trace of the covariance of the gradient of a token"),
    Metric("train/global_batch_size", "sequences", "sequences per step, next to the noise scale"),
    Metric("train/skipped_steps", "steps", "steps skipped because loss or gradient was not finite, so far"),
    Metric("train/spikes", "steps", "steps skipped because of a loss spike, so far"),
    Metric("train/skipped_samples", "sequences", "filler sequences in place of unusable ones, so far"),
    Metric("train/epoch", "epochs", "number of the epoch, from 0"),
    Metric("train/epochs_done", "epochs", "completed epochs"),
    Metric("train/percentage_of_data_seen", FRACTION, "share of the epoch's sequences that held data"),
    Metric("train/tokens", "tokens", "same as tokens"),
    Metric("train/tokens/{source}", "tokens", "tokens trained on of each source"),
    Metric("epoch", "epochs", "preference training: passes over the data so far"),
)
_SPEED = (
    Metric("train/batch_time", "s", "duration of a step"),
    Metric("train/data_time", "s", "part of a step in which the host waits for data"),
    Metric("train/inputs_time", "s", "preference training: preparation of a batch; in GRPO with sampling and rewards"),
    Metric("train/sums_time", "s", "part of a step for sums over ranks, with waiting for slower ranks"),
    Metric("train/forward_time", "s", "part of a step for the forward pass"),
    Metric("train/backward_time", "s", "part of a step for the backward pass"),
    Metric("train/optimizer_time", "s", "part of a step for clipping and the optimizer"),
    Metric("train/tokens_per_second", "tokens/s", "speed of all devices together"),
    Metric("train/samples_per_second", "tokens/s", "same as train/tokens_per_second; the name is that of the original"),
    Metric("train/samples_per_second_per_gpu", "tokens/s", "speed per device"),
    Metric("train/mfu", FRACTION, "model FLOPs relative to the peak of the devices"),
    Metric("train/peak_memory_bytes", "bytes", "peak memory of rank 0's device so far; on a CPU of its process"),
    Metric("perf/slowest_rank", "", "rank with the longest own time (data, forward, optimizer) per step"),
    Metric("perf/slowest_rank_time", "s", "own time of that rank per step"),
    Metric("perf/median_rank_time", "s", "median of the own times of all ranks per step"),
    Metric("energy/kwh", "kWh", "energy of all ranks and starts of the run so far; environment.json has the method"),
    Metric("{evaluation}/time_share", FRACTION, "share of the time since the start that val, icl or samples took"),
)
_EVALUATION = (
    Metric("val/loss", "nats/token", "validation loss over the tokens of all sets"),
    Metric("val/{set}/loss", "nats/token", "validation loss of a set"),
    Metric("val/bits_per_byte", "bits/byte", "validation loss per byte of text"),
    Metric("val/{set}/bits_per_byte", "bits/byte", "validation loss of a set per byte of text"),
    Metric("val/tokens", "tokens", "tokens with a validation loss"),
    Metric("val/{value}", "", "further values of a validation in results.jsonl"),
    Metric("val/{set}/{value}", "", "further values of a validation set in results.jsonl"),
    Metric("icl/{task}_{shots}shot", "", "score of a task with that number of examples in the prompt"),
    Metric("icl/average", "", "mean of the scores of all tasks"),
    Metric("icl/centered_average", "", "mean of (score - baseline) / (1 - baseline)"),
    Metric("icl/examples", "examples", "number of examples of the evaluation"),
)
_PREFERENCES = (
    Metric("train/margin", "", "difference of the rewards of chosen and rejected answers"),
    Metric("train/accuracy", FRACTION, "share of pairs in which the chosen answer has the higher reward"),
    Metric("train/reward", "", "mean reward of the completions"),
    Metric("train/reward/{function}", "", "mean reward of each reward function"),
    Metric("train/reward_{answer}", "", "implicit reward of chosen or rejected answers"),
    Metric("train/logp_{answer}", "nats", "log probability of chosen or rejected answers"),
    Metric("train/kl", "nats/token", "divergence from the reference model"),
    Metric("train/entropy", "nats/token", "entropy of the predicted distribution"),
    Metric("train/completion_tokens", "tokens", "mean length of the completions"),
    Metric("train/completions_cut", FRACTION, "share of completions that reached the maximum length"),
    Metric("train/{value}", "", "further values of the trainer of TRL"),
)
METRICS = (*_TRAINING, *_SPEED, *_PREFERENCES, *_EVALUATION)


def metric(name: str) -> Metric | None:
    """Return the metric of a name as logged, such as icl/arc_easy_0shot; None if there is none.

    A name without placeholders takes precedence, then the first entry that matches. Values of an evaluation during
    preference training have the names of training values, with val/ in place of train/.
    """
    exact = _exact().get(name)
    if exact is not None:
        return exact
    return next((entry for entry in METRICS if "{" in entry.name and _pattern(entry.name).fullmatch(name)), None)


@functools.cache
def _exact() -> dict[str, Metric]:
    return {entry.name: entry for entry in METRICS if "{" not in entry.name}


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", name)
    return re.compile("[^/]+".join(map(re.escape, parts)))
