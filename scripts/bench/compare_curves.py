"""Compare loss curves of our training step and of the original's recipe, from the same weights on the same batches.

    python scripts/compare_curves.py                                    # the golden run's model and data, 300 steps
    python scripts/compare_curves.py --model open_lm_11m --train-data 'shards/{00001..00010}.tar' --precision fp32

All other flags are the trainer's and apply to both: learning rate, schedule, weight decay, clipping, z-loss. Ours is
the training step of a run with these flags, and its loader yields the batches, in as many passes as needed. The
original is the plain recipe of original_recipe.py.

To show how far two runs of the same recipe differ because of rounding only, "twins" (--twins) train with the original's
recipe from weights that differ by one part in ten million. Differences of that size are noise.
"""

from __future__ import annotations

import argparse
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
from open_lm.storage.strict_json import to_json
from open_lm.system.names import shard_pattern, user_file, user_path

ROOT = Path(__file__).resolve().parents[2]
PERTURBATION = 1e-7  # relative perturbation of the twins' weights; about the rounding of float32
# The settings of the golden run, except its length.
GOLDEN = [
    *("--lr", "3e-3", "--wd", "0.1", "--warmup", "8", "--z-loss-coefficient", "1e-4", "--grad-clip-norm", "1.0"),
    *("--data-key", "json.gz"),
]
COLORS = ("#1f6fb4", "#d9822b", "#8a8a8a")

Curves = dict[str, list[float]]  # "ours", "original", "twin 1", ... -> the loss of each step


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", type=user_path, help="name of a model configuration, or a .json file (default: the golden run's)"
    )
    parser.add_argument("--train-data", type=shard_pattern, nargs="+", help="shards (default: the golden run's)")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32", "amp_bfloat16"],
        help="--precision of the trainer; one comparison for each",
    )
    parser.add_argument("--steps", type=int, default=300, help="(default: 300)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--twins", type=int, default=2, help="number of perturbed runs of the original (default: 2)")
    parser.add_argument("--json", type=user_file, metavar="FILE", help="write all curves to this file")
    parser.add_argument("--svg", type=user_file, metavar="FILE", help="draw the curves to this file")
    return parser


# --- training -------------------------------------------------------------------------------------------------------
def run_flags(args: argparse.Namespace, precision: str, trainer_flags: Sequence[str]) -> list[str]:
    """Return the flags of our training run."""
    golden = Path(os.environ.get("OPEN_LM_SHARED", ROOT.parent / "shared")) / "compat" / "run"
    if not (args.model and args.train_data) and not golden.is_dir():
        raise ConfigError(
            f"the golden run was not found in {golden}: pass --model and --train-data, or set OPEN_LM_SHARED to the "
            "folder that contains compat/run"
        )
    model = args.model or str(golden / "tiny_bytes.json")
    shards = args.train_data or [str(golden / "data" / "{00000001..00000006}.tar")]
    tokens = args.steps * args.batch_size * read_architecture(model)["seq_len"]
    flags = ["--model", model, "--train-data", *shards, "--global-batch-size", str(args.batch_size)]
    flags += ["--epochs", "1", "--train-num-samples", str(tokens), "--workers", "0", "--logs", "none"]
    return [*flags, "--precision", precision, *([] if args.train_data else GOLDEN), *trainer_flags]


def train(flags: Sequence[str], twins: int) -> Curves:
    """Train ours, the original and its twins on the batches of our loader; return their losses."""
    ours = OurStep(flags)
    session = ours.session
    weights = {name: value.detach().clone() for name, value in unwrap(session.model).state_dict().items()}
    recipes = {"original": build_recipe(ours, weights)}
    recipes |= {f"twin {n}": build_recipe(ours, perturb(weights, seed=n)) for n in range(1, twins + 1)}
    curves: Curves = {name: [] for name in ("ours", *recipes)}
    for step, (inputs, targets) in enumerate(batches(ours)):
        lr = ours.trainer.scheduler(step)
        curves["ours"].append(float(ours(inputs, targets)))
        for name, recipe in recipes.items():
            for group in recipe.optimizer.param_groups:
                group["lr"] = lr
            curves[name].append(float(recipe(inputs, targets)))
    return curves


