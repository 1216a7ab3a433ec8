"""Compute the main numbers of a run from what was collected of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from open_lm.report.log_file import RunLog
from open_lm.report.records import FINISHED, UNFINISHED, Energy, Run, Summary

_LAST_RECORDS = 20  # over which the last training loss is a mean
_JOULES_PER_KWH = 3.6e6


def summarize(run: Run, log: RunLog) -> Summary:
    """Return the main numbers of a run."""
    metrics, settings = run.metrics, run.settings
    losses = metrics.get("train/loss")[1]
    losses = losses[np.isfinite(losses)]
    tokens = metrics.tokens[np.isfinite(metrics.tokens)]
    times = metrics.times[np.isfinite(metrics.times)]
    planned_steps, planned_tokens = _plan(run, log)
    summary = Summary(
        state=log.state,
        model=model_name(settings),
        parameters=log.parameters,
        step=int(metrics.steps[-1]) if len(metrics) else None,
        planned_steps=planned_steps,
        tokens=round(float(tokens[-1])) if len(tokens) else None,
        planned_tokens=planned_tokens,
        first_loss=float(losses[0]) if len(losses) else None,
        last_loss=float(losses[-min(_LAST_RECORDS, max(len(losses) // 5, 1)) :].mean()) if len(losses) else None,
        validation=run.validations[-1] if run.validations else None,
        tokens_per_second=metrics.median("train/tokens_per_second"),
        mfu=metrics.median("train/mfu"),
        peak_memory_bytes=_largest(metrics.get("train/peak_memory_bytes")[1]),
        wall_s=float(times.max() - times.min()) if len(times) > 1 else None,
        devices=_devices(run, log),
        energy=_energy(run),
    )
    summary.flops, summary.flops_method = _flops(run, summary, log)
    is_complete = planned_steps is not None and summary.step is not None and summary.step >= planned_steps
    if summary.state == UNFINISHED and is_complete:
        summary.state = FINISHED
    return summary


def model_name(settings: Mapping[str, str]) -> str:
    """Return the name of a run's model: that of the configuration, of its file, or of the pretrained weights."""
    name = next(
        (settings[key] for key in ("hf_model", "model", "pretrained") if settings.get(key, "None") not in ("None", "")),
        "",
    )
    return PurePath(name).stem if name.endswith(".json") else "/".join(PurePath(name).parts[-2:])


def _plan(run: Run, log: RunLog) -> tuple[int | None, int | None]:
    """Return the planned steps and tokens, from the log or from the settings."""
    if log.planned_steps is not None:
        return log.planned_steps, log.planned_tokens
    names = ("train_num_samples", "epochs", "global_batch_size", "seq_len")
    texts = [run.settings.get(name, "") for name in names]
    if not all(text.isdigit() and int(text) for text in texts):
        return None, None
    samples, epochs, batch, seq_len = map(int, texts)  # params.txt counts sequences
    steps = epochs * -(-samples // batch)
    return steps, steps * batch * seq_len


def _largest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _devices(run: Run, log: RunLog) -> str:
    """Return number and kind of the devices of the last start, such as "8 × NVIDIA H100"."""
    starts = run.environment_starts
    devices = starts[-1].get("devices") if starts else None
    if isinstance(devices, list) and devices:
        cpu = (starts[-1].get("cpu") or {}).get("model")
        names = []
        for device in devices:
            name = device.get("name", "device")
            names.append(f"{device.get('ranks', 1)} x {f'CPU ({cpu})' if name == 'cpu' and cpu else name}")
        return ", ".join(names)
    kind = log.device.partition(":")[0] or run.settings.get("device", "").partition(":")[0]
    world_size = run.settings.get("world_size", str(log.world_size))
    if kind in ("", "None"):
        return ""
    return f"{world_size} x {kind.upper()}"


def _energy(run: Run) -> Energy | None:
    """Return the energy of all starts; None if none of them recorded it."""
    records = _progress(run)
    known = [record for record in records if _is_number(record.get("energy_joules"))]
    if not known:
        return None
    methods = ", ".join(dict.fromkeys(str(record.get("energy_method", "unknown")) for record in known))
    first = run.environment_starts[0].get("step") or 0
    missing = [f"the first {first:,} steps"] if first else []
    missing += [f"{len(records) - len(known)} starts"] if len(known) < len(records) else []
    facts = {
        "estimate": any(record.get("energy_is_estimate") for record in known),
        "missing": " and ".join(missing),
    }
    return Energy(sum(record["energy_joules"] for record in known) / _JOULES_PER_KWH, methods, facts)


def _progress(run: Run) -> list[Mapping[str, Any]]:
    """Return what each start of the run has done, by environment.json; empty for one that did not record it."""
    found = [start.get("progress") for start in run.environment_starts]
    return [item if isinstance(item, Mapping) else {} for item in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _flops(run: Run, summary: Summary, log: RunLog) -> tuple[float | None, str]:
    """Return the floating point operations of the training, and how they were determined.

    environment.json counts those of repeated steps too. If it lacks some starts, they follow from the operations per
    token of the others; without it from MFU and speed, and as a last resort from 6 per parameter and token (Kaplan et
    al. 2020, arXiv:2001.08361).
    """
    records = _progress(run)
    known = [record for record in records if _is_number(record.get("flops")) and _is_number(record.get("tokens"))]
    flops, tokens = (sum(record[name] for record in known) for name in ("flops", "tokens"))
    if known and len(known) == len(records) and not run.environment_starts[0].get("step"):
        return float(flops), "counted by the run, repeated steps included"
    if summary.tokens is None:
        return None, ""
    if tokens:
        return flops / tokens * summary.tokens, "from those per token, which a part of the run recorded"
    if summary.mfu and summary.tokens_per_second and log.peak_flops:
        mfu, speed = run.metrics.get("train/mfu")[1], run.metrics.get("train/tokens_per_second")[1]
        if len(mfu) == len(speed):
            per_token = float(np.nanmedian(mfu / speed)) * log.peak_flops * log.world_size
            return per_token * summary.tokens, "from MFU and speed"
    if summary.parameters is not None:
        return 6.0 * summary.parameters * summary.tokens, "estimate: 6 per trained parameter and token"
    return None, ""
