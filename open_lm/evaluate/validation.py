"""Validation: the exact mean loss of validation sets over all ranks, with bootstrap intervals.

Legend: B sequences of this rank's batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import LoggingConfig, ValidationConfig
from open_lm.data.device import on_device
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.validation_loader import ValLoader
from open_lm.distributed.param_names import clean_name
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, broadcast_object, sum_over_ranks
from open_lm.errors import ConfigError
from open_lm.evaluate.intervals import LossHistogram, bootstrap_interval
from open_lm.model.losses import ForwardOptions, TokenLoss, batch_loss
from open_lm.monitor.watchdog import heartbeat
from open_lm.optim.adamw import local_tensor
from open_lm.parallel.parallelize import evaluation_mode, unwrap
from open_lm.system.names import set_name

NO_INTERVAL = (-1.0, -1.0)
_PROGRESS_S = 30.0  # log the progress after this time, also between two lines of --log-every-n-steps


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of a validation.

    `train_tokens` is the number of tokens trained on so far, None if unknown. With `end_of_text_id`, attention stays
    inside documents, which end with this id; with None it covers full sequences. `token_bytes` (V,) int64 on the device
    has the bytes of text of each token, for bits per byte; None if they are unknown.
    """

    runtime: Runtime
    layout: MeshLayout
    autocast: Callable[[], AbstractContextManager[object]]
    cfg: ValidationConfig
    model_name: str
    checkpoint_path: str | None = None
    train_tokens: int | None = None
    log_every: int = 100
    end_of_text_id: int | None = None
    token_bytes: Tensor | None = None


def evaluate_sets(model: nn.Module, loaders: Sequence[ValLoader], options: EvaluationOptions) -> list[dict[str, Any]]:
    """Evaluate the model on each validation set; return one result per set, equal on all ranks. Collective.

    A result is an entry of a line of results.jsonl. `loss` is the mean over the valid tokens of all ranks, without
    filler sequences and masked targets; `tokens` and `sequences` are the numbers of valid ones. `samples_per_second`
    counts tokens, as in existing results. `max_batches` is in the result of a set that --val-max-batches has cut, and
    `name` in those of sets with names. If the bytes of tokens are known, `bits_per_byte` is the mean loss of the tokens
    that encode text, in bits per byte of this text, and `bytes` the number of bytes.
    """
    results = []
    names: Sequence[str | None] = options.cfg.val_names or [None] * len(loaders)
    for number, loader in enumerate(loaders, start=1):
        if options.runtime.is_master:
            logging.info(_announcement(loader, number, len(loaders)))
        with evaluation_mode(model):
            result = _evaluate_set(model, loader, options)
        if names[number - 1] is not None:
            result["name"] = names[number - 1]
        if options.train_tokens is not None:
            result["train_tokens"] = options.train_tokens
        result["checkpoint_path"] = options.checkpoint_path
        result["val_data"] = list(loader.val_data)
        result["model"] = options.model_name
        results.append(result)
    if options.runtime.is_master and len(results) > 1:
        logging.info("Validation sets:\n" + format_sets(results))
    return results


