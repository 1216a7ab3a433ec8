"""Compare the planner's speed and memory with published training runs.

    python scripts/checks/check_published.py          the rows that the planner's constants were not fitted to
    python scripts/checks/check_published.py --all    all rows
    python scripts/checks/check_published.py --fit    fit the constants to the other half and print them

The runs with their sources are in tests/planner/published_runs.json. A hash of each row decides whether it belongs to
the half that --fit uses. The exit code is 1 if fewer than 80 % of the held-out rows are within 15 % of the speed, or if
the memory of an eager run differs by more than 12 %.

Runs with float8 are not compared, because the planner has no speed for them. The peers hold the logits of a micro-batch
in full, where this trainer holds those of a chunk, and compute queries, keys, values and gate in separate products: the
plan for their memory takes both into account. Their figures are what the allocator reserves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from open_lm.config.command_line import parse_args
from open_lm.config.devices import Links, links_of, peak_16_bit_flops
from open_lm.config.layout import resolve_layout
from open_lm.config.sections import Config
from open_lm.errors import run_cli
from open_lm.planner.activations import products
from open_lm.planner.efficiency import Efficiency, efficiency_of
from open_lm.planner.memory import add_reserve, phases
from open_lm.planner.report import align_columns
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of
from open_lm.planner.traffic import Rates, step_time

PUBLISHED = Path(__file__).parents[2] / "tests" / "planner" / "published_runs.json"
PER_NODE = 8
SPEED_TOLERANCE, SPEED_SHARE, MEMORY_TOLERANCE = 0.15, 0.8, 0.12
GIB = 2**30
# Bytes per logit: in bfloat16 and float32, and the gradients of both.
WHOLE_LOGIT_BYTES = 12

PRECISIONS = {"bf16": ["--precision", "bf16"], "amp": ["--precision", "amp_bfloat16", "--fsdp-amp"]}
LAYOUTS = {
    "fsdp": [],
    "zero2": ["--fsdp-zero2"],
    "hsdp": ["--fsdp-hybrid"],
    "tp8": ["--tensor-parallel", "8"],
}


@dataclass(frozen=True)
class PublishedRun:
    """A row of the published runs. The fields are the columns of the file; `inter` overrides the network in bytes/s."""

    source: str
    model: str
    device: str
    devices: int
    seq_len: int
    micro_batch: int
    accum: int
    precision: str
    layout: str
    recompute: str
    compiled: bool
    tokens_per_s_per_device: float
    memory_gib: float | None
    settings: Mapping[str, Any]
    inter: float | None

    @property
    def is_held_out(self) -> bool:
        """Whether the constants are not fitted to this row. It depends only on the contents of the row."""
        columns = [value for name, value in vars(self).items() if name not in ("settings", "inter", "setup")]
        return hashlib.sha256(json.dumps(columns, allow_nan=False).encode()).digest()[0] % 2 == 1

    @property
    def links(self) -> Links:
        """The bandwidths of the links."""
        links = links_of(self.device)
        return links if self.inter is None else replace(links, inter=self.inter)

    @property
    def peak_flops(self) -> float:
        """The dense 16-bit FLOP/s of a device."""
        flops = peak_16_bit_flops(self.device)
        assert flops is not None
        return flops

    @cached_property
    def setup(self) -> TrainingSetup:
        """The planner's description of the run."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({**self.settings, "seq_len": self.seq_len}, file, allow_nan=False)
            file.flush()
            flags = ["--model", file.name, "--fsdp", "--activation-checkpointing", self.recompute]
            flags += ["--batch-size", str(self.micro_batch * self.accum), "--accum-freq", str(self.accum)]
            flags += [*PRECISIONS[self.precision], *LAYOUTS[self.layout]]
            config = Config.from_namespace(parse_args([*flags, *(["--torchcompile"] if self.compiled else [])]))
            layout = resolve_layout(config.parallel, self.devices, PER_NODE)
            return TrainingSetup(shape_of(config.model), config, layout, self.micro_batch)

    def planned_speed(self, efficiency: Efficiency | None = None, mfu: float | None = None) -> float:
        """Return the planned tokens/s of a device, with the efficiency or MFU given or that of the planner."""
        if mfu is None:
            mfu = (efficiency or efficiency_of(self.device)).mfu(self.setup.shape, self.compiled)
        rates = Rates(self.peak_flops, mfu, self.links.intra, self.links.inter, PER_NODE)
        return step_time(self.setup, rates).tokens_per_s / self.devices

    def planned_memory(self) -> float:
        """Return the planned bytes of a device, with whole logits and the products that the peer saves."""
        setup, shape = self.setup, self.setup.shape
        memory = next(iter(phases(setup)))
        memory = replace(memory, loss=WHOLE_LOGIT_BYTES * setup.tokens * shape.vocab_size)
        if self.recompute == "half-op":
            saved = sum(product.outputs for product in products(shape, 0)[::2])
            theirs = shape.width + shape.kv_width + shape.hidden + shape.dim  # of its queries, values, gate and output
            extra = round(setup.sizes.compute * setup.tokens * shape.n_layers * (theirs - saved))
            memory = replace(memory, activations=memory.activations + extra)
        return add_reserve(memory, setup).total


