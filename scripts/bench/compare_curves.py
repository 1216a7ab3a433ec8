"""Loss curves of our training step and of the original's recipe: the same weights to start from, the same batches.

    python scripts/compare_curves.py                                    # the golden run's model and data, 300 steps
    python scripts/compare_curves.py --model open_lm_11m --train-data 'shards/{00001..00010}.tar' --precision fp32

Further flags are the trainer's own, for both: learning rate, schedule, weight decay, clipping, z-loss. Ours is the step
of training as a run with these flags has it; its loader gives the batches, in as many passes as they take. The original
is the plain recipe of original_recipe.py.

How far two runs of one recipe drift apart by rounding alone is measured beside it: the same recipe once more from
weights that differ by one part in ten million (--twins times). Differences of that size mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from original_recipe import Recipe, build
from our_step import OurStep
from torch import Tensor

from open_lm.config.architecture import read_architecture
from open_lm.data.device import on_device
from open_lm.errors import ConfigError, run_cli
from open_lm.parallel.parallelize import unwrap
from open_lm.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
PERTURBATION = 1e-7  # of the twins' weights, relative; about the rounding of float32
# How the golden run was trained, but for its length.
GOLDEN = [
    *("--lr", "3e-3", "--wd", "0.1", "--warmup", "8", "--z-loss-coefficient", "1e-4", "--grad-clip-norm", "1.0"),
    *("--data-key", "json.gz"),
]
COLORS = ("#1f6fb4", "#d9822b", "#8a8a8a")

Curves = dict[str, list[float]]  # by name: ours, original, twin 1, …; a loss for each step


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="name or .json file (default: the golden run's)")
    parser.add_argument("--train-data", nargs="+", help="shards (default: the golden run's)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "amp_bfloat16"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step (default: 8)")
    parser.add_argument("--twins", type=int, default=2, help="runs that show the noise (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all curves")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them")
    return parser


# --- training -------------------------------------------------------------------------------------------------------
def run_flags(args: argparse.Namespace, precision: str, more: Sequence[str]) -> list[str]:
    """The command line of the training run."""
    golden = Path(os.environ.get("OPEN_LM_SHARED", ROOT.parent / "shared")) / "compat" / "run"
    if not (args.model and args.train_data) and not golden.is_dir():
        raise ConfigError(
            f"the golden run is not in {golden}: give --model and --train-data, or set OPEN_LM_SHARED to its folder"
        )
    model = args.model or str(golden / "tiny_bytes.json")
    shards = args.train_data or [str(golden / "data" / "{00000001..00000006}.tar")]
    tokens = args.steps * args.batch_size * read_architecture(model)["seq_len"]
    flags = ["--model", model, "--train-data", *shards, "--global-batch-size", str(args.batch_size)]
    flags += ["--epochs", "1", "--train-num-samples", str(tokens), "--workers", "0", "--logs", "none"]
    return [*flags, "--precision", precision, *([] if args.train_data else GOLDEN), *more]


def train(flags: Sequence[str], twins: int) -> Curves:
    """The losses of ours, the original and its twins, all on the batches of our loader."""
    ours = OurStep(flags)
    session = ours.session
    weights = {name: value.detach().clone() for name, value in unwrap(session.model).state_dict().items()}
    recipes = {"original": recipe(ours, weights)}
    recipes |= {f"twin {n}": recipe(ours, perturbed(weights, seed=n)) for n in range(1, twins + 1)}
    curves: Curves = {name: [] for name in ("ours", *recipes)}
    for step, (inputs, targets) in enumerate(batches(ours)):
        lr = ours.trainer.scheduler(step)
        curves["ours"].append(float(ours(inputs, targets)))
        for name, other in recipes.items():
            for group in other.optimizer.param_groups:
                group["lr"] = lr
            curves[name].append(float(other(inputs, targets)))
    return curves


def recipe(ours: OurStep, weights: Mapping[str, Tensor]) -> Recipe:
    """The original's step from these weights, with the settings of our run."""
    config = ours.session.config
    device, precision = ours.session.runtime.device, config.precision.precision
    return build(config.model.model, precision, device, weights=weights, optim=config.optim)


