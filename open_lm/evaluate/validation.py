"""Validation: the exact mean loss of validation sets over all ranks, with bootstrap intervals.

Legend: B sequences of this rank's batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import LoggingConfig, ValidationConfig
from open_lm.data.device import on_device
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.validation_loader import ValLoader
from open_lm.distributed.param_names import clean_name
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, broadcast_object, gather_objects, sum_over_ranks
from open_lm.errors import ConfigError
from open_lm.model.losses import ForwardOptions, TokenLoss, batch_loss
from open_lm.monitor.metrics import bootstrap_interval
from open_lm.monitor.watchdog import heartbeat
from open_lm.optim.adamw import local_tensor
from open_lm.parallel.parallelize import evaluation_mode, unwrap

NO_INTERVAL = (-1.0, -1.0)
_PROGRESS_S = 30.0  # log the progress after this time, also between two lines of --log-every-n-steps


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of a validation.

    `train_tokens` is the number of tokens trained on so far, None if unknown. With `end_of_text_id`, attention stays
    inside documents, which end with this id; with None it covers full sequences.
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


def evaluate_sets(model: nn.Module, loaders: Sequence[ValLoader], options: EvaluationOptions) -> list[dict[str, Any]]:
    """Evaluate the model on each validation set; return one result per set, equal on all ranks. Collective.

    A result is an entry of a line of results.jsonl. `loss` is the mean over the valid tokens of all ranks, without
    filler sequences and masked targets; `tokens` and `sequences` are the numbers of valid ones. `samples_per_second`
    counts tokens, as in existing results.
    """
    results = []
    for loader in loaders:
        with evaluation_mode(model):
            result = _evaluate_set(model, loader, options)
        if options.train_tokens is not None:
            result["train_tokens"] = options.train_tokens
        result["checkpoint_path"] = options.checkpoint_path
        result["val_data"] = list(loader.val_data)
        result["model"] = options.model_name
        results.append(result)
    return results


def validation_metrics(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a validation: val/loss over the tokens of all sets, and the values of each set.

    With several sets, the values of each are named val/<name of its shards>/<key>.
    """
    metrics: dict[str, float] = {}
    tokens = sum(result["tokens"] for result in results)
    if tokens:
        loss = sum(result["loss"] * result["tokens"] for result in results if result["tokens"]) / tokens
        metrics |= {"val/loss": loss, "val/tokens": tokens}
    for index, result in enumerate(results):
        stem = PurePath(" ".join(result["val_data"])).name.partition(".")[0] or str(index)
        prefix = "val" if len(results) == 1 else f"val/{stem}"
        if len(results) > 1 and f"{prefix}/loss" in metrics:
            prefix = f"{prefix}-{index}"  # an earlier set has shards of the same name
        values = {key: value for key, value in result.items() if isinstance(value, int | float) and value != -1.0}
        metrics |= {f"{prefix}/{key}": value for key, value in values.items() if key != "train_tokens"}
    return metrics


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


@dataclass
class _LossSamples:
    """The losses of this rank's sequences and tokens, for the intervals."""

    sequences: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)

    def add(self, losses: Tensor, valid: Tensor, cfg: ValidationConfig) -> None:
        """Add the losses (B,T) float32 of a batch and their validity (B,T) bool."""
        if cfg.val_seq_ci:
            counts = valid.sum(1)
            means = losses.sum(1) / counts.clamp(min=1)
            self.sequences.append(means[counts > 0].cpu().numpy())
        if cfg.val_tok_ci:
            self.tokens.append(losses[valid].cpu().numpy())


