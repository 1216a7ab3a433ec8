"""Measure a training step: tokens per second, model FLOP utilization (MFU), memory, and where the time goes.

    python scripts/bench_train.py --model open_lm_11m open_lm_160m --against original
    python scripts/bench_train.py --model open_lm_1b --device cuda --torchcompile --profile --trace step.json.gz
    python scripts/bench_train.py --model open_lm_160m --precision fp32 --against my_module:my_function
    python scripts/bench_train.py --model open_lm_1b --torchcompile --against torchtitan \
        --peer-python .venv-titan/bin/python        # `make install-titan` creates it

All other flags are the trainer's (--torchcompile, --activation-checkpointing op, --fp8, --accum-freq 2, ...). "ours" is
the session, optimizer and train_step of a training run, on random tokens. It can be compared with:

- `original`: the plain recipe of the original OpenLM (original_recipe.py);
- `torchtitan`: its Llama 3 of the same size, with the same flags (torchtitan_recipe.py);
- MODULE:FUNCTION: function(model, precision, device) returns a step(inputs, targets) -> loss; if the function has a
  parameter `config`, it also receives the trainer's full configuration;
- a command (--against-command) whose last line of output is JSON with tokens_per_second. Its words may contain {model},
  {precision}, {device}, {batch_size} and {seq_len}.

Every measurement runs in a separate process, and rounds alternate, so that other load on the machine affects all of
them. The table shows median, minimum and maximum over all steps. MFU is the model's FLOP/s, without recomputation,
divided by the rate of matrix products in the same run: at the shapes of the model's linear layers (forward and
backward), for a large square, and by the data sheet of a CUDA device. Memory is the increase of the process's peak
over that before the model is built (on CUDA: of the allocator). The time to the first step starts there as well and
includes compilation. --profile cannot see inside CUDA graphs, which torchtitan uses.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_train_worker import CEILING, OURS, BenchmarkRun, StepMeasurement, trainer_flags
from step_profile import table as profile_table

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.config.devices import peak_16_bit_flops
from open_lm.config.sections import ArchitectureConfig, Config, ModelConfig
from open_lm.distributed.precision import compute_dtype
from open_lm.errors import ConfigError, run_cli
from open_lm.model.transformer import create_model
from open_lm.monitor.metrics import device_peak_flops, model_flops_per_token
from open_lm.storage import write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.cpus import available_cpus
from open_lm.system.names import user_file, user_path

PEER_STEPS = {"original": "original_recipe:build", "torchtitan": "torchtitan_recipe:build"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        type=user_path,
        nargs="+",
        default=["open_lm_11m"],
        help="names of model configurations, or .json files",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    parser.add_argument(
        "--precision", default="amp_bfloat16", help="--precision of the trainer (default: amp_bfloat16)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step (default: 4)")
    parser.add_argument("--seq-len", type=int, help="tokens per sequence (default: the model's)")
    parser.add_argument("--steps", type=int, help="measured steps per round (default: 3, on CUDA 20)")
    parser.add_argument("--warmup", type=int, help="steps before the measured ones (default: 1, on CUDA 5)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each step (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads per process (default: one per CPU core)")
    parser.add_argument(
        "--ceiling", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"],
        help="measure matrix products in these types, in addition to that of --precision (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="NAME", help=f"step to compare with: {', '.join(PEER_STEPS)} or MODULE:FUNCTION"
    )
    parser.add_argument(
        "--peer-python", type=user_file, default=Path(sys.executable), metavar="PYTHON",
        help="interpreter that runs the step of --against (default: this one)",
    )  # fmt: skip
    parser.add_argument("--against-command", metavar="COMMAND", help="command to compare with")
    parser.add_argument("--profile", action="store_true", help="profile one more step and show its time by category")
    parser.add_argument(
        "--trace", type=user_file, metavar="FILE", help="write the profile of our step to this file (.json or .json.gz)"
    )
    parser.add_argument("--json", type=user_file, metavar="FILE", help="write all measurements to this file")
    return parser


# --- settings of the measurements -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ComparisonPlan:
    """The measurements of a model.

    runs: the settings of each measurement by name, or its command.
    ours: the settings of our step.
    dtype: type of the matrix products with --precision.
    flops_per_token: model FLOPs per token, the same for all measurements.
    """

    runs: dict[str, BenchmarkRun | list[str]]
    ours: BenchmarkRun
    dtype: str
    flops_per_token: float
    num_params: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.ours.batch_size * self.ours.seq_len


def plan_comparison(args: argparse.Namespace, flags: list[str], model: str, folder: Path) -> ComparisonPlan:
    """Return the planned measurements of a model and write its configuration to `folder`.

    Raise ConfigError if the trainer rejects the settings.
    """
    shape = read_architecture(model)
    seq_len = args.seq_len or shape["seq_len"]
    flags = ["--precision", args.precision, *flags]
    config = Config.from_namespace(parse_args(trainer_flags(model, args.batch_size, flags)))
    path = folder / f"{Path(model).stem}.json"
    write_text(path, to_json({**changed_architecture(config.model), **shape, "seq_len": seq_len}))
    dtype = str(compute_dtype(args.precision, args.device)).removeprefix("torch.")
    ours = BenchmarkRun(
        kind=OURS,
        model=str(path),
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        seq_len=seq_len,
        vocab_size=shape["vocab_size"],
        micro_batches=config.optim.accum_freq,
        warmup=args.warmup,
        steps=args.steps,
        flags=flags,
        dtypes=list(dict.fromkeys([dtype, *args.ceiling])),
    )
    with torch.device("meta"):
        meta_model = create_model(ModelConfig.from_object(replace(config.model, model=str(path))))
    runs: dict[str, BenchmarkRun | list[str]] = {CEILING: replace(ours, kind=CEILING), OURS: ours}
    if args.against:
        runs[args.against] = replace(
            ours, kind=PEER_STEPS.get(args.against, args.against), python=str(args.peer_python)
        )
    if args.against_command:
        values = {name: str(getattr(ours, name)) for name in ("model", "precision", "device", "batch_size", "seq_len")}
        runs["the command"] = [fill_placeholders(word, values) for word in shlex.split(args.against_command)]
    num_params = sum(p.numel() for p in meta_model.parameters())
    return ComparisonPlan(runs, ours, dtype, model_flops_per_token(meta_model), num_params)


def changed_architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the architecture settings that flags changed. The model file passes them to the other steps."""
    values = {spec.name: getattr(model, spec.name) for spec in ArchitectureConfig.specs() if not spec.no_effect}
    return {name: value for name, value in values.items() if value != getattr(ArchitectureConfig, name)}