def read_runs(path: Path = PUBLISHED) -> list[PublishedRun]:
    """Return all published runs that the planner can express."""
    contents = json.loads(path.read_text(encoding="utf-8"))
    runs = []
    for row in contents["rows"]:
        values = dict(zip(contents["columns"], row, strict=True))
        inter = contents["sources"][values["source"]].get("inter_gb_s")
        run = PublishedRun(**values, settings=contents["models"][values["model"]], inter=inter and inter * 1e9)
        if run.precision in PRECISIONS:
            runs.append(run)
    return runs


def speed_errors(runs: Sequence[PublishedRun], speed: Callable[[PublishedRun], float]) -> list[float]:
    """Return the relative errors of the planned speeds."""
    return [speed(run) / run.tokens_per_s_per_device - 1 for run in runs]


def share_within(errors: Sequence[float], tolerance: float = SPEED_TOLERANCE) -> float:
    """Return the share of errors of at most `tolerance`."""
    return sum(abs(error) <= tolerance for error in errors) / len(errors)


# --- the fit --------------------------------------------------------------------------------------------------------
def fitted_runs(runs: Sequence[PublishedRun], device: str) -> list[PublishedRun]:
    """Return the eager runs on a device that the constants are fitted to."""
    return [run for run in runs if run.device.startswith(device) and not run.is_held_out and not run.compiled]


def misfit(efficiency: Efficiency, runs: Sequence[PublishedRun]) -> float:
    """Return the mean absolute logarithm of planned over measured speed."""
    errors = speed_errors(runs, lambda run: run.planned_speed(efficiency))
    return statistics.fmean(abs(math.log1p(error)) for error in errors)


def fit(runs: Sequence[PublishedRun]) -> Efficiency:
    """Return the efficiency with the smallest misfit."""
    import numpy
    from scipy import optimize

    def efficiency(logarithms: Sequence[float]) -> Efficiency:
        products, overhead, attention = numpy.exp(logarithms).tolist()
        return Efficiency(products, overhead, attention, "")

    start = numpy.log([0.5, 500.0, 0.5])
    found = optimize.minimize(
        lambda x: misfit(efficiency(x), runs), start, method="Nelder-Mead", options={"xatol": 1e-3}
    )
    return efficiency(found.x)


# --- the report -----------------------------------------------------------------------------------------------------
FIT_DEVICES = ("A100", "H100")


def speed_table(runs: Sequence[PublishedRun]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the comparison."""
    yield ("source", "model", "device", "devices", "length", "batch", "accum", "recompute", "compiled", "measured",
           "planned", "error")  # fmt: skip
    for run in runs:
        planned = run.planned_speed()
        yield (run.source, run.model, run.device, str(run.devices), str(run.seq_len), str(run.micro_batch),
               str(run.accum), run.recompute, "yes" if run.compiled else "no", f"{run.tokens_per_s_per_device:,.0f}",
               f"{planned:,.0f}", f"{planned / run.tokens_per_s_per_device - 1:+.0%}")  # fmt: skip


def memory_table(runs: Sequence[PublishedRun]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the memory comparison."""
    yield ("source", "model", "device", "devices", "compiled", "measured", "planned", "error")
    for run in runs:
        assert run.memory_gib is not None
        planned = run.planned_memory() / GIB
        yield (run.source, run.model, run.device, str(run.devices), "yes" if run.compiled else "no",
               f"{run.memory_gib:.1f} GiB", f"{planned:.1f} GiB", f"{planned / run.memory_gib - 1:+.0%}")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Print the comparison, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compare the fitted rows too")
    parser.add_argument("--fit", action="store_true", help="fit the constants and print them")
    args = parser.parse_args(argv)
    runs = read_runs()
    if args.fit:
        for device in FIT_DEVICES:
            found = fit(fitted_runs(runs, device))
            print(
                f"{device}: products={found.products:.3f}, overhead={found.overhead:.0f}, "
                f"attention={found.attention:.3f}"
            )
        return
    compared = runs if args.all else [run for run in runs if run.is_held_out]
    print(align_columns(list(speed_table(compared)), left=3))
    errors = speed_errors(compared, PublishedRun.planned_speed)
    assumed = speed_errors(compared, lambda run: run.planned_speed(mfu=0.45))
    share = share_within(errors)
    print(
        f"\n{len(errors)} rows: {share:.0%} within {SPEED_TOLERANCE:.0%} of the speed, median error "
        f"{statistics.median(map(abs, errors)):.1%}. With one MFU of 45 %: {share_within(assumed):.0%}\n"
    )
    with_memory = [run for run in runs if run.memory_gib is not None]
    print(align_columns(list(memory_table(with_memory)), left=3))
    eager = [run.planned_memory() / GIB / (run.memory_gib or 1) - 1 for run in with_memory if not run.compiled]
    if share < SPEED_SHARE or share_within(eager, MEMORY_TOLERANCE) < 1:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_cli(main))