def build_recipe(ours: OurStep, weights: Mapping[str, Tensor]) -> Recipe:
    """Return the original's training step with the given weights and the settings of our run."""
    config = ours.session.config
    device, precision = ours.session.runtime.device, config.precision.precision
    return build(config.model.model, precision, device, weights=weights, optim=config.optim)


def perturb(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return float32 weights, each number multiplied by 1 + PERTURBATION * normal."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    return {name: value * (1 + PERTURBATION * noise[name].to(value.device)) for name, value in weights.items()}


def batches(ours: OurStep) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B,T) of every step, on the device."""
    session = ours.session
    assert session.train_loader is not None
    for batch, _ in on_device(session.train_loader.batches(session.total_steps), session.runtime.device):
        yield batch.inputs, batch.targets


# --- report ---------------------------------------------------------------------------------------------------------
def differences(curves: Curves, name: str) -> list[float]:
    """Return the absolute difference of a curve from the original's at each step."""
    return [abs(loss - original) for loss, original in zip(curves[name], curves["original"], strict=True)]


def summary(curves: Curves) -> dict[str, float]:
    """Return the maximum and mean difference of ours from the original, and of the twins ("noise")."""
    ours = differences(curves, "ours")
    noise = [differences(curves, name) for name in curves if name.startswith("twin")]
    return {
        "first_loss": curves["original"][0],
        "last_loss": curves["original"][-1],
        "max_difference": max(ours),
        "mean_difference": statistics.fmean(ours),
        "max_noise": max(map(max, noise), default=0.0),
        "mean_noise": statistics.fmean(map(statistics.fmean, noise)) if noise else 0.0,
    }


def format_summary(precision: str, steps: int, values: Mapping[str, float]) -> str:
    return (
        f"{precision}: {steps} steps, original's loss from {values['first_loss']:.4f} to {values['last_loss']:.4f}\n"
        f"  difference of ours from the original: max {values['max_difference']:.2e}, "
        f"mean {values['mean_difference']:.2e}\n"
        f"  difference of twins from the original: max {values['max_noise']:.2e}, mean {values['mean_noise']:.2e}"
    )


def draw(all_curves: Mapping[str, Curves]) -> str:
    """Return an SVG with a row per precision: the losses on the left, their differences from the original's right."""
    width, height, gap = 420, 240, 50
    parts = []
    for row, (precision, curves) in enumerate(all_curves.items()):
        losses = {name: curves[name] for name in ("original", "ours")}
        errors = {name: differences(curves, name) for name in curves if name != "original"}
        for column, (title, lines) in enumerate((("loss", losses), ("difference from the original", errors))):
            left, top = gap + column * (width + gap), gap + row * (height + gap)
            parts.append(
                f'<g transform="translate({left},{top})">{panel(f"{precision}: {title}", lines, width, height)}</g>'
            )
    size = f'width="{2 * (width + gap) + gap}" height="{len(all_curves) * (height + gap) + gap}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def panel(title: str, lines: Mapping[str, Sequence[float]], width: int, height: int) -> str:
    """Return the SVG elements of curves over the steps, with the minimum and maximum value at the axis."""
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
    args, trainer_flags = make_parser().parse_known_args(argv)
    if args.steps < 1 or args.batch_size < 1 or args.twins < 0:
        raise ConfigError("--steps and --batch-size: expected at least 1; --twins: at least 0")
    all_curves: dict[str, Curves] = {}
    for precision in args.precision:
        all_curves[precision] = train(run_flags(args, precision, trainer_flags), args.twins)
        print(format_summary(precision, args.steps, summary(all_curves[precision])), flush=True)
    if args.json is not None:
        output = {name: {"summary": summary(curves), "curves": curves} for name, curves in all_curves.items()}
        write_text(args.json, to_json(output))
    if args.svg is not None:
        write_text(args.svg, draw(all_curves))


if __name__ == "__main__":
    sys.exit(run_cli(main))