def check_peer(comparison: ComparisonPlan, args: argparse.Namespace) -> None:
    """Raise ConfigError if the step of --against cannot be built. Print its version of torch if it differs."""
    peer = comparison.runs.get(args.against)
    if not isinstance(peer, BenchmarkRun):
        return
    version = run_once(replace(peer, check=True).command(), args)["torch"]
    if version != torch.__version__:
        print(f"{args.against}: torch {version}", flush=True)


def fill_placeholders(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


# --- measurement ----------------------------------------------------------------------------------------------------
def run_once(command: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return the JSON object of the last line that it prints.

    Raise ConfigError with its error output if it fails.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if args.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    last_line = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and last_line:
        try:
            return dict(json.loads(last_line))
        except (ValueError, TypeError):
            done.stderr += f"the last printed line is not a JSON object: {last_line[:200]}"
    output = done.stderr.strip()[-4000:] or "no output"
    raise ConfigError(f"{' '.join(command[:2])} ... ended with exit status {done.returncode}:\n{output}")


@dataclass
class Results:
    """The measurements of one step over all rounds.

    speeds: tokens per second of each step; of each round for a command.
    round_speeds: the median of each round.
    first_step_s, memory_bytes: one value per round; empty if unknown.
    """

    speeds: list[float]
    round_speeds: list[float]
    first_step_s: list[float]
    memory_bytes: list[int]

    def add(self, result: dict[str, Any], tokens: int) -> None:
        """Add the result of a round with `tokens` tokens per step. Raise ConfigError if it contains no speed."""
        if "step_s" in result:
            speeds = [tokens / s for s in result["step_s"]]
        elif "tokens_per_second" in result:
            speeds = [float(result["tokens_per_second"])]
        else:
            raise ConfigError(f"--against-command: its JSON has no tokens_per_second, found only {', '.join(result)}")
        self.speeds += speeds
        self.round_speeds.append(statistics.median(speeds))
        if "first_step_s" in result:
            self.first_step_s.append(result["first_step_s"])
        if "memory_bytes" in result:
            self.memory_bytes.append(result["memory_bytes"])


@dataclass
class ModelResults:
    """All measurements of a model.

    results: by name of the step.
    ceilings: FLOP/s of matrix products by type and shape ("own", "square"), the best of all rounds.
    profiles: the measurements that contain a profile, by name of the step.
    """

    results: dict[str, Results]
    ceilings: dict[str, dict[str, float]]
    profiles: dict[str, StepMeasurement]


def measure(comparison: ComparisonPlan, args: argparse.Namespace) -> ModelResults:
    """Run all rounds. With --profile, the processes of the last round profile one more step."""
    measured = ModelResults({name: Results([], [], [], []) for name in comparison.runs if name != CEILING}, {}, {})
    for number in range(1, args.rounds + 1):
        for name, run in comparison.runs.items():
            result = run_once(build_command(run, args, number == args.rounds), args)
            if name == CEILING:
                for dtype, rates in result.items():
                    before = measured.ceilings.get(dtype, rates)
                    measured.ceilings[dtype] = {key: max(rate, before[key]) for key, rate in rates.items()}
                continue
            measured.results[name].add(result, comparison.tokens)
            if result.get("profile"):
                measured.profiles[name] = StepMeasurement(**result)
    return measured


def build_command(run: BenchmarkRun | list[str], args: argparse.Namespace, is_last_round: bool) -> list[str]:
    """Return the command of one round of a measurement."""
    if isinstance(run, list):
        return run
    if args.profile and is_last_round and run.kind != CEILING:
        run = replace(run, profile=True, trace=str(args.trace) if args.trace and run.kind == OURS else None)
    return run.command()


# --- report ---------------------------------------------------------------------------------------------------------
def format_report(comparison: ComparisonPlan, measured: ModelResults) -> str:
    """Return the tables of matrix products and of steps, and the speedups of our step."""
    ours, rates, results = comparison.ours, measured.ceilings[comparison.dtype], measured.results
    lines = [
        f"{Path(ours.model).stem}: {comparison.num_params / 1e6:.1f} million parameters, "
        f"{comparison.flops_per_token / 1e9:.3f} GFLOP per token; "
        f"{ours.batch_size} x {ours.seq_len} tokens, {' '.join(ours.flags)}",
        f"{'matrix products':26}{'layer shapes':>14}{'square':>12}  GFLOP/s",
    ]
    lines += [
        f"{dtype:26}{flops['own'] / 1e9:14.0f}{flops['square'] / 1e9:12.0f}"
        for dtype, flops in measured.ceilings.items()
    ]
    ceilings = {"MFU layers": rates["own"], "MFU square": rates["square"]}
    if ours.device == "cuda" and (peak := device_peak_flops(torch.device("cuda"), getattr(torch, comparison.dtype))):
        ceilings["MFU sheet"] = peak
    headings = ("tokens/s", "min", "max", *ceilings, "GB", "1st step s")
    lines.append(f"{'':26}" + "".join(f"{heading:>12}" for heading in headings))
    for name, result in results.items():
        speed = statistics.median(result.speeds)
        numbers = [f"{value:.{0 if value >= 100 else 1}f}" for value in (speed, min(result.speeds), max(result.speeds))]
        numbers += [f"{speed * comparison.flops_per_token / ceiling:.1%}" for ceiling in ceilings.values()]
        numbers.append(f"{max(result.memory_bytes) / 1e9:.2f}" if result.memory_bytes else "")
        numbers.append(f"{statistics.median(result.first_step_s):.1f}" if result.first_step_s else "")
        lines.append(f"{name:26}" + "".join(f"{number:>12}" for number in numbers))
    lines += [format_speedup(name, results[OURS], result) for name, result in results.items() if name != OURS]
    return "\n".join(lines)


def format_speedup(name: str, ours: Results, other: Results) -> str:
    ratios = [our_speed / speed for our_speed, speed in zip(ours.round_speeds, other.round_speeds, strict=True)]
    median = statistics.median(ours.speeds) / statistics.median(other.speeds)
    return f"ours: {median:.2f} times the speed of {name} (rounds: {min(ratios):.2f} to {max(ratios):.2f})"


def describe_machine(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"CPU, {args.threads} threads, torch {torch.__version__}"
    name = torch.cuda.get_device_name()
    peak = peak_16_bit_flops(name)
    data_sheet = "" if peak is None else f" (16-bit peak by its data sheet: {peak / 1e12:.0f} TFLOP/s)"
    return f"{name}{data_sheet}, torch {torch.__version__}"


def set_defaults(args: argparse.Namespace) -> None:
    """Set the defaults that depend on the device. Raise ConfigError for invalid values."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warmup, steps = (5, 20) if args.device == "cuda" else (1, 3)
    args.warmup = warmup if args.warmup is None else args.warmup
    args.steps = steps if args.steps is None else args.steps
    if min(args.steps, args.rounds, args.batch_size) < 1 or args.warmup < 0:
        raise ConfigError("--steps, --rounds and --batch-size: expected at least 1; --warmup: at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device")
    args.threads = args.threads or available_cpus()


def main(argv: Sequence[str]) -> None:
    args, flags = make_parser().parse_known_args(argv)
    if args.trace is not None and (len(args.model) > 1 or not args.profile):
        raise ConfigError("--trace: requires --profile and a single --model")
    set_defaults(args)
    machine = describe_machine(args)
    print(f"{machine}; {args.rounds} rounds of {args.steps} steps after {args.warmup} warm-up steps", flush=True)
    output: dict[str, Any] = {"machine": machine, "arguments": list(argv), "models": {}}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        comparisons = {model: plan_comparison(args, flags, model, Path(folder)) for model in args.model}
        for comparison in comparisons.values():
            check_peer(comparison, args)
        for model, comparison in comparisons.items():
            measured = measure(comparison, args)
            print(f"\n{format_report(comparison, measured)}", flush=True)
            for name, step in measured.profiles.items():
                assert step.profile is not None and step.profiled_s is not None
                print(f"\n{name}, one step:\n{profile_table(step.profile, step.profiled_s)}", flush=True)
            numbers = {"flops_per_token": comparison.flops_per_token, "tokens_per_step": comparison.tokens}
            output["models"][model] = {**numbers, **asdict(measured)}
    if args.json is not None:
        write_text(args.json, to_json(output, indent=1))


if __name__ == "__main__":
    sys.exit(run_cli(main))