def validation_metrics(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a validation: val/loss over the tokens of all sets, and the values of each set.

    With several sets, the values of each are named val/<name>/<key>, with --val-names or the name of its shards.
    """
    metrics: dict[str, float] = {}
    tokens = sum(result["tokens"] for result in results)
    if tokens:
        loss = sum(result["loss"] * result["tokens"] for result in results if result["tokens"]) / tokens
        metrics |= {"val/loss": loss, "val/tokens": tokens}
    for index, result in enumerate(results):
        stem = result.get("name") or set_name(result["val_data"]) or str(index)
        prefix = "val" if len(results) == 1 else f"val/{stem}"
        if len(results) > 1 and f"{prefix}/loss" in metrics:
            prefix = f"{prefix}-{index}"  # an earlier set has shards of the same name
        values = {key: value for key, value in result.items() if isinstance(value, int | float) and value != -1.0}
        metrics |= {f"{prefix}/{key}": value for key, value in values.items() if key != "train_tokens"}
    return metrics


class _SetRow(NamedTuple):
    """A line of the table of validation sets."""

    name: str
    tokens: int
    loss: float
    bits_per_byte: float
    num_bytes: int


def format_sets(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line per validation set, and the means over all tokens and over the sets."""
    rows = []
    for number, result in enumerate(results):
        name = result.get("name") or set_name(result["val_data"]) or str(number)
        bits, num_bytes = result.get("bits_per_byte", math.nan), result.get("bytes", 0)
        rows.append(_SetRow(name, result["tokens"], result["loss"], bits, num_bytes))
    valid = [row for row in rows if row.tokens]
    has_bytes = all(row.num_bytes for row in valid)
    if valid:
        tokens, num_bytes = sum(row.tokens for row in valid), sum(row.num_bytes for row in valid)
        loss = sum(row.loss * row.tokens for row in valid) / tokens
        bits = sum(row.bits_per_byte * row.num_bytes for row in valid) / num_bytes if has_bytes else math.nan
        rows.append(_SetRow("all tokens", tokens, loss, bits, num_bytes))
        loss, bits = sum(row.loss for row in valid), sum(row.bits_per_byte for row in valid)
        rows.append(_SetRow("mean of the sets", tokens, loss / len(valid), bits / len(valid), num_bytes))
    width = max(len(row.name) for row in rows)
    lines = [f"{'set':<{width}}  {'tokens':>13}  {'loss':>9}  {'perplexity':>10}" + "  bits per byte" * has_bytes]
    for row in rows:
        line = f"{row.name:<{width}}  {row.tokens:>13,}  {row.loss:>9.6f}  {_perplexity(row.loss):>10.4g}"
        lines.append(line + (f"  {row.bits_per_byte:>13.5f}" if has_bytes else ""))
    return "\n".join(lines)


def loss_problems(results: Sequence[dict[str, Any]]) -> list[str]:
    """Describe the validation sets whose loss is not a finite number."""
    problems = []
    for result in results:
        name = f"validation on {' '.join(result['val_data'])}"
        if not result["tokens"]:
            problems.append(f"{name}: no token has a loss, because all targets are masked, padded or unreadable")
        elif not math.isfinite(result["loss"]):
            problems.append(f"{name}: the loss is {result['loss']}, not a finite number")
    return problems


def non_finite_weights(model: nn.Module) -> list[str]:
    """Describe the weights that have values which are not finite, on any rank. Collective."""
    params = dict(unwrap(model).named_parameters())
    flags = [~local_tensor(param).detach().isfinite().all() for param in params.values()]
    counts = sum_over_ranks(torch.stack(flags).to(torch.float64)).tolist()
    names = [clean_name(name) for name, count in zip(params, counts, strict=True) if count]
    return [f"{len(names)} of {len(params)} weights are not finite, such as {names[0]}"] if names else []


def evaluate_loop(
    model: nn.Module, val_list: Sequence[Any], epoch: int, args: Any, writer: Any = None
) -> list[dict[str, Any]]:
    """Call `evaluate_sets` with the interface of the original OpenLM: `val_list` from get_data and a flat `args`.

    Args:
        args: device, rank, world_size, precision, the validation flags, document_mask and end_of_text_id; missing ones
            have defaults. Here train_num_samples counts sequences.
        writer: None, or an object with add_scalar(name, value, step).

    Raises:
        ConfigError: document_mask is set without end_of_text_id.
    """
    device = torch.device(getattr(args, "device", None) or next(model.parameters()).device)
    runtime = Runtime(rank=getattr(args, "rank", 0), world_size=getattr(args, "world_size", 1) or 1, device=device)
    samples, seq_len = getattr(args, "train_num_samples", None), getattr(args, "seq_len", None)
    end_of_text_id = getattr(args, "end_of_text_id", None) if getattr(args, "document_mask", False) else None
    if getattr(args, "document_mask", False) and end_of_text_id is None:
        raise ConfigError("document_mask is set without end_of_text_id: set it to the token id that ends a document")
    options = EvaluationOptions(
        runtime=runtime,
        layout=MeshLayout(replicate=runtime.world_size, rank=runtime.rank),
        autocast=get_autocast(getattr(args, "precision", "fp32"), device.type),
        cfg=ValidationConfig.from_object(args),
        model_name=getattr(args, "hf_model", None) or getattr(args, "model", None) or type(model).__name__,
        checkpoint_path=getattr(args, "resume", None),
        train_tokens=epoch * samples * seq_len if samples is not None and seq_len else None,
        log_every=LoggingConfig.from_object(args).log_every_n_steps,
        end_of_text_id=end_of_text_id,
    )
    results = evaluate_sets(model, [getattr(item, "loader", item) for item in val_list], options)
    for result in results:
        for name, value in result.items():
            if writer is not None and isinstance(value, int | float):
                writer.add_scalar(f"valid/{name}", value, epoch)
    return results


class _LossSamples:
    """The losses of this rank's sequences and tokens, for the intervals that the settings request."""

    def __init__(self, cfg: ValidationConfig, device: torch.device) -> None:
        self.sequences = LossHistogram(device) if cfg.val_seq_ci else None
        self.tokens = LossHistogram(device) if cfg.val_tok_ci else None

    def add(self, losses: Tensor, valid: Tensor) -> None:
        """Add the losses (B,T) float32 of a batch and their validity (B,T) bool."""
        if self.sequences is not None:
            counts = valid.sum(1)
            self.sequences.add((losses * valid).sum(1) / counts.clamp(min=1), counts > 0)
        if self.tokens is not None:
            self.tokens.add(losses, valid)


def _evaluate_set(model: nn.Module, loader: ValLoader, options: EvaluationOptions) -> dict[str, Any]:
    runtime, cfg = options.runtime, options.cfg
    # loss, tokens, sequences; loss and bytes of the tokens that encode text
    totals = torch.zeros(5, dtype=torch.float64, device=runtime.device)
    samples = _LossSamples(cfg, runtime.device)
    data_s, steps, positions, start = 0.0, 0, 0, time.perf_counter()
    waiting_since = logged_at = start
    batches = on_device(((batch, None) for batch in loader), runtime.device, options.end_of_text_id)
    for index, (batch, _) in enumerate(batches):
        data_s += time.perf_counter() - waiting_since
        heartbeat("validating")
        targets = batch.targets
        losses = token_losses(model, batch.inputs, targets, options, batch.documents)
        valid = (targets != IGNORE_INDEX) & options.layout.contributes_sequences
        sums = [(losses * valid).sum(dtype=torch.float64), valid.sum(), valid.any(1).sum()]
        sums += _text_sums(losses, valid, targets, options.token_bytes)
        totals[: len(sums)] += torch.stack([value.to(torch.float64) for value in sums])
        samples.add(losses, valid)
        steps, positions = steps + 1, positions + targets.numel() * options.layout.data_size
        now = time.perf_counter()
        if runtime.is_master and (index % options.log_every == 0 or now - logged_at >= _PROGRESS_S):
            logged_at = now
            _log_progress(index, loader, data_s / steps, (now - start) / steps, positions / steps, runtime)
        waiting_since = time.perf_counter()
    loss_sum, tokens, sequences, text_loss, num_bytes = sum_over_ranks(totals).tolist()
    batch_s = max(time.perf_counter() - start, 1e-9) / max(steps, 1)
    speed = positions / max(steps, 1) / batch_s
    loss = loss_sum / tokens if tokens else math.nan
    result: dict[str, Any] = {
        "loss": loss,
        "data_time": data_s / max(steps, 1),
        "batch_time": batch_s,
        "samples_per_second": speed,
        "samples_per_second_per_gpu": speed / runtime.world_size,
        **_intervals(samples, cfg, runtime),
        "sequences": round(sequences),
        "tokens": round(tokens),
    }
    if num_bytes:
        result |= {"bits_per_byte": text_loss / math.log(2) / num_bytes, "bytes": round(num_bytes)}
    if getattr(loader, "is_bounded", False):
        result["max_batches"] = steps
    if runtime.is_master:
        logging.info(_summary(" ".join(loader.val_data), result))
    # Times differ between ranks; all ranks return rank 0's.
    return broadcast_object(runtime, result)


def _text_sums(losses: Tensor, valid: Tensor, targets: Tensor, token_bytes: Tensor | None) -> list[Tensor]:
    """Return the loss (sum) and the bytes of the valid targets (B,T) that encode text; empty without `token_bytes`.

    Special tokens, such as the one that ends a document, encode no text and do not count.
    """
    if token_bytes is None:
        return []
    counts = token_bytes[targets.clamp(min=0)] * valid
    return [(losses * (counts > 0)).sum(dtype=torch.float64), counts.sum()]


def token_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, options: ForwardOptions, documents: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of each token, 0 if it is masked: inputs, targets (B,T) int64 -> (B,T) float32.

    documents: see `batch_loss`.
    """
    return batch_loss(model, inputs, TokenLoss(targets, per_token=True), options, documents)


def _intervals(samples: _LossSamples, cfg: ValidationConfig, runtime: Runtime) -> dict[str, float]:
    """Return 95 % intervals of the mean loss over the samples of all ranks. Collective."""
    intervals = {}
    for name, histogram in (("sequences", samples.sequences), ("tokens", samples.tokens)):
        bounds = None
        if histogram is not None:
            start = time.perf_counter()
            bounds = bootstrap_interval(histogram, cfg.val_iter_ci, cfg.val_max_pop_ci, runtime=runtime)
            if runtime.is_master:
                spent_s = time.perf_counter() - start
                logging.info(f"Interval over {name}: {cfg.val_iter_ci} bootstrap resamples in {spent_s:.1f} s")
        intervals[f"loss_{name}_lower_95"], intervals[f"loss_{name}_upper_95"] = bounds or NO_INTERVAL
    return intervals


def _announcement(loader: ValLoader, number: int, sets: int) -> str:
    """Describe the validation set that is evaluated next, in one line."""
    size, known = "", getattr(loader, "num_sequences", None)
    if known is None and getattr(loader, "max_batches", None) is not None:
        size = f", at most {loader.max_batches} batches (--val-max-batches)"
    elif known is not None:
        size = f", {known} sequences in {loader.num_batches} batches"
        if loader.is_bounded:
            size += f" (--val-max-batches; the set has {loader.total_sequences} sequences)"
    return f"Validating on {' '.join(loader.val_data)} (set {number} of {sets}){size}"


def _summary(name: str, result: Mapping[str, Any]) -> str:
    """Describe the result of a validation set in one line."""
    intervals = ""
    for kind in ("sequences", "tokens"):
        lower, upper = (result[f"loss_{kind}_{bound}_95"] for bound in ("lower", "upper"))
        if (lower, upper) != NO_INTERVAL:
            intervals += f", 95 % interval over {kind} {lower:.6f} to {upper:.6f}"
    bounded = f" of the first {result['max_batches']} batches (--val-max-batches)" if "max_batches" in result else ""
    bits = f", {result['bits_per_byte']:.5f} bits per byte" if "bits_per_byte" in result else ""
    return (
        f"Validation on {name}: loss {result['loss']:.6f}, perplexity {_perplexity(result['loss']):.4g}{bits}, "
        f"{result['tokens']} tokens{bounded}{intervals}"
    )


def _perplexity(loss: float) -> float:
    with suppress(OverflowError):
        return math.exp(loss)
    return math.inf


def _log_progress(  # noqa: PLR0917 - the values of one line
    index: int, loader: ValLoader, data_s: float, batch_s: float, step_tokens: float, runtime: Runtime
) -> None:
    """Log the batches done and the remaining time, estimated ("about") until the sizes of all shards are known."""
    speed, done = step_tokens / batch_s, index + 1
    known = getattr(loader, "num_batches", None)
    total = known or (loader.estimate_batches() if isinstance(loader, ValLoader) else None)
    progress = f" [{done} batches done]"
    if total:
        remaining = timedelta(seconds=round(max(total - done, 0) * batch_s))
        about = "" if known else "about "
        progress = f" [{done}/{about}{total} ({min(100 * done / total, 100):.0f}%)] ETA: {about}{remaining}"
    logging.info(
        f"Validation batch {index} Data (t): {data_s:.3f} Batch (t): {batch_s:.3f}, {speed:#g}/s, "
        f"{speed / runtime.world_size:#g}/s/gpu{progress}"
    )