def perturbed(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Each number of float32 weights times 1 + PERTURBATION * normal."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    return {name: value * (1 + PERTURBATION * noise[name].to(value.device)) for name, value in weights.items()}


def batches(ours: OurStep) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B,T) of every step, on the device."""
    session = ours.session
    assert session.train_loader is not None
    for batch, _ in on_device(session.train_loader.batches(session.total_steps), session.runtime.device):
        yield batch.inputs, batch.targets


# --- what is said ---------------------------------------------------------------------------------------------------
def differences(curves: Curves, name: str) -> list[float]:
    """How far a curve is from the original's at each step."""
    return [abs(one - other) for one, other in zip(curves[name], curves["original"], strict=True)]


def summary(curves: Curves) -> dict[str, float]:
    """Greatest and mean difference of ours from the original, and the noise: those of the twins."""
    mine = differences(curves, "ours")
    noise = [differences(curves, name) for name in curves if name.startswith("twin")]
    return {
        "first_loss": curves["original"][0],
        "last_loss": curves["original"][-1],
        "max_difference": max(mine),
        "mean_difference": statistics.fmean(mine),
        "max_noise": max(map(max, noise), default=0.0),
        "mean_noise": statistics.fmean(map(statistics.fmean, noise)) if noise else 0.0,
    }


def described(precision: str, steps: int, found: Mapping[str, float]) -> str:
    return (
        f"{precision}: {steps} steps, the original's loss from {found['first_loss']:.4f} to {found['last_loss']:.4f}\n"
        f"  ours from the original: at most {found['max_difference']:.2e}, in the mean {found['mean_difference']:.2e}\n"
        f"  the original from itself: at most {found['max_noise']:.2e}, in the mean {found['mean_noise']:.2e}"
    )


def drawing(all_curves: Mapping[str, Curves]) -> str:
    """An SVG with a row for each precision: the losses, and beside them how far they are from the original's."""
    width, height, gap = 420, 240, 50
    parts = []
    for row, (precision, curves) in enumerate(all_curves.items()):
        losses = {name: curves[name] for name in ("original", "ours")}
        apart = {name: differences(curves, name) for name in curves if name != "original"}
        for column, (title, lines) in enumerate((("loss", losses), ("difference from the original", apart))):
            left, top = gap + column * (width + gap), gap + row * (height + gap)
            parts.append(
                f'<g transform="translate({left},{top})">{panel(f"{precision}: {title}", lines, width, height)}</g>'
            )
    size = f'width="{2 * (width + gap) + gap}" height="{len(all_curves) * (height + gap) + gap}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def panel(title: str, lines: Mapping[str, Sequence[float]], width: int, height: int) -> str:
    """Curves over the steps, with the least and greatest value at the axis."""
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    span = (high - low) or 1.0
    parts = [f'<rect width="{width}" height="{height}" fill="none" stroke="#ccc"/><text y="-8">{title}</text>']
    parts += [f'<text x="-4" y="{y}" text-anchor="end">{value:.2g}</text>' for y, value in ((10, high), (height, low))]
    for number, (name, values) in enumerate(lines.items()):
        color = COLORS[min(number, len(COLORS) - 1)]
        step = width / max(len(values) - 1, 1)
        points = " ".join(f"{i * step:.1f},{height * (high - value) / span:.1f}" for i, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        parts.append(f'<text x="{width - 70}" y="{16 + 14 * number}" fill="{color}">{name}</text>')
    return "".join(parts)


def main(argv: Sequence[str]) -> None:
    args, more = make_parser().parse_known_args(argv)
    if args.steps < 1 or args.batch_size < 1 or args.twins < 0:
        raise ConfigError("--steps and --batch-size: expected at least 1; --twins: at least 0")
    all_curves: dict[str, Curves] = {}
    for precision in args.precision:
        all_curves[precision] = train(run_flags(args, precision, more), args.twins)
        print(described(precision, args.steps, summary(all_curves[precision])), flush=True)
    if args.json is not None:
        found = {name: {"summary": summary(curves), "curves": curves} for name, curves in all_curves.items()}
        write_text(args.json, json.dumps(found))
    if args.svg is not None:
        write_text(args.svg, drawing(all_curves))


if __name__ == "__main__":
    sys.exit(run_cli(main))
