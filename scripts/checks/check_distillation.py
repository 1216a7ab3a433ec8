"""Train small students with and without a teacher, and compare their validation losses.

    python scripts/checks/check_distillation.py --folder distillation

The models predict bytes of real text: that of --data (a folder of .jsonl.zst files, or of .jsonl), or of the Python
installation's documentation. The teacher is trained first. For each seed, students of about a quarter of its size see
the same tokens in the same order, with the same initial weights and settings:

    none     cross entropy only
    online   with the teacher next to the student (--distill-model)
    cached   with the teacher's sampled distributions (cache_teacher, --distill-cache)
    random   like online, with the larger shape that prune gives
    pruned   the same from the weights of the pruned teacher

Prints a table, writes it to results.json in the folder, and fails if online or cached is not better than none, or
pruned than random, for every seed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from open_lm.config.architecture import COUNTS
from open_lm.data.manifest import ManifestEntry, write_manifest
from open_lm.data.shard_format import ShardWriter
from open_lm.errors import ConfigError, DataError, UserError, run_cli
from open_lm.storage import read_lines, write_text
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_path

SEQ_LEN, VOCAB_SIZE, END_OF_TEXT, BATCH, SHARDS = 128, 256, 0, 16, 4
TEACHER = {"hidden_dim": 96, "n_layers": 3, "n_heads": 4, "ffn_dim": 256}
STUDENT = {"hidden_dim": 48, "n_layers": 2, "n_heads": 2, "ffn_dim": 128}
ARMS = {"none": None, "online": "none", "cached": "none", "random": None, "pruned": "random"}  # way: compared with
PRUNED = {"layers": 2, "heads": 3, "ffn-dim": 192}
DRAWS, VALIDATION_SEQUENCES = 50, 256


def texts(folder: Path) -> Iterator[str]:
    """Yield documents, from every file of the folder in turn."""
    files = sorted([*folder.glob("*.jsonl.zst"), *folder.glob("*.jsonl")])
    if not files:
        raise DataError(f"--data {folder}: no .jsonl.zst or .jsonl file; give a folder of documents, or leave it out")
    readers = [_lines(path) for path in files]
    while readers:
        for reader in list(readers):
            line = next(reader, None)
            if line is None:
                readers.remove(reader)
            else:
                yield str(json.loads(line)["text"])


def _lines(path: Path) -> Iterator[str]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as plain:
            yield from plain
        return
    import zstandard

    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        yield from io.TextIOWrapper(stream, encoding="utf-8")


def python_documentation(folder: Path) -> Path:
    """Gather the documentation of the Python installation in a folder, and return the folder."""
    script = Path(__file__).resolve().parents[1] / "python_docs.py"
    command = [sys.executable, str(script), "--output-dir", str(folder), "--max-mb", "8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def write_data(folder: Path, source: Path, num_sequences: int) -> None:
    """Write validation and training shards of byte sequences: val/ and train/, each with a manifest."""
    total = num_sequences + VALIDATION_SEQUENCES
    stream, needed = bytearray(), total * (SEQ_LEN + 1)
    for text in texts(source):
        stream += text.encode().replace(b"\0", b" ") + bytes([END_OF_TEXT])
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise DataError(f"the text has {len(stream):,} bytes, but {needed:,} are needed; give more text or fewer steps")
    rows = np.frombuffer(bytes(stream[:needed]), np.uint8).reshape(total, SEQ_LEN + 1)
    order = np.random.default_rng(0).permutation(total)  # so that both sets have all kinds of documents
    parts = {"val": [rows[order[:VALIDATION_SEQUENCES]]]}
    parts["train"] = np.array_split(rows[order[VALIDATION_SEQUENCES:]], SHARDS)
    for name, shards in parts.items():
        entries = []
        for number, shard in enumerate(shards):
            stem = f"{number:08d}"
            with ShardWriter(folder / name / f"{stem}.tar", "npy", dtype=np.dtype(np.uint8)) as writer:
                writer.write_numbered(0, shard)
            entries.append(ManifestEntry(stem, len(shard)))
        write_manifest(folder / name / "manifest.jsonl", entries)


def train(  # noqa: PLR0917 - the settings of a run
    folder: Path, name: str, model: str, steps: int, seed: int, lr: float, *flags: str
) -> dict[str, Any]:
    """Train a model and return its validation result."""
    from open_lm.main import main

    data = ["--dataset-manifest", str(folder / "train" / "manifest.jsonl"), "--multiple-data-passes"]
    tokens = str(steps * BATCH * SEQ_LEN)
    main([
        "--model", str(folder / f"{model}.json"), *data, "--data-key", "npy", "--workers", "0",
        "--val-data", str(folder / "val" / "00000000.tar"), "--val-data-key", "npy", "--seed", str(seed),
        "--train-num-samples", tokens, "--epochs", "1", "--global-batch-size", str(BATCH), "--lr", str(lr),
        "--warmup", str(steps // 10), "--wd", "0.1", "--grad-clip-norm", "1", "--precision", "fp32",
        "--name", name, "--logs", str(folder / "logs"), "--log-every-n-steps", "100", *flags,
    ])  # fmt: skip
    lines = read_lines(str(folder / "logs" / name / "checkpoints" / "results.jsonl"))
    result: dict[str, Any] = json.loads(lines[-1])[0]
    return result


def arm_flags(arm: str, folder: Path, weight: float) -> list[str]:
    """Return the flags of a way to train the student."""
    if arm == "none":
        return []
    if arm == "pruned":
        return [*arm_flags("random", folder, weight), "--pretrained", str(folder / "pruned" / "epoch_0.pt")]
    flags = ["--distill-weight", str(weight)]
    if arm == "cached":
        return [*flags, "--distill-cache", str(folder / "train" / "teacher")]
    teacher = str(folder / "logs" / "teacher" / "checkpoints" / "epoch_1.pt")
    return [*flags, "--distill-pretrained", teacher, "--distill-precision", "fp32"]


def table(results: dict[str, list[float]], teacher_loss: float) -> str:
    """Return the validation losses as rows of a Markdown table."""
    seeds = len(next(iter(results.values())))
    lines = [
        f"| student | {' | '.join(f'seed {n}' for n in range(seeds))} | mean | change |",
        "|---" * (seeds + 3) + "|",
    ]
    for arm, losses in results.items():
        cells = [f"{loss:.4f}" for loss in (*losses, statistics.mean(losses))]
        base = ARMS[arm]
        change = f"{statistics.mean(losses) - statistics.mean(results[base]):+.4f}" if base else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {change} |")
    return "\n".join([*lines, f"teacher: {teacher_loss:.4f}"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=user_path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--data", type=user_path, help="folder of documents (default: of the Python installation)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=500, help="steps of the teacher (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each student (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=0.7, help="--distill-weight (default: %(default)s)")
    ways = [arm for arm, base in ARMS.items() if base]
    parser.add_argument("--arms", nargs="+", choices=ways, default=ways, help="ways to train with the teacher")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    if folder.exists():
        raise ConfigError(f"--folder {folder}: exists already; remove it, or choose another folder")
    folder.mkdir(parents=True)
    shape = {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "post_embed_norm": False, "weight_tying": False}
    for name, size in (("teacher", TEACHER), ("student", STUDENT)):
        assert set(COUNTS) <= {*size, *shape}
        write_text(folder / f"{name}.json", to_json({**size, **shape}))
    source = Path(args.data) if args.data else python_documentation(folder / "raw")
    write_data(folder, source, max(args.teacher_steps, args.steps) * BATCH)
    teacher = train(folder, "teacher", "teacher", args.teacher_steps, 100, 3e-3)
    weights = str(folder / "logs" / "teacher" / "checkpoints" / "epoch_1.pt")
    data = ["--data", str(folder / "train" / "manifest.jsonl"), "--data-key", "npy", "--batch-size", "64"]
    if "cached" in args.arms:
        from open_lm.finetune.cache_teacher import main as cache_teacher

        cache_teacher(["--pretrained", weights, *data, "--draws", str(DRAWS), "--precision", "fp32"])
    if "pruned" in args.arms:
        from open_lm.finetune.prune import main as prune

        prune([weights, str(folder / "pruned"), *data, *(f"--{key}={value}" for key, value in PRUNED.items())])
    results: dict[str, list[float]] = {arm: [] for arm in ARMS if arm in {*args.arms, *map(ARMS.get, args.arms)}}
    for seed in range(args.seeds):
        for arm, losses in results.items():
            model = "pruned/model" if arm in {"random", "pruned"} else "student"
            flags = arm_flags(arm, folder, args.weight)
            losses.append(train(folder, f"{arm}-{seed}", model, args.steps, seed, 5e-3, *flags)["loss"])
    text = table(results, teacher["loss"])
    write_text(folder / "results.json", to_json({"teacher": teacher["loss"], **results}))
    print(text)
    for arm in args.arms:
        base = str(ARMS[arm])
        if not all(loss < other for loss, other in zip(results[arm], results[base], strict=True)):
            raise UserError(f"{arm}: the loss is not lower than that of {base} for every seed")


if __name__ == "__main__":
    sys.exit(run_cli(main))
