"""Plan a training run: predict its memory, time and disk space on given devices, and print the command to start it.

    python -m open_lm.plan --model open_lm_7b --devices 8 --device H100 --train-tokens 140e9

Needs no device. All flags of open_lm.main are accepted too. Settings that they leave open are searched: every way to
distribute the model, every mode of activation checkpointing, and, without --batch-size or --global-batch-size, the
largest batch that fits. docs/planning.md describes what is computed and what is assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from open_lm.config.command_line import build_parser, load_config_file, parse_args
from open_lm.config.devices import PEAK_16_BIT_FLOPS, links_of, memory_bytes
from open_lm.errors import ConfigError, join_problems
from open_lm.planner.checkpoints import Checkpoints, plan_checkpoints
from open_lm.planner.report import Plan, format_plan, plan_values
from open_lm.planner.speed import DeviceSpeed, device_speed
from open_lm.planner.strategies import STRATEGIES, Machine, Option, Requirements, evaluate_options, fastest
from open_lm.planner.traffic import Rates
from open_lm.storage import parse_bytes
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path
from open_lm.system.program import program_name

T = TypeVar("T")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the planner's own flags. The trainer's parser handles all others."""
    parser = argparse.ArgumentParser(
        prog=program_name("open_lm.plan"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", default="8", help="number of devices (default: 8)")
    add("--devices-per-node", default="8", help="number of devices per node (default: 8)")
    add("--device", default="H100", help=f"device name: {', '.join(PEAK_16_BIT_FLOPS)}, … (default: H100)")
    add("--device-memory", help="memory of a device that a process can allocate, with its unit (default: by --device)")
    add("--strategies", help=f"comma-separated strategies to evaluate (default: all): {', '.join(STRATEGIES)}")
    add("--matmul-tflops", help="TFLOP/s of a device's matrix products (default: from its data sheet)")
    add(
        "--mfu",
        help="share of --matmul-tflops that a step on one device reaches, such as 0.5 (default: from published runs, "
        "by --device, model width, sequence length and --torchcompile)",
    )
    add(
        "--bench",
        type=user_path,
        metavar="FILE",
        help="read --matmul-tflops and --mfu from FILE, written by scripts/bench_train.py --json FILE",
    )
    add(
        "--calibrate",
        type=user_path,
        metavar="FILE",
        help="scale the default MFU by the measurements in FILE, of any models on the user's device, written by "
        "scripts/bench_train.py --json FILE",
    )
    add("--bandwidth-intra", help="bandwidth between devices in a node, in GB/s per device (default: by --device)")
    add("--bandwidth-inter", help="bandwidth between nodes, in GB/s per node (default: by --device)")
    add("--train-tokens", help="total number of training tokens, such as 140e9")
    add(
        "--price-per-device-hour",
        help="price of a device per hour, in any currency: with --train-tokens, adds the price of the run and finds "
        "the cheapest way on up to --most-devices devices",
    )
    add(
        "--most-devices",
        default="256",
        help="largest number of devices in the scaling table; 0: no table (default: 256)",
    )
    add("--max-exposed", default="0.2", help="share of a step that may wait for communication (default: 0.2)")
    add("--json", action="store_true", help="print the plan as one JSON object")
    return parser


def make_plan(argv: Sequence[str]) -> Plan:
    """Return the plan for a command line.

    Raises:
        ConfigError: lists all problems of the command line.
    """
    args, flags = make_parser().parse_known_args(list(argv))
    problems: list[str] = []

    def checked(make: Callable[[], T], fallback: T) -> T:
        """Return `make()`, or `fallback` after recording its ConfigError."""
        try:
            return make()
        except ConfigError as error:
            problems.append(str(error))
            return fallback

    def number(name: str, least: float = 1, default: float = 1) -> float:
        raw = getattr(args, name)
        return default if raw is None else checked(lambda: _number(name, raw, least), 1.0)

    machine = Machine(
        devices=int(number("devices")),
        memory_bytes=checked(lambda: _memory(args.device_memory, args.device), 1),
        per_node=int(number("devices_per_node")),
        name=args.device,
    )
    if machine.devices > machine.per_node and machine.devices % machine.per_node:
        problems.append(
            f"--devices {machine.devices} is not a multiple of --devices-per-node {machine.per_node}: change one of "
            "them"
        )
    tokens = number("train_tokens", default=0)
    requirements: Requirements | None = None
    try:
        parsed = _requirements(flags, int(tokens))
        assert parsed.shape
        requirements = parsed
    except ConfigError as error:
        problems.append(str(error))
    none: list[str] = []
    names = checked(lambda: _strategies(args.strategies, requirements), none)
    links = links_of(machine.name)
    speed = checked(lambda: device_speed(args, requirements), DeviceSpeed(1.0, 1.0, ""))
    rates = Rates(
        matmul_flops=number("matmul_tflops", 0, speed.tflops) * 1e12,
        mfu=number("mfu", 0, speed.mfu),
        intra=number("bandwidth_intra", 0, links.intra / 1e9) * 1e9,
        inter=number("bandwidth_inter", 0, links.inter / 1e9) * 1e9,
        per_node=machine.per_node,
    )
    price = None if args.price_per_device_hour is None else number("price_per_device_hour", 0)
    if price is not None and not tokens:
        problems.append("--price-per-device-hour: a price requires --train-tokens, the length of the run")
    max_devices, max_exposed = int(number("most_devices", 0)), number("max_exposed", 0)
    if problems or requirements is None:
        raise ConfigError(join_problems(problems, "cannot make a plan"))
    options = evaluate_options(requirements, machine, rates, names)
    if all(item.problem for item in options):
        messages = dict.fromkeys(f"{item.strategy}: {item.problem}" for item in options)
        raise ConfigError(join_problems(list(messages), "cannot make a plan"))
    recommended = fastest(options)
    return Plan(
        shape=requirements.shape,
        machine=machine,
        rates=rates,
        rates_from=speed.source,
        options=options,
        recommended=recommended,
        growth=_growth(options, requirements, rates, names, max_devices),
        max_exposed=max_exposed,
        train_tokens=int(tokens) or None,
        price_per_device_hour=price,
        checkpoints=_checkpoints(recommended, int(tokens)),
    )


def main(argv: list[str]) -> None:
    """Print the plan for a command line."""
    plan = make_plan(argv)
    print(to_json(plan_values(plan), indent=1) if "--json" in argv else format_plan(plan))


# --- inputs ---------------------------------------------------------------------------------------------------------
def _number(name: str, raw: str, least: float) -> float:
    flag = "--" + name.replace("_", "-")
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    is_integer = name in ("devices", "devices_per_node", "most_devices", "train_tokens")
    bound = f"of at least {least:g}" if least else ("of at least 0" if name == "most_devices" else "above 0")
    if not value >= least or (is_integer and value != int(value)) or (value == 0 and name != "most_devices"):
        raise ConfigError(f"{flag}: found {raw!r}, expected {'an integer' if is_integer else 'a number'} {bound}")
    return value


def _memory(raw: str | None, device: str) -> int:
    if raw is None:
        known = memory_bytes(device)
        if known is None:
            raise ConfigError(f"--device {device}: its memory is unknown; pass --device-memory, such as 80GB")
        return int(known)
    if raw.strip().replace(".", "", 1).isdigit():
        raise ConfigError(f"--device-memory: found {raw!r} without a unit, expected a size such as 80GB or 40GiB")
    try:
        return parse_bytes(raw)
    except ValueError as error:
        raise ConfigError(f"--device-memory: {error}") from error


def _requirements(flags: Sequence[str], tokens: int) -> Requirements:
    """Return the requirements of the trainer's flags. `tokens` is the length of the training, 0 if unknown."""
    parse_args(flags)
    given = vars(build_parser().parse_args(list(flags)))
    given_flags = set(given) | (set(load_config_file(given["config"])) if "config" in given else set())
    extra: list[str] = []
    if tokens and "train_num_samples" not in given_flags:
        epochs = int(given.get("epochs", 1))
        extra = [
            "--train-num-samples",
            str(-(-tokens // epochs)),
            *(() if "epochs" in given_flags else ("--epochs", "1")),
        ]
    return Requirements((*flags, *extra), frozenset(given_flags))


def _strategies(raw: str | None, requirements: Requirements | None) -> list[str]:
    if raw is None:
        return []
    names = [name.strip() for name in raw.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise ConfigError(f"--strategies: found {', '.join(unknown)}, expected one or more of {', '.join(STRATEGIES)}")
    if requirements is not None and requirements.sets_strategy:
        raise ConfigError("--strategies: other flags already set a strategy; pass one or the other")
    return names


# --- results --------------------------------------------------------------------------------------------------------
def _growth(
    options: Sequence[Option], requirements: Requirements, rates: Rates, names: Sequence[str], max_devices: int
) -> dict[int, dict[str, Option]]:
    """Return the fastest option of each strategy on 1, 2, 4, … times the devices of `options`, up to `max_devices`."""
    growth: dict[int, dict[str, Option]] = {}
    machine = options[0].machine
    while machine.devices <= max_devices:
        if growth:
            options = evaluate_options(requirements, machine, rates, names)
        by_strategy: dict[str, list[Option]] = {}
        for option in options:
            by_strategy.setdefault(option.strategy, []).append(option)
        growth[machine.devices] = {name: fastest(items) or items[-1] for name, items in by_strategy.items()}
        machine = replace(machine, devices=2 * machine.devices)
    return growth


def _checkpoints(option: Option | None, tokens: int) -> Checkpoints | None:
    """Return the checkpoints of a training; None if its length is unknown."""
    if option is None or option.setup is None:
        return None
    data = option.setup.config.data
    total = tokens or (data.train_num_samples or 0) * data.epochs
    if not total:
        return None
    steps = max(1, total // (option.global_batch * option.setup.shape.seq_len))
    return plan_checkpoints(option.setup, steps, data.epochs)