def _evaluate_set(model: nn.Module, loader: ValLoader, options: EvaluationOptions) -> dict[str, Any]:
    runtime, cfg = options.runtime, options.cfg
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)  # loss, tokens, sequences
    samples = _LossSamples()
    data_s, steps, positions, start = 0.0, 0, 0, time.perf_counter()
    waiting_since = logged_at = start
    for index, (batch, _) in enumerate(on_device(((batch, None) for batch in loader), runtime.device)):
        data_s += time.perf_counter() - waiting_since
        heartbeat("validating")
        targets = batch.targets
        losses = token_losses(model, batch.inputs, targets, options)
        valid = (targets != IGNORE_INDEX) & options.layout.contributes_sequences
        sums = ((losses * valid).sum(dtype=torch.float64), valid.sum(), valid.any(1).sum())
        totals += torch.stack([value.to(torch.float64) for value in sums])
        samples.add(losses, valid, cfg)
        steps, positions = steps + 1, positions + targets.numel() * options.layout.data_size
        now = time.perf_counter()
        if runtime.is_master and (index % options.log_every == 0 or now - logged_at >= _PROGRESS_S):
            logged_at, num_batches = now, getattr(loader, "num_batches", None)
            _log_progress(index, num_batches, data_s / steps, (now - start) / steps, positions / steps, runtime)
        waiting_since = time.perf_counter()
    loss_sum, tokens, sequences = sum_over_ranks(totals).tolist()
    batch_s = max(time.perf_counter() - start, 1e-9) / max(steps, 1)
    speed = positions / max(steps, 1) / batch_s
    loss = loss_sum / tokens if tokens else math.nan
    result: dict[str, Any] = {
        "loss": loss,
        "data_time": data_s / max(steps, 1),
        "batch_time": batch_s,
        "samples_per_second": speed,
        "samples_per_second_per_gpu": speed / runtime.world_size,
        **_intervals(samples, cfg),
        "sequences": round(sequences),
        "tokens": round(tokens),
    }
    if runtime.is_master:
        logging.info(_summary(" ".join(loader.val_data), result))
    # Times differ between ranks; all ranks return rank 0's.
    return broadcast_object(runtime, result)


def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor, options: ForwardOptions) -> Tensor:
    """Return the cross entropy of each token, 0 if it is masked: inputs, targets (B,T) int64 -> (B,T) float32."""
    return batch_loss(model, inputs, TokenLoss(targets, per_token=True), options)


def _intervals(samples: _LossSamples, cfg: ValidationConfig) -> dict[str, float]:
    """Return 95 % intervals of the mean loss over the samples of all ranks, computed on rank 0. Collective."""
    intervals = {}
    kinds = (("sequences", cfg.val_seq_ci, samples.sequences), ("tokens", cfg.val_tok_ci, samples.tokens))
    for name, is_enabled, local in kinds:
        bounds = NO_INTERVAL
        if is_enabled:
            by_rank = gather_objects(np.concatenate(local) if local else np.empty(0, np.float32))
            population = np.concatenate(by_rank) if by_rank else np.empty(0, np.float32)
            if len(population):
                size = min(len(population), cfg.val_max_pop_ci or len(population))
                logging.info(f"Drawing {cfg.val_iter_ci} bootstrap resamples of {size} {name}")
                bounds = bootstrap_interval(population, cfg.val_iter_ci, cfg.val_max_pop_ci)
        intervals[f"loss_{name}_lower_95"], intervals[f"loss_{name}_upper_95"] = bounds
    return intervals


def _summary(name: str, result: Mapping[str, Any]) -> str:
    """Describe the result of a validation set in one line."""
    perplexity = math.inf
    with suppress(OverflowError):
        perplexity = math.exp(result["loss"])
    intervals = ""
    for kind in ("sequences", "tokens"):
        lower, upper = (result[f"loss_{kind}_{bound}_95"] for bound in ("lower", "upper"))
        if (lower, upper) != NO_INTERVAL:
            intervals += f", 95 % interval over {kind} {lower:.6f} to {upper:.6f}"
    return (
        f"Validation on {name}: loss {result['loss']:.6f}, perplexity {perplexity:.4g}, {result['tokens']} tokens"
        f"{intervals}"
    )


def _log_progress(  # noqa: PLR0917 - the values of one line
    index: int, num_batches: int | None, data_s: float, batch_s: float, step_tokens: float, runtime: Runtime
) -> None:
    speed, done = step_tokens / batch_s, index + 1
    progress = f" [{done} batches done]"
    if num_batches:
        remaining = timedelta(seconds=round(max(num_batches - done, 0) * batch_s))
        progress = f" [{done}/{num_batches} ({100 * done / num_batches:.0f}%)] ETA: {remaining}"
    logging.info(
        f"Validation batch {index} Data (t): {data_s:.3f} Batch (t): {batch_s:.3f}, {speed:#g}/s, "
        f"{speed / runtime.world_size:#g}/s/gpu{progress}"
    )
