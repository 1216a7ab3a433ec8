"""Determine the speed of a device: its matrix products and the MFU of a step, from flags, measurements or tables."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_lm.config.devices import PEAK_16_BIT_FLOPS, peak_16_bit_flops
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.planner.efficiency import efficiency_of
from open_lm.planner.shapes import shape_of
from open_lm.planner.strategies import Requirements


@dataclass(frozen=True)
class DeviceSpeed:
    """The speed of a device.

    Attributes:
        tflops: TFLOP/s of matrix products.
        mfu: share of it that a step on one device reaches.
        source: the origin of both, for the report.
    """

    tflops: float
    mfu: float
    source: str


def device_speed(args: argparse.Namespace, requirements: Requirements | None) -> DeviceSpeed:
    """Return the speed that --bench, --calibrate or the tables give. --matmul-tflops and --mfu override its parts.

    Without requirements, whose flags are invalid, only the device is checked.

    Raises:
        ConfigError: an unknown device, or a file without a usable measurement.
    """
    if args.bench is not None and args.calibrate is not None:
        raise ConfigError("--bench and --calibrate are both set; pass one of them")
    mfu = 1.0
    if requirements is not None:
        if args.bench is not None:
            return _benchmarked(args.bench, requirements)
        mfu = efficiency_of(args.device).mfu(requirements.shape, requirements.config.model.torchcompile)
        if args.calibrate is not None:
            return _calibrated(args.calibrate, args.device, mfu)
    peak = peak_16_bit_flops(args.device)
    if peak is None and args.matmul_tflops is None:
        raise ConfigError(
            f"--device {args.device}: its speed is unknown; pass --matmul-tflops, or one of "
            f"{', '.join(PEAK_16_BIT_FLOPS)}"
        )
    speed = "given" if args.matmul_tflops is not None else "data sheet"
    source = "given" if args.mfu is not None else efficiency_of(args.device).source
    return DeviceSpeed((peak or 1e12) / 1e12, mfu, f"{speed}, MFU {source}")


def _benchmarked(path: str, requirements: Requirements) -> DeviceSpeed:
    """Return the measured speed of the planned model."""
    model = requirements.config.model.model
    try:
        measured = _measured(_read(path, "--bench")["models"][model])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench {path}: contains no measurement of {model} ({error}); create it with scripts/bench_train.py "
            f"--model {model} --json {path}, or pass --calibrate {path}"
        ) from error
    return replace(measured, source=f"measured: {path}")


def _calibrated(path: str, device: str, mfu: float) -> DeviceSpeed:
    """Return the tables' `mfu` times the mean ratio of the measured MFUs to those of the tables."""
    try:
        measured = list(_measurements(_read(path, "--calibrate"), device))
        factor = statistics.geometric_mean(found.mfu / planned for found, planned in measured)
    except (KeyError, TypeError, ValueError, statistics.StatisticsError) as error:
        raise ConfigError(
            f"--calibrate {path}: contains no measurement ({error}); create it with scripts/bench_train.py "
            f"--json {path}"
        ) from error
    # All measurements count from the fastest matrix products among them.
    tflops = max(found.tflops for found, _ in measured)
    scale = statistics.geometric_mean(found.tflops for found, _ in measured) / tflops
    return DeviceSpeed(tflops, mfu * factor * scale, f"calibrated {factor * scale:.2f} times: {path}")


def _measurements(contents: Any, device: str) -> Iterator[tuple[DeviceSpeed, float]]:
    """Yield (measured speed, the tables' MFU) of each model in a file of scripts/bench_train.py."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--torchcompile", action="store_true")
    settings, _ = parser.parse_known_args(contents["arguments"])
    for model, entry in contents["models"].items():
        shape = shape_of(ModelConfig(model=model))
        shape = replace(shape, seq_len=settings.seq_len or shape.seq_len)
        yield _measured(entry), efficiency_of(device).mfu(shape, settings.torchcompile)


def _measured(entry: Any) -> DeviceSpeed:
    """Return the speed in an entry of a file of scripts/bench_train.py."""
    ceiling = max(rates["own"] for rates in entry["ceilings"].values())
    speed = statistics.median(next(iter(entry["results"].values()))["speeds"])
    mfu = speed * entry["flops_per_token"] / ceiling
    if not (math.isfinite(mfu) and mfu > 0):
        raise ValueError(f"its MFU is {mfu}")
    return DeviceSpeed(ceiling / 1e12, mfu, "")


def _read(path: str, flag: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{flag} {path}: is not JSON ({error})") from error
