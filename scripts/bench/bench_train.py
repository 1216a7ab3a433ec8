"""Tokens a second of a training step, the share of the machine that they use, memory, and where the time goes.

    python scripts/bench_train.py --model open_lm_11m open_lm_160m --against original
    python scripts/bench_train.py --model open_lm_1b --device cuda --torchcompile --profile --trace step.json.gz
    python scripts/bench_train.py --model open_lm_160m --precision fp32 --against my_module:my_function
    python scripts/bench_train.py --model open_lm_1b --torchcompile --against torchtitan \
        --peer-python .venv-titan/bin/python        # `make install-titan` makes it

Further flags are the trainer's own (--torchcompile, --activation-checkpointing op, --fp8, --accum-freq 2, …), and ours
is measured through what training runs: its session, optimizer and train_step, on random tokens. What it is measured
against is `original`, the plain recipe of original_recipe.py; `torchtitan`, its Llama 3 at the size of the model and
with the same flags (torchtitan_recipe.py); MODULE:FUNCTION, where function(model, precision, device) returns a
step(inputs, targets) -> loss, and is given the trainer's whole configuration too where it has a parameter `config`; or
a command that prints a line of JSON with tokens_per_second, whose words may hold {model}, {precision}, {device},
{batch_size} and {seq_len}.

Every measurement is a process of its own, and rounds alternate, so that what else the machine does falls on all. Shown
is the median of all steps with the least and the greatest. The share (MFU) is of the model's FLOPs, without
recomputation, in how fast the machine multiplies matrices in the same run: at the shapes of the
model's own linear layers, forward and backward, and at a large square; and in what a CUDA device's data sheet says.
Memory is the most that the process held beyond what it held before there was a model, on CUDA of the allocator; time to
the first step counts from there, and holds compilation. CUDA graphs, which torchtitan makes, cannot be looked into by
--profile.
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
from bench_train_worker import CEILING, OURS, Job, Measured, trainer_flags
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

PEERS = {"original": "original_recipe:build", "torchtitan": "torchtitan_recipe:build"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", nargs="+", default=["open_lm_11m"], help="names of configurations, or .json files")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--precision", default="amp_bfloat16", help="as the trainer's (default: amp_bfloat16)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence (default: the model's)")
    parser.add_argument("--steps", type=int, help="of each round that count (default: 3, on CUDA 20)")
    parser.add_argument("--warmup", type=int, help="steps before them that do not (default: 1, on CUDA 5)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of each process, on the CPU (default: one for each processor)")
    parser.add_argument(
        "--ceiling", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"],
        help="types whose ceiling is measured beside that of --precision (default: both)",
    )  # fmt: skip
    parser.add_argument("--against", metavar="NAME", help=f"{', '.join(PEERS)} or MODULE:FUNCTION")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(sys.executable), metavar="PYTHON",
        help="the interpreter that runs what --against names (default: this one)",
    )  # fmt: skip
    parser.add_argument("--against-command", metavar="COMMAND")
    parser.add_argument("--profile", action="store_true", help="show where the time of one more step goes")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write that profile of ours (.json or .json.gz)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


# --- what to measure ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Contenders:
    """What is measured for a model: a process's job, or a command, by name. `job` is ours, `dtype` that of --precision,
    `flops_per_token` the same for all."""

    jobs: dict[str, Job | list[str]]
    job: Job
    dtype: str
    flops_per_token: float
    num_params: int

    @property
    def tokens(self) -> int:
        return self.job.batch_size * self.job.seq_len


def contenders(args: argparse.Namespace, flags: list[str], model: str, folder: Path) -> Contenders:
    """ConfigError for settings that the trainer does not take."""
    shape = read_architecture(model)
    seq_len = args.seq_len or shape["seq_len"]
    flags = ["--precision", args.precision, *flags]
    config = Config.from_namespace(parse_args(trainer_flags(model, args.batch_size, flags)))
    path = folder / f"{Path(model).stem}.json"
    write_text(path, json.dumps({**chosen(config.model), **shape, "seq_len": seq_len}))
    dtype = str(compute_dtype(args.precision, args.device)).removeprefix("torch.")
    job = Job(
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
        meta = create_model(ModelConfig.from_object(replace(config.model, model=str(path))))
    jobs: dict[str, Job | list[str]] = {CEILING: replace(job, kind=CEILING), OURS: job}
    if args.against:
        jobs[args.against] = replace(job, kind=PEERS.get(args.against, args.against), python=str(args.peer_python))
    if args.against_command:
        values = {name: str(getattr(job, name)) for name in ("model", "precision", "device", "batch_size", "seq_len")}
        jobs["the command"] = [filled(word, values) for word in shlex.split(args.against_command)]
    return Contenders(jobs, job, dtype, model_flops_per_token(meta), sum(p.numel() for p in meta.parameters()))


def chosen(model: ModelConfig) -> dict[str, Any]:
    """What flags say of the model's shape: others read it from its file."""
    values = {spec.name: getattr(model, spec.name) for spec in ArchitectureConfig.specs() if not spec.no_effect}
    return {name: value for name, value in values.items() if value != getattr(ArchitectureConfig, name)}


