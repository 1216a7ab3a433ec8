"""Say what a training will take on some devices, without any of them: memory, time, disk, and the flags to start it.

    python -m open_lm.planner.command --model open_lm_7b --devices 8 --device-memory 80GB --train-tokens 140e9

All flags of open_lm.main may follow. What they leave open is tried out: every way to spread the model, every kind of
activation checkpointing, and without --batch-size or --global-batch-size the largest batch that fits. docs/planning.md
tells what is counted and what is assumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from open_lm.config.command_line import build_parser, load_config_file, parse_args
from open_lm.config.devices import PEAK_16_BIT_FLOPS, links_of, peak_16_bit_flops
from open_lm.errors import ConfigError, join_problems
from open_lm.planner.checkpoints import Checkpoints, checkpoints_of
from open_lm.planner.report import Plan, text, values
from open_lm.planner.strategies import STRATEGIES, Machine, Option, Wishes, best, options
from open_lm.planner.traffic import Rates
from open_lm.storage import parse_bytes

T = TypeVar("T")

MFU = 0.45  # assumed where nothing was measured


def make_parser() -> argparse.ArgumentParser:
    """The command's own flags; those of the trainer are left to the trainer's parser."""
    parser = argparse.ArgumentParser(
        prog="open_lm.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", default="8", help="how many (default: 8)")
    add("--devices-per-node", default="8", help="of them in a node (default: 8)")
    add("--device", default="H100", help=f"what they are: {', '.join(PEAK_16_BIT_FLOPS)}, … (default: H100)")
    add("--device-memory", default="80GB", help="of each, with its unit (default: 80GB)")
    add("--strategies", help=f"joined by commas (default: all): {', '.join(STRATEGIES)}")
    add("--matmul-tflops", help="TFLOP/s of a device's matrix products (default: its data sheet's)")
    add("--mfu", help=f"share of them that a step on one device reaches, such as 0.5 (default: {MFU}, assumed)")
    add("--bench", metavar="FILE", help="take both from what scripts/bench_train.py --json FILE measured")
    add("--bandwidth-intra", help="GB/s of a device inside its node (default: by --device)")
    add("--bandwidth-inter", help="GB/s of a node to all others (default: by --device)")
    add("--train-tokens", help="tokens of the whole training, such as 140e9")
    add("--most-devices", default="256", help="where the table of more devices ends; 0: no table (default: 256)")
    add("--max-exposed", default="0.2", help="share of a step that may wait for exchange (default: 0.2)")
    add("--json", action="store_true", help="print the same as one JSON object")
    return parser


def make_plan(argv: Sequence[str]) -> Plan:
    """The plan that a command line asks for. ConfigError with all that is wrong with it."""
    own, flags = make_parser().parse_known_args(list(argv))
    problems: list[str] = []

    def tried(make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except ConfigError as error:
            problems.append(str(error))
            return otherwise

    def number(name: str, least: float = 1, default: float = 1) -> float:
        raw = getattr(own, name)
        return default if raw is None else tried(lambda: _number(name, raw, least), 1.0)

    machine = Machine(
        devices=int(number("devices")),
        memory_bytes=tried(lambda: _memory(own.device_memory), 1),
        per_node=int(number("devices_per_node")),
        name=own.device,
    )
    if machine.devices > machine.per_node and machine.devices % machine.per_node:
        problems.append(
            f"--devices {machine.devices} are no whole nodes of --devices-per-node {machine.per_node}: change one"
        )
    tokens = number("train_tokens", default=0)
    wishes: Wishes | None = None
    try:
        wishes = _wishes(flags, int(tokens))
        assert wishes.shape
    except ConfigError as error:
        problems.append(str(error))
    none: list[str] = []
    names = tried(lambda: _strategies(own.strategies, wishes), none)
    links = links_of(machine.name)
    tflops, mfu, source = tried(lambda: _speeds(own, wishes), (1.0, 1.0, ""))
    rates = Rates(
        matmul_flops=number("matmul_tflops", 0, tflops) * 1e12,
        mfu=number("mfu", 0, mfu),
        intra=number("bandwidth_intra", 0, links.intra / 1e9) * 1e9,
        inter=number("bandwidth_inter", 0, links.inter / 1e9) * 1e9,
        per_node=machine.per_node,
    )
    most, max_exposed = int(number("most_devices", 0)), number("max_exposed", 0)
    if problems or wishes is None:
        raise ConfigError(join_problems(problems, "no plan can be made"))
    found = options(wishes, machine, rates, names)
    if all(item.problem for item in found):
        said = dict.fromkeys(f"{item.strategy}: {item.problem}" for item in found)
        raise ConfigError(join_problems(list(said), "no plan can be made"))
    chosen = best(found)
    return Plan(
        shape=wishes.shape,
        machine=machine,
        rates=rates,
        rates_from=source,
        found=found,
        chosen=chosen,
        growth=_growth(wishes, machine, rates, names, most),
        max_exposed=max_exposed,
        train_tokens=int(tokens) or None,
        checkpoints=_checkpoints(chosen, int(tokens)),
    )


def main(argv: list[str]) -> None:
    plan = make_plan(argv)
    print(json.dumps(values(plan), indent=1) if "--json" in argv else text(plan))


# --- what is given --------------------------------------------------------------------------------------------------
def _number(name: str, raw: str, least: float) -> float:
    flag = "--" + name.replace("_", "-")
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    whole = name in ("devices", "devices_per_node", "most_devices", "train_tokens")
    bound = f"of {least:g} or more" if least else ("of 0 or more" if name == "most_devices" else "above 0")
    if not value >= least or (whole and value != int(value)) or (value == 0 and name != "most_devices"):
        raise ConfigError(f"{flag}: found {raw!r}, expected a {'whole ' if whole else ''}number {bound}")
    return value


def _memory(raw: str) -> int:
    if raw.strip().replace(".", "", 1).isdigit():
        raise ConfigError(f"--device-memory: found {raw!r} without a unit, expected a size such as 80GB or 40GiB")
    try:
        return parse_bytes(raw)
    except ValueError as error:
        raise ConfigError(f"--device-memory: {error}") from error


def _wishes(flags: Sequence[str], tokens: int) -> Wishes:
    """The trainer's flags, with the length of the training where it is given."""
    parse_args(flags)
    given = vars(build_parser().parse_args(list(flags)))
    stated = set(given) | (set(load_config_file(given["config"])) if "config" in given else set())
    more: list[str] = []
    if tokens and "train_num_samples" not in stated:
        epochs = int(given.get("epochs", 1))
        more = ["--train-num-samples", str(-(-tokens // epochs)), *(() if "epochs" in stated else ("--epochs", "1"))]
    return Wishes((*flags, *more), frozenset(stated))


def _strategies(raw: str | None, wishes: Wishes | None) -> list[str]:
    if raw is None:
        return []
    names = [name.strip() for name in raw.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise ConfigError(f"--strategies: found {', '.join(unknown)}, expected some of {', '.join(STRATEGIES)}")
    if wishes is not None and wishes.states_strategy:
        raise ConfigError("--strategies: other flags already say how to spread the model; give one or the other")
    return names


def _speeds(own: argparse.Namespace, wishes: Wishes | None) -> tuple[float, float, str]:
    """(TFLOP/s of matrix products, MFU, where they are from) in place of which flags may be given."""
    if own.bench is not None and wishes is not None:
        return _measured(own.bench, wishes)
    peak = peak_16_bit_flops(own.device)
    if peak is None and own.matmul_tflops is None:
        raise ConfigError(
            f"--device {own.device}: its speed is not known; give --matmul-tflops, or one of "
            f"{', '.join(PEAK_16_BIT_FLOPS)}"
        )
    speed = "given" if own.matmul_tflops is not None else "data sheet"
    return (peak or 1e12) / 1e12, MFU, f"{speed}, MFU {'given' if own.mfu is not None else 'assumed'}"


def _measured(path: str, wishes: Wishes) -> tuple[float, float, str]:
    model = wishes.config.model.model
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["models"]
        entry = found[model]
        ceiling = max(rates["own"] for rates in entry["matmul_flops"].values())
        speed = statistics.median(next(iter(entry["results"].values()))["speeds"])
        return ceiling / 1e12, speed * entry["flops_per_token"] / ceiling, f"measured: {path}"
    except OSError as error:
        raise ConfigError(f"--bench {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench {path}: holds no measurement of {model} ({error}); make it with scripts/bench_train.py "
            f"--model {model} --json {path}"
        ) from error


# --- what follows ---------------------------------------------------------------------------------------------------
def _growth(
    wishes: Wishes, machine: Machine, rates: Rates, names: Sequence[str], most: int
) -> dict[int, dict[str, Option]]:
    """On 1, 2, 4, … times as many devices, each strategy with the checkpointing that is best for it there."""
    growth: dict[int, dict[str, Option]] = {}
    while machine.devices <= most:
        found = options(wishes, machine, rates, names)
        rows = {
            name: [item for item in found if item.strategy == name] for name in dict.fromkeys(o.strategy for o in found)
        }
        growth[machine.devices] = {name: best(tried) or tried[-1] for name, tried in rows.items()}
        machine = replace(machine, devices=2 * machine.devices)
    return growth


def _checkpoints(chosen: Option | None, tokens: int) -> Checkpoints | None:
    if chosen is None or chosen.job is None:
        return None
    data = chosen.job.config.data
    total = tokens or (data.train_num_samples or 0) * data.epochs
    if not total:
        return None
    steps = max(1, total // (chosen.global_batch * chosen.job.shape.seq_len))
    return checkpoints_of(chosen.job, steps, data.epochs)
