"""`plan`: choose a ladder, print its runs with their cost, and write its files."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from open_lm.errors import ConfigError
from open_lm.scaling.fit_commands import warn
from open_lm.scaling.ladder import Choices, CostOf, Rung, choose, target_rung
from open_lm.scaling.ladder_files import ladder_values, read_base, write_ladder
from open_lm.scaling.number_types import positive, target
from open_lm.scaling.shapes import ASPECT, FAMILY, Shape, parse_sizes, target_shape
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

_DATA = ("dataset_manifest", "train_data", "train_text")
_MEASURES = ("flops", "tokens", "hours")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `plan`."""
    add = parser.add_argument
    add("output", nargs="?", type=user_path, metavar="FOLDER", help="folder to write; default: only print the ladder")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--flops", type=positive, metavar="C", help="budget of all runs in FLOPs")
    budget.add_argument("--tokens", type=positive, metavar="D", help="budget of all runs in tokens")
    budget.add_argument(
        "--hours", type=positive, metavar="H", help="budget of all runs in device hours, by the planner"
    )
    add("--target", type=target, metavar="N:D", help="parameters and tokens of the model to predict")
    add(
        "--train-target",
        action="store_true",
        help="also plan a run of the target, of the nearest size; `run --target` trains it (not part of the budget)",
    )
    add(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help=f"model configurations or numbers of parameters (default: members of {FAMILY[0]} … {FAMILY[-1]})",
    )
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--multipliers", nargs="+", type=positive, metavar="M", help="tokens per parameter (default: by the budget)"
    )
    lengths.add_argument(
        "--run-tokens", nargs="+", type=positive, metavar="D", help="tokens of the runs of each size, instead"
    )
    add("--vocab-size", type=int, default=50432, help="of sizes given as numbers (default: %(default)s)")
    add("--seq-len", type=int, default=2048, help="of sizes given as numbers (default: %(default)s)")
    add("--aspect", type=positive, default=ASPECT, metavar="A", help="their width over depth (default: %(default)s)")
    add("--lr", type=positive, help="peak learning rate (default: by compute, as in arXiv 2401.02954)")
    add(
        "--lr-exponent",
        type=float,
        default=0.0,
        metavar="P",
        help="with --lr for the smallest size: multiply it by (parameters / smallest)^P (default: 0, equal for all)",
    )
    add("--global-batch-size", type=int, metavar="B", help="sequences per step (default: by compute, likewise)")
    add("--no-branches", action="store_true", help="train every run from the start, with a cosine schedule")
    add("--base", type=user_path, metavar="FILE", help="YAML or JSON file with settings of all runs, such as data")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of all runs")
    add("--devices", type=int, default=8, help="devices of a run, for device hours (default: %(default)s)")
    add("--device", default="H100", help="name of the device, as in open_lm.plan (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Choose a ladder and write it."""
    for name in ("vocab_size", "seq_len", "devices", "global_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
    if args.train_target and args.target is None:
        raise ConfigError("--train-target: found no --target N:D, expected the parameters and tokens to train")
    if args.lr_exponent and args.lr is None:
        raise ConfigError("--lr-exponent: found no --lr, expected the learning rate of the smallest size")
    base = read_base(args.base, args.set)
    choices = Choices(
        shapes=parse_sizes(args.sizes, args.vocab_size, args.seq_len, args.aspect) if args.sizes else None,
        multipliers=args.multipliers,
        run_tokens=args.run_tokens,
        lr=args.lr,
        lr_exponent=args.lr_exponent,
        batch=args.global_batch_size,
        branches=not args.no_branches,
        target=args.target,
    )
    measure = next((name for name in _MEASURES if getattr(args, name) is not None), None)
    speed = functools.cache(functools.partial(device_speed, devices=args.devices, device=args.device))
    costs: dict[str | None, CostOf] = {
        "tokens": lambda rung: float(rung.trained_tokens),
        "hours": lambda rung: device_hours(rung, args.devices, speed),
    }
    rungs = choose(choices, getattr(args, measure) if measure else None, costs.get(measure, lambda rung: rung.cost))
    target_point = args.target
    if args.train_target:
        shape = target_shape(args.target[0], [rung.shape for rung in rungs], args.aspect)
        rungs.append(target_rung(shape, args.target[1], choices, rungs))
        target_point = (shape.params, rungs[-1].tokens)
    hours = [device_hours(rung, args.devices, speed) for rung in rungs] if measure == "hours" else None
    facts = {"target": list(target_point) if target_point else None, "device_hours": hours}
    if args.output:
        write_ladder(args.output, rungs, base, facts)
        _warn_of_missing_data(base)
    if args.json:
        print(to_json(ladder_values(rungs, facts), indent=1))
    else:
        print(ladder_text(rungs, target_point, hours))
        if args.output:
            print(f"wrote {args.output}; train it with: python -m open_lm.scaling run {args.output}")


def _warn_of_missing_data(base: Mapping[str, Any]) -> None:
    """Print a warning if the runs have no training data, or no validation set whose loss is collected."""
    if not any(base.get(key) for key in _DATA) and base.get("dataset_type") != "synthetic":
        warn(["--base and --set have no training data (dataset_manifest, train_data or train_text): no run can start"])
    if not base.get("val_data"):
        warn(["--base and --set have no val_data: the runs have no loss for `collect`"])


def device_speed(shape: Shape, *, devices: int, device: str) -> float:
    """Return the tokens per second of a model on all devices by the planner. Raise ConfigError if it does not fit."""
    from open_lm.planner.command import make_plan

    if shape.architecture:
        raise ConfigError(
            f"--hours: {shape.label} is a generated size, whose speed is not planned; use model configurations with "
            "--sizes, or a budget in --flops"
        )
    plan = make_plan(["--model", shape.model, "--devices", str(devices), "--device", device, "--most-devices", "0"])
    if plan.recommended is None or plan.recommended.time is None:
        raise ConfigError(f"--hours: {shape.label} does not fit on {devices} {device}; add --devices")
    return plan.recommended.time.tokens_per_s


def device_hours(rung: Rung, devices: int, speed: Callable[[Shape], float]) -> float:
    """Return the device hours of a run."""
    return devices * rung.trained_tokens / speed(rung.shape) / 3600


def ladder_text(rungs: Sequence[Rung], target: tuple[int, int] | None, hours: Sequence[float] | None) -> str:
    """Return the table of a ladder."""
    lines = [
        f"{'run':<24} {'parameters':>14} {'tokens':>16} {'M':>6} {'batch':>6} {'lr':>9} {'warmup':>7} {'steps':>8} "
        f"{'from step':>9} {'FLOPs spent':>11}{' device hours' if hours else ''}"
    ]
    for index, rung in enumerate(rungs):
        start = f"{rung.start:,}" if rung.trunk else ""
        spent = f" {hours[index]:>12.2f}" if hours else ""
        lines.append(
            f"{rung.name:<24} {rung.shape.params:>14,} {rung.tokens:>16,} {rung.multiplier:>6g} {rung.global_batch:>6} "
            f"{rung.lr:>9.2e} {rung.warmup:>7,} {rung.steps:>8,} {start:>9} {rung.cost:>11.2e}{spent}"
        )
    ladder = [rung for rung in rungs if not rung.is_target]
    cost, separate = sum(rung.cost for rung in ladder), sum(rung.tokens * rung.shape.flops_per_token for rung in ladder)
    tokens = sum(rung.trained_tokens for rung in ladder)
    lines.append(f"total of the ladder: {len(ladder)} runs, {tokens:,} tokens, {cost:.3g} FLOPs")
    if cost < separate:
        lines.append(f"branches save {100 * (1 - cost / separate):.0f} % of {separate:.3g} FLOPs")
    if hours:
        lines.append(f"device hours: {sum(hours):.1f}")
    if target:
        flops = 6.0 * target[0] * target[1]
        lines.append(f"the target has {flops:.3g} FLOPs, {flops / cost:,.3g} times those of the ladder")
    return "\n".join(lines)
