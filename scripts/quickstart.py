"""Train and evaluate a small model from raw text, offline and within minutes.

    make quickstart            or: python scripts/quickstart.py --dir quickstart

Each step prints the command of this package that it runs. A step whose result exists is skipped, so an interrupted
quickstart continues when you start it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from python_docs import gather, train_tokenizer

from open_lm.errors import ConfigError, UserError, run_cli
from open_lm.storage import read_lines, write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
PROMPTS = ("The function returns", "This module provides", "Raises an exception if")
RUN_NAME = "run"
TRAINING_LINES = "Train Epoch|Validation on|saved|WARNING|ERROR|--resume latest"


@dataclass(frozen=True)
class QuickstartSettings:
    """The folder and the sizes of the quickstart."""

    folder: Path
    text_mb: float
    train_tokens: int
    epochs: int
    vocab_size: int
    seq_len: int
    processes: int

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer.json")

    @property
    def model(self) -> str:
        return str(self.folder / "model.json")

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def untrained_checkpoint(self) -> Path:
        return self.folder / "untrained.pt"

    @property
    def final_checkpoint(self) -> Path:
        return self.logs / RUN_NAME / "checkpoints" / f"epoch_{self.epochs}.pt"

    @property
    def valid_shards(self) -> str:
        return str(self.manifest("valid").parent / "*.tar")

    def manifest(self, split: str) -> Path:
        return self.folder / "shards" / split / f"{self.seq_len}-v1" / "0" / "manifest.jsonl"

    def result(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def run(command: list[str], show: str = "") -> list[str]:
    """Print a command, run it, and return the lines of its output.

    Lines that match the regular expression `show` are printed immediately; "" prints none.
    """
    print("  $ " + shlex.join(["python" if word == sys.executable else word for word in command]), flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    lines = []
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if show and re.search(show, line):
                print("  " + lines[-1], flush=True)
    if process.returncode != 0:
        raise UserError(f"the command failed with exit code {process.returncode}; run the quickstart again to continue")
    return lines


def gather_text(settings: QuickstartSettings) -> None:
    counts = gather(str(settings.folder / "raw"), settings.text_mb)
    write_text(settings.result("text"), to_json(counts))
    print(f"  {counts['train_bytes'] / 1e6:.1f} MB for training, {counts['valid_bytes'] / 1e6:.1f} MB for validation")


def train_quickstart_tokenizer(settings: QuickstartSettings) -> None:
    files = sorted((settings.folder / "raw").glob("train-*.jsonl.zst"))
    size = train_tokenizer(files, Path(settings.tokenizer), settings.vocab_size)
    print(f"  vocabulary of {size:,} tokens")


def make_shards(settings: QuickstartSettings) -> None:
    for split, pattern in (("valid", "valid.jsonl.zst"), ("train", "train-*.jsonl.zst")):
        command = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py")]
        command += ["--input-files", str(settings.folder / "raw" / pattern)]
        command += ["--output-dir", str(settings.folder / "shards" / split), "--tokenizer", settings.tokenizer]
        run([*command, "--seqlen", str(settings.seq_len), "--num-workers", "2"], show=".")


def create_untrained(settings: QuickstartSettings) -> None:
    """Save the model with the initial weights of the training run, for comparison."""
    from open_lm.checkpoint.files import write_file
    from open_lm.config.command_line import parse_args
    from open_lm.model.transformer import create_model

    config: dict[str, Any] = {"hidden_dim": 128, "n_layers": 4, "n_heads": 4, "seq_len": settings.seq_len}
    config |= {"vocab_size": settings.vocab_size, "post_embed_norm": False, "weight_tying": False}
    config |= {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True}
    write_text(settings.model, to_json(config, indent=2) + "\n")
    model = create_model(parse_args(["--model", settings.model]))
    model.reset_parameters(seed=0)
    write_file(
        str(settings.folder / "untrained.pt"), {"epoch": 0, "name": "untrained", "state_dict": model.state_dict()}
    )
    print(f"  {sum(p.numel() for p in model.parameters()):,} parameters")


def evaluation_command(checkpoint: Path, settings: QuickstartSettings) -> list[str]:
    command = [sys.executable, "-m", "open_lm.main", "--model", settings.model, "--pretrained", str(checkpoint)]
    command += ["--val-data", settings.valid_shards]
    command += ["--data-key", "npy", "--val-seq-ci", "--precision", "fp32", "--global-val-batch-size", "8"]
    return [*command, "--workers", "0", "--logs", str(settings.logs)]


def evaluate(settings: QuickstartSettings, name: str, checkpoint: Path) -> None:
    shutil.rmtree(settings.logs / f"evaluate-{name}", ignore_errors=True)  # left by an interrupted evaluation
    run([*evaluation_command(checkpoint, settings), "--name", f"evaluate-{name}"])
    results = read_lines(settings.logs / f"evaluate-{name}" / "checkpoints" / "results.jsonl")
    outcome = json.loads(results[-1])[0]
    valid_bytes = json.loads(settings.result("text").read_text())["valid_bytes"]
    outcome["bits_per_byte"] = outcome["loss"] * outcome["tokens"] / math.log(2) / valid_bytes
    write_text(settings.result(f"evaluation-{name}"), to_json(outcome))
    low, high = outcome["loss_sequences_lower_95"], outcome["loss_sequences_upper_95"]
    interval = f"95 % confidence interval {low:.3f} to {high:.3f}"
    print(f"  validation loss {outcome['loss']:.3f} ({interval}) on {outcome['tokens']:,} tokens")


def sample(settings: QuickstartSettings, name: str, checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--model", settings.model]
    command += ["--checkpoint", str(checkpoint), "--tokenizer", settings.tokenizer, "--max-new-tokens", "24"]
    command += ["--temperature", "0.7", "--seed", "1", "--json"]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    lines = run(command)
    write_text(settings.result(f"samples-{name}"), to_json([json.loads(line) for line in lines]))
    for line in lines:
        item = json.loads(line)
        print(f"  {item['prompt']!r} -> {item['completion']!r}")


def train(settings: QuickstartSettings) -> None:
    command = [sys.executable, "-m", "open_lm.utils.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(settings.processes), "-m", "open_lm.main", "--model", settings.model]
    command += ["--dataset-manifest", str(settings.manifest("train"))]
    command += ["--multiple-data-passes", "--data-key", "npy", "--workers", "1", "--fsdp", "--precision", "fp32"]
    command += ["--val-data", settings.valid_shards]
    command += ["--train-num-samples", str(settings.train_tokens // settings.epochs), "--epochs", str(settings.epochs)]
    command += ["--global-batch-size", "8", "--lr", "3e-3", "--warmup", "40", "--wd", "0.1", "--beta2", "0.95"]
    command += ["--grad-clip-norm", "1", "--log-every-n-steps", "40", "--report-to", "tensorboard"]
    run([*command, "--logs", str(settings.logs), "--name", RUN_NAME, "--resume", "latest"], show=TRAINING_LINES)


def check_settings(settings: QuickstartSettings) -> None:
    """Save the settings. Raise ConfigError if the folder contains results of other settings."""
    path = settings.result("settings")
    current = {name: value for name, value in asdict(settings).items() if name not in ("folder", "processes")}
    saved = json.loads(path.read_text()) if path.exists() else current
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value]
    if changed:
        raise ConfigError(
            f"--dir {settings.folder}: contains results of other settings ({', '.join(changed)}); use another --dir, "
            "or the same settings to continue"
        )
    write_text(path, to_json(current))


def steps(settings: QuickstartSettings) -> list[tuple[str, Path, Callable[[], None]]]:
    """Return (title, file that exists once the step is done, function) of each step, in order."""
    result, untrained, final = settings.result, settings.untrained_checkpoint, settings.final_checkpoint
    return [
        ("Gather text from the Python installation", result("text"), lambda: gather_text(settings)),
        ("Train a tokenizer", Path(settings.tokenizer), lambda: train_quickstart_tokenizer(settings)),
        ("Tokenize, shuffle and write shards", settings.manifest("train"), lambda: make_shards(settings)),
        ("Create the model", untrained, lambda: create_untrained(settings)),
        (
            "Evaluate the untrained model",
            result("evaluation-before"),
            lambda: evaluate(settings, "before", untrained),
        ),
        (
            "Generate text with the untrained model",
            result("samples-before"),
            lambda: sample(settings, "before", untrained),
        ),
        ("Train the model with FSDP", final, lambda: train(settings)),
        ("Evaluate the trained model", result("evaluation-after"), lambda: evaluate(settings, "after", final)),
        ("Generate text with the trained model", result("samples-after"), lambda: sample(settings, "after", final)),
    ]


def average_speed(training: list[dict[str, Any]]) -> float:
    """Return the tokens per second of all steps, from the training lines of metrics.jsonl; without validations."""
    first_steps = [0, *(row["step"] for row in training[:-1])]
    seconds = sum(
        (row["step"] - first) * row["train/batch_time"] for first, row in zip(first_steps, training, strict=True)
    )
    return float(training[-1]["tokens"] / seconds)


def summary(settings: QuickstartSettings) -> str:
    """Return a table of the results."""

    def load(name: str) -> Any:
        return json.loads(settings.result(name).read_text())

    before, after = load("evaluation-before"), load("evaluation-after")
    metrics = read_lines(settings.logs / RUN_NAME / "metrics.jsonl")
    training = [row for row in map(json.loads, metrics) if "train/loss" in row]
    rows = [
        (
            "training text",
            f"{load('text')['train_bytes'] / 1e6:.1f} MB from {load('text')['train_documents']} documents",
        ),
        ("trained tokens", f"{training[-1]['tokens']:,}"),
        (
            "training speed",
            f"{average_speed(training):,.0f} tokens/s on average, on {settings.processes} processes",
        ),
        ("validation loss", f"{before['loss']:.3f} before, {after['loss']:.3f} after training"),
        ("bits per byte", f"{before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after training"),
        ("checkpoints", str(settings.final_checkpoint.parent)),
        ("shards", str(settings.manifest("train").parent)),
        ("training curves", f"tensorboard --logdir {settings.logs}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def next_commands(settings: QuickstartSettings) -> str:
    return (
        "Next:\n"
        f"  python {ROOT / 'scripts' / 'generate.py'} --checkpoint {settings.final_checkpoint} \\\n"
        "      --prompt 'Return the'     # generate more text, with the run's tokenizer\n"
        "  python -m open_lm.main --help     # all training flags; README.md shows how to train on your own text\n"
        "  make install-eval                 # install the in-context-learning evaluation"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=user_path, default="quickstart", help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--text-mb", type=float, default=4, help="maximum megabytes of text (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=1_200_000, help="number of training tokens (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="number of checkpoints (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="vocabulary size of the tokenizer (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="number of training processes (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = Path(os.path.relpath(args.dir))
    folder.mkdir(parents=True, exist_ok=True)
    settings = QuickstartSettings(folder, args.text_mb, args.tokens, args.epochs, args.vocab_size, 256, args.processes)

    check_settings(settings)
    plan = steps(settings)
    for number, (title, result, action) in enumerate(plan, start=1):
        if result.exists():
            print(f"[{number}/{len(plan)}] {title}: already done ({result})", flush=True)
            continue
        print(f"[{number}/{len(plan)}] {title}", flush=True)
        start = time.monotonic()
        action()
        print(f"  done in {time.monotonic() - start:.0f} s", flush=True)
    print(f"\n{summary(settings)}\n\n{next_commands(settings)}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