def check(found: Contenders, args: argparse.Namespace) -> None:
    """ConfigError for what cannot be measured, before anything else is; another version of torch is said."""
    job = found.jobs.get(args.against)
    if not isinstance(job, Job):
        return
    version = run_once(replace(job, check=True).command(), args)["torch"]
    if version != torch.__version__:
        print(f"{args.against}: torch {version}", flush=True)


def filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


# --- measuring ------------------------------------------------------------------------------------------------------
def run_once(command: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON of the last line that the command prints; ConfigError with what it said where it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if args.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode == 0 and done.stdout.strip():
        try:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        except (ValueError, TypeError):
            done.stderr += f"the last line printed is no JSON object: {done.stdout.splitlines()[-1][:200]}"
    said = done.stderr.strip()[-4000:] or "it printed nothing"
    raise ConfigError(f"{' '.join(command[:2])} … ended with exit status {done.returncode}:\n{said}")


@dataclass
class Results:
    """Of one contender, over all rounds: seconds of steps (none for a command), tokens a second of each of them, and
    for each round seconds to the first step and bytes, where they are known."""

    speeds: list[float]
    round_speeds: list[float]
    first_step_s: list[float]
    memory_bytes: list[int]

    def add(self, found: dict[str, Any], tokens: int) -> None:
        """ConfigError where a command has not said its speed."""
        if "step_s" not in found and "tokens_per_second" not in found:
            raise ConfigError(f"--against-command: its JSON has no tokens_per_second, but {', '.join(found)}")
        steps = [tokens / s for s in found["step_s"]] if "step_s" in found else [float(found["tokens_per_second"])]
        self.speeds += steps
        self.round_speeds.append(statistics.median(steps))
        if "first_step_s" in found:
            self.first_step_s.append(found["first_step_s"])
        if "memory_bytes" in found:
            self.memory_bytes.append(found["memory_bytes"])


@dataclass
class Everything:
    """The results of all contenders of a model, the ceilings by type (the best of all rounds), and profiles."""

    results: dict[str, Results]
    ceilings: dict[str, dict[str, float]]
    profiles: dict[str, Measured]


def measure(found: Contenders, args: argparse.Namespace) -> Everything:
    """All rounds; with --profile the processes of the last one profile a further step."""
    every = Everything({name: Results([], [], [], []) for name in found.jobs if name != CEILING}, {}, {})
    for number in range(1, args.rounds + 1):
        for name, job in found.jobs.items():
            said = run_once(command(job, args, number == args.rounds), args)
            if name == CEILING:
                for dtype, rates in said.items():
                    before = every.ceilings.get(dtype, rates)
                    every.ceilings[dtype] = {key: max(rate, before[key]) for key, rate in rates.items()}
                continue
            every.results[name].add(said, found.tokens)
            if said.get("profile"):
                every.profiles[name] = Measured(**said)
    return every


def command(job: Job | list[str], args: argparse.Namespace, last: bool) -> list[str]:
    if isinstance(job, list):
        return job
    if args.profile and last and job.kind != CEILING:
        job = replace(job, profile=True, trace=str(args.trace) if args.trace and job.kind == OURS else None)
    return job.command()


# --- what is said ---------------------------------------------------------------------------------------------------
def report(found: Contenders, every: Everything) -> str:
    job, own, results = found.job, every.ceilings[found.dtype], every.results
    lines = [
        f"{Path(job.model).stem}: {found.num_params / 1e6:.1f} million parameters, "
        f"{found.flops_per_token / 1e9:.3f} GFLOP a token; "
        f"{job.batch_size} x {job.seq_len} tokens, {' '.join(job.flags)}",
        f"{'matrix products':26}{'own shapes':>12}{'square':>12}  GFLOP/s",
    ]
    lines += [
        f"{name:26}{rates['own'] / 1e9:12.0f}{rates['square'] / 1e9:12.0f}" for name, rates in every.ceilings.items()
    ]
    ceilings = {"own": own["own"], "square": own["square"]}
    if job.device == "cuda" and (sheet := device_peak_flops(torch.device("cuda"), getattr(torch, found.dtype))):
        ceilings["sheet"] = sheet
    heads = ("tokens/s", "least", "greatest", "MFU, own", *list(ceilings)[1:], "GB", "first s")
    lines.append(f"{'':26}" + "".join(f"{head:>10}" for head in heads))
    for name, result in results.items():
        speed = statistics.median(result.speeds)
        numbers = [f"{value:.{0 if value >= 100 else 1}f}" for value in (speed, min(result.speeds), max(result.speeds))]
        numbers += [f"{speed * found.flops_per_token / most:.1%}" for most in ceilings.values()]
        numbers.append(f"{max(result.memory_bytes) / 1e9:.2f}" if result.memory_bytes else "")
        numbers.append(f"{statistics.median(result.first_step_s):.1f}" if result.first_step_s else "")
        lines.append(f"{name:26}" + "".join(f"{number:>10}" for number in numbers))
    lines += [f"ours is {ratio(results[OURS], result)} of {name}" for name, result in results.items() if name != OURS]
    return "\n".join(lines)


def ratio(ours: Results, other: Results) -> str:
    rounds = [mine / its for mine, its in zip(ours.round_speeds, other.round_speeds, strict=True)]
    median = statistics.median(ours.speeds) / statistics.median(other.speeds)
    return f"{median:.2f} times the speed (rounds: {min(rounds):.2f} to {max(rounds):.2f})"


def machine(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"CPU, {args.threads} threads, torch {torch.__version__}"
    name = torch.cuda.get_device_name()
    peak = peak_16_bit_flops(name)
    said = "" if peak is None else f" (16-bit peak by its data sheet: {peak / 1e12:.0f} TFLOP/s)"
    return f"{name}{said}, torch {torch.__version__}"


def settle(args: argparse.Namespace) -> None:
    """Fill in what depends on the device."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warmup, steps = (5, 20) if args.device == "cuda" else (1, 3)
    args.warmup = warmup if args.warmup is None else args.warmup
    args.steps = steps if args.steps is None else args.steps
    if min(args.steps, args.rounds, args.batch_size) < 1 or args.warmup < 0:
        raise ConfigError("--steps, --rounds and --batch-size: expected at least 1; --warmup: at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    args.threads = args.threads or len(os.sched_getaffinity(0))


def main(argv: Sequence[str]) -> None:
    args, flags = make_parser().parse_known_args(argv)
    if args.trace is not None and (len(args.model) > 1 or not args.profile):
        raise ConfigError("--trace: goes with --profile and a single --model")
    settle(args)
    print(f"{machine(args)}; {args.rounds} rounds of {args.steps} steps after {args.warmup}", flush=True)
    everything: dict[str, Any] = {"machine": machine(args), "arguments": list(argv), "models": {}}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        plans = {model: contenders(args, flags, model, Path(folder)) for model in args.model}
        for found in plans.values():
            check(found, args)
        for model, found in plans.items():
            every = measure(found, args)
            print(f"\n{report(found, every)}", flush=True)
            for name, said in every.profiles.items():
                assert said.profile is not None and said.profiled_s is not None
                print(f"\n{name}, a step:\n{profile_table(said.profile, said.profiled_s)}", flush=True)
            numbers = {"flops_per_token": found.flops_per_token, "tokens_per_step": found.tokens}
            everything["models"][model] = {**numbers, **asdict(every)}
    if args.json is not None:
        write_text(args.json, json.dumps(everything, indent=1))


if __name__ == "__main__":
    sys.exit(run_cli(main))
