"""`coordinate-check`: show whether the sizes of activations depend on the width of the model."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.scaling.ladder_files import read_base
from open_lm.scaling.sweep import MUP, STANDARD, choose_models, mup_settings
from open_lm.scaling.sweep_command import add_model_flags
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

if TYPE_CHECKING:
    from open_lm.config.sections import Config
    from open_lm.report.figures import Figure
    from open_lm.scaling.coordinate_check import Check

_WIDTHS = (64, 128, 256, 512, 1024)
_BATCH = 8  # default of --global-batch-size
_SHOWN_STEPS = 4  # number of steps that a figure of sizes shows for each parametrization


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `coordinate-check`."""
    add = parser.add_argument
    add("page", nargs="?", type=user_path, metavar="PAGE.html", help="page to write; default: only print the results")
    add_model_flags(parser)
    add("--steps", type=int, default=10, help="number of updates (default: %(default)s)")
    add("--seeds", type=int, default=2, help="initializations that are averaged (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Train narrow and wide models for a few steps with and without muP, and compare their activations.

    Raises:
        ConfigError: fewer than two widths, or settings that the trainer rejects.
    """
    for name in ("steps", "seeds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: found {getattr(args, name)}, expected at least 1")
    base = read_base(args.base, args.set)
    widths = args.widths or ([] if args.models else _WIDTHS)
    models = choose_models(args.models, widths, base)
    found = [values["hidden_dim"] for values in models.values()]
    if len(found) < 2 or len(set(found)) < len(found):
        raise ConfigError(
            f"coordinate-check: found models of width {', '.join(map(str, found))}, expected at least two models of "
            "different widths, such as --widths 64 128 256"
        )
    mup = mup_settings(models.values(), args.mup_base_width)
    with tempfile.TemporaryDirectory() as folder:
        checks = [
            _check(name, models, {**extra, **base}, folder=Path(folder), steps=args.steps, seeds=args.seeds)
            for name, extra in ((STANDARD, {}), (MUP, mup))
        ]
    if args.page:
        storage.write_text(args.page, _page(checks))
    print(to_json([_values(item) for item in checks], indent=1) if args.json else check_text(checks))
    if args.page and not args.json:
        print(f"wrote {args.page}")


def _check(
    name: str,
    models: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
    *,
    folder: Path,
    steps: int,
    seeds: int,
) -> Check:
    """Measure the sizes of activations with one parametrization; `folder` is for temporary files."""
    from open_lm.scaling.coordinate_check import check

    configs = {values["hidden_dim"]: _config(values, base, folder, steps) for values in models.values()}
    return check(name, configs, steps, range(seeds))


def _config(architecture: Mapping[str, Any], base: Mapping[str, Any], folder: Path, steps: int) -> Config:
    """Return the settings of a model, whose file is written to `folder`. Raise ConfigError if they are invalid."""
    from open_lm.config.command_line import parse_args
    from open_lm.config.sections import Config

    model, settings = folder / f"{architecture['hidden_dim']}.json", folder / "settings.yaml"
    storage.write_text(model, to_json(dict(architecture)))
    batch = base.get("global_batch_size", _BATCH)
    if not isinstance(batch, int):
        raise ConfigError(f"global_batch_size: found {batch!r}, expected a number of sequences")
    values = {
        **base, "model": str(model), "global_batch_size": batch, "epochs": 1, "accum_freq": 1, "workers": 0,
        "train_num_samples": (steps + 1) * batch * architecture["seq_len"],
    }  # fmt: skip
    storage.write_text(settings, yaml.safe_dump(values))
    return Config.from_namespace(parse_args(["--config", str(settings)]))


def _values(item: Check) -> dict[str, Any]:
    slopes = {kind: item.slopes(kind).tolist() for kind in item.sizes}
    sizes = {kind: values.tolist() for kind, values in item.sizes.items()}
    return {
        "parametrization": item.name,
        "widths": list(item.widths),
        "sizes": sizes,
        "slopes": slopes,
        "failures": item.failures(),
    }


def check_text(checks: Sequence[Check]) -> str:
    """Return the table of slopes and the verdicts."""
    steps = len(next(iter(checks[0].sizes.values()))[0]) - 1
    shown = sorted({0, 1, round(steps / 2), steps})
    lines = [f"slope of log size over log width, {checks[0].widths[0]} to {checks[0].widths[-1]}, after n updates"]
    lines.append(f"{'parametrization':<16} {'kind':<20} " + " ".join(f"{f'n = {step}':>8}" for step in shown))
    for item in checks:
        lines += [
            f"{item.name:<16} {kind:<20} " + " ".join(f"{item.slopes(kind)[step]:>8.2f}" for step in shown)
            for kind in item.sizes
        ]
    lines += [verdict(item) for item in checks]
    return "\n".join(lines)


def verdict(item: Check) -> str:
    """Return a sentence that says whether a parametrization passes."""
    from open_lm.scaling.coordinate_check import TOLERANCE

    failures = item.failures()
    if not failures:
        return f"{item.name}: the sizes of activations do not depend on the width (slopes within {TOLERANCE})"
    return f"{item.name}: the sizes of activations depend on the width: {', '.join(failures)}"


def _page(checks: Sequence[Check]) -> str:
    from open_lm.report.figures import Figure, Page, Series
    from open_lm.report.markup import paragraph

    page = Page("Coordinate check", f"widths {', '.join(map(str, checks[0].widths))}")
    slopes = []
    for item in checks:
        figure = Figure(f"Slopes: {item.name}", "updates", "slope of log size over log width")
        figure.series = [
            Series(kind, range(len(item.slopes(kind))), item.slopes(kind), "lines+markers", color=color)
            for color, kind in enumerate(item.sizes)
        ]
        slopes.append(page.figure(figure))
    page.section("Result", *(paragraph(verdict(item)) for item in checks), *slopes)
    page.section("Sizes", *(page.figure(_sizes(kind, checks)) for kind in checks[0].sizes))
    return page.html()


def _sizes(kind: str, checks: Sequence[Check]) -> Figure:
    """Return the figure of the sizes of a kind over the width, after several numbers of updates."""
    from open_lm.report.figures import Figure, Series

    figure = Figure(f"Size of {kind}", "width", "root mean square")
    figure.x_log = figure.y_log = True
    steps = checks[0].sizes[kind].shape[1] - 1
    shown = sorted({round(steps * part / (_SHOWN_STEPS - 1)) for part in range(_SHOWN_STEPS)} | {0, steps})
    for number, item in enumerate(checks):
        for color, step in enumerate(shown):
            dash = ("dash", "solid")[number % 2]
            values = item.sizes[kind][:, step]
            figure.series.append(
                Series(f"{item.name}, {step} updates", item.widths, values, "lines+markers", color=color, dash=dash)
            )  # fmt: skip
    return figure
