"""Measure what DPO and GRPO change in a tiny model, over several seeds, and print a table.

    python scripts/checks/check_preferences.py --dir preferences --seeds 0 1 2

A model of 1.1M parameters is pretrained on counting and fine-tuned on 200 conversations about sums of two digits
(scripts/e2e/posttrain_data.py), once per seed. DPO then prefers the marked style of answers: the margin and accuracy
are those of held-out pairs. GRPO rewards right answers: exact match is the share of all 100 questions that the greedy
answer of the fine-tuned and of the trained model gets right. A step whose result exists is skipped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from open_lm.errors import UserError, run_cli
from open_lm.storage import read_lines, write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file

ROOT = Path(__file__).resolve().parents[2]
E2E = ROOT / "scripts" / "e2e"
TRAINER = ["-m", "open_lm.main", "--workers", "0", "--precision", "fp32", "--multiple-data-passes"]
DPO = ["--global-batch-size", "32", "--lr", "1e-4", "--warmup", "2", "--epochs", "2"]
GRPO = ["--reward", "exact_match", "--global-batch-size", "128", "--num-generations", "8", "--max-completion-tokens"]
GRPO += ["16", "--lr", "3e-4", "--lr-scheduler", "constant"]


def run(result: Path, words: list[str]) -> None:
    """Run a Python command, unless its result exists. Raise UserError with the end of its output if it fails."""
    if result.exists():
        return
    print("$ python " + shlex.join(words), flush=True)
    start_s = time.monotonic()
    output: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, *words], check=False, **output)
    if done.returncode:
        raise UserError(f"the command failed with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    print(f"  {time.monotonic() - start_s:.0f} s", flush=True)


def prepare(folder: Path, pretrain_tokens: int, documents: int) -> None:
    """Write the data and the pretrained model, which all seeds share."""
    run(folder / "student.json", [str(E2E / "posttrain_data.py"), str(folder), "--documents", str(documents)])
    common = ["--tokenizer", str(folder / "tokenizer"), "--seqlen", "64", "--num-workers", "1"]
    words = ["--input-files", str(folder / "pretrain.jsonl"), "--output-dir", str(folder / "text"), *common]
    run(text_manifest(folder), [str(ROOT / "datapreprocess" / "make_2048.py"), *words])
    words = ["--input-files", str(folder / "chats.jsonl"), "--output-dir", str(folder / "sft"), *common]
    run(
        folder / "sft" / "dataset.json",
        [str(ROOT / "datapreprocess" / "make_sft.py"), *words, "--chat-template", "chatml"],
    )
    words = ["--model", str(folder / "model.json"), "--dataset-manifest", str(text_manifest(folder))]
    words += ["--train-num-samples", str(pretrain_tokens), "--epochs", "1", "--global-batch-size", "32", "--lr", "3e-3"]
    words += ["--warmup", "20", "--wd", "0.1", "--data-key", "npy", "--logs", str(folder), "--name", "pretrain"]
    run(folder / "pretrain" / "checkpoints" / "epoch_1.pt", [*TRAINER, *words])


def text_manifest(folder: Path) -> Path:
    return folder / "text" / "64-v1" / "0" / "manifest.jsonl"


def train_seed(folder: Path, seed: int, sft_passes: int, grpo_steps: int) -> Path:
    """Fine-tune one model, and train it with DPO and, separately, with GRPO. Return the folder of the runs."""
    logs = folder / f"seed_{seed}"
    shared = ["--logs", str(logs), "--seed", str(seed)]
    words = ["--recipe", "sft", "--pretrained", str(folder / "pretrain"), "--global-batch-size", "16", "--lr", "3e-3"]
    words += ["--dataset-manifest", str(folder / "sft" / "manifest.jsonl"), "--epochs", str(sft_passes)]
    run(logs / "sft" / "checkpoints" / f"epoch_{sft_passes}.pt", [*TRAINER, *words, *shared, "--name", "sft"])
    words = ["--train-data", str(folder / "pairs.jsonl"), "--val-data", str(folder / "held_out_pairs.jsonl"), *DPO]
    start = ["--pretrained", str(logs / "sft"), *shared]
    run(logs / "dpo" / "checkpoints" / "model.json", ["-m", "open_lm.finetune.dpo", *start, *words, "--name", "dpo"])
    words = ["--train-data", str(folder / "prompts.jsonl"), *GRPO, "--max-steps", str(grpo_steps)]
    run(logs / "grpo" / "checkpoints" / "model.json", ["-m", "open_lm.finetune.grpo", *start, *words, "--name", "grpo"])
    report = [str(E2E / "posttrain_report.py"), str(folder), *(str(logs / name) for name in ("sft", "dpo", "grpo"))]
    run(logs / "stages.json", [*report, "--output", str(logs / "stages.json")])
    return logs


def seed_row(logs: Path) -> dict[str, float]:
    """Return the measured values of a seed."""
    rows = [json.loads(line) for line in read_lines(logs / "dpo" / "metrics.jsonl")]
    first, last = (next(row for row in order if "val/margin" in row) for order in (rows, rows[::-1]))
    stages: dict[str, Any] = {row["stage"]: row for row in json.loads((logs / "stages.json").read_text())}
    return {
        "margin, SFT": first["val/margin"],
        "margin, DPO": last["val/margin"],
        "accuracy of held-out pairs, DPO": last["val/accuracy"],
        "marked answers, SFT": stages["sft"]["answer_format"],
        "marked answers, DPO": stages["dpo"]["answer_format"],
        "exact match, SFT": stages["sft"]["exact_match"],
        "exact match, GRPO": stages["grpo"]["exact_match"],
    }


def main(argv: list[str]) -> None:
    style = argparse.RawDescriptionHelpFormatter
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="check_preferences.py", description=first, epilog=rest, formatter_class=style)
    parser.add_argument("--dir", type=user_file, required=True, help="folder for data, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--documents", type=int, default=2000, help="documents of text (default: %(default)s)")
    parser.add_argument("--pretrain-tokens", type=int, default=204800, help="tokens (default: %(default)s)")
    parser.add_argument("--sft-passes", type=int, default=16, help="passes of SFT (default: %(default)s)")
    parser.add_argument("--grpo-steps", type=int, default=60, help="updates of GRPO (default: %(default)s)")
    args = parser.parse_args(argv)
    prepare(args.dir, args.pretrain_tokens, args.documents)
    rows = {seed: seed_row(train_seed(args.dir, seed, args.sft_passes, args.grpo_steps)) for seed in args.seeds}
    write_text(args.dir / "results.json", to_json(rows, indent=2) + "\n")
    print("| | " + " | ".join(f"seed {seed}" for seed in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for name in next(iter(rows.values())):
        values = [row[name] for row in rows.values()]
        texts = [f"{value:.2f}" if name.startswith("margin") else f"{100 * value:.0f} %" for value in values]
        print(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    sys.exit(run_cli(main))
