"""Compare the data loader's tokens per second with the original's recipe and other libraries, on the same tokens.

    make install-bench                      # creates .venv-bench with the other libraries: their pins differ from ours
    python scripts/bench_loader.py          # for S3 see bench_s3.py

The tokens come from the corpus in OPEN_LM_SHARED (default: ../shared), or are random if it does not exist. "ours" is
the loader that training uses, with its worker processes, up to the batch that `on_device` receives. The others are in
bench_loader_peers.py. "raw text" is --train-text with the files of the corpus: with the tokenized units in the cache,
or one pass without a cache, which includes loading the tokenizer. Every measurement runs in a separate process and,
except for that pass, warms up first. Rounds alternate between the loaders, so that other load on the machine affects
all of them. Files are in the page cache. The table shows median, minimum and maximum per worker process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_loader_peers import PEER_LOADERS, SEQUENCES_IN_SHARD, measure

from open_lm.system.cpus import available_cpus
from open_lm.system.names import user_file, user_path

ROOT = Path(__file__).resolve().parents[2]
LENGTH, VOCAB_SIZE, END_OF_TEXT = 2049, 50432, 0
OURS = {"npy": "npy", "npy of 4 bytes": "npy-uint32", "json.gz": "json.gz", "txt": "txt"}
BASELINE = "ours, npy"
TEXTS = {"raw text, warm cache": "warm", "raw text, no cache": "none"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sequences", type=int, default=4096, help=f"number of sequences of {LENGTH} tokens (default: 4096)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes (default: 0 1 2)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per batch (default: 32)")
    parser.add_argument("--seconds", type=float, default=4, help="duration of a measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each loader (default: 3)")
    parser.add_argument("--work-dir", type=user_file, help="folder for the shards (default: a temporary one)")
    parser.add_argument(
        "--peer-python",
        type=user_file,
        default=ROOT / ".venv-bench" / "bin" / "python",
        metavar="PYTHON",
        help="interpreter that runs the other libraries (default: .venv-bench/bin/python)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="measure only the loaders with these names, as printed"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # runs in a separate process
    parser.add_argument("--data", type=user_path, help=argparse.SUPPRESS)
    parser.add_argument("--text", choices=list(TEXTS.values()), help=argparse.SUPPRESS)
    return parser


# --- the tokens -----------------------------------------------------------------------------------------------------
def corpus_tokens(shared: Path, count: int) -> np.ndarray:
    """Return the first `count` token ids of the corpus in `shared`, repeated if it is shorter: uint16 (count,)."""
    import orjson
    import zstandard
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "data" / "tokenizers" / "gpt-neox-20b.json"))
    ids: list[int] = []
    for path in sorted((shared / "data" / "raw").glob("*.jsonl.zst")):
        lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().strip().split(b"\n")
        for start in range(0, len(lines), 64):
            for encoding in tokenizer.encode_batch([orjson.loads(line)["text"] for line in lines[start : start + 64]]):
                ids += [*encoding.ids, END_OF_TEXT]
            if len(ids) >= count:
                return np.array(ids[:count], np.uint16)
    return np.resize(np.array(ids, np.uint16), count)


def shared_folder() -> Path:
    return Path(os.environ.get("OPEN_LM_SHARED", ROOT.parent / "shared"))


def make_data(folder: Path, sequences: int) -> str:
    """Write the tokens and shards of every format; return a description of their origin."""
    from open_lm.data.shard_format import ManifestEntry, ShardWriter, write_manifest

    shared = shared_folder()
    has_corpus = (shared / "data" / "raw").is_dir()
    count = sequences * LENGTH
    random = np.random.default_rng(0)
    ids = corpus_tokens(shared, count) if has_corpus else random.integers(0, VOCAB_SIZE, count, dtype=np.uint16)
    samples = ids.reshape(sequences, LENGTH)
    np.save(folder / "tokens.npy", samples)
    for name in OURS.values():
        (folder / name).mkdir()
        entries = []
        for start in range(0, sequences, SEQUENCES_IN_SHARD):
            shard = samples[start : start + SEQUENCES_IN_SHARD]
            stem = f"{start // SEQUENCES_IN_SHARD:05d}"
            with ShardWriter(folder / name / f"{stem}.tar", name.partition("-")[0]) as writer:
                writer.write_numbered(start, shard.astype(np.uint32) if name.endswith("uint32") else shard)
            entries.append(ManifestEntry(stem, len(shard)))
        write_manifest(folder / name / "manifest.jsonl", entries)
    return f"the corpus in {shared}" if has_corpus else "random ids"


def index_text(folder: Path, shared: Path) -> float:
    """Index the text of the corpus for --train-text in `folder`, with all units in its cache; return the seconds."""
    from open_lm.config.command_line import parse_args
    from open_lm.config.sections import Config
    from open_lm.distributed.processes import Runtime
    from open_lm.monitor.run_folder import RunPaths
    from open_lm.training.raw_text import prepare_text

    settings = text_settings(folder, shared)
    args = parse_args(["--logs", str(folder / "logs"), "--name", "run"])
    vars(args).update(settings, tokenizer=str(shared / "data" / "tokenizers" / "gpt-neox-20b.json"))
    started = time.perf_counter()
    with ExitStack() as stack:
        prepare_text(
            args, Config.from_namespace(args), {"seq_len": LENGTH - 1, "vocab_size": VOCAB_SIZE}, Runtime(),
            RunPaths(args.logs, args.name), stack=stack, is_stopped=lambda: False,
        )  # fmt: skip
    return time.perf_counter() - started


def text_settings(folder: Path, shared: Path) -> dict[str, Any]:
    """Return the settings of the training data that read the index in `folder`."""
    names = {"train_text": [str(shared / "data" / "raw" / "*.jsonl.zst")], "text_index": str(folder / "text")}
    return {**names, "cache_dir": str(folder / "text" / "units.cache"), "data_key": "npy"}


# --- our loader, in a separate process ------------------------------------------------------------------------------
def our_speed(args: argparse.Namespace) -> dict[str, float]:
    """Measure our loader on the manifest `args.data`, in endless passes."""
    from open_lm.config.sections import DataConfig
    from open_lm.data.loader import build_train_loader

    (workers,) = args.workers
    if getattr(args, "text", None):
        return text_speed(args, workers)
    data_key = Path(args.data).parent.name.partition("-")[0]
    data = DataConfig(dataset_manifest=[args.data], data_key=data_key, workers=workers, multiple_data_passes=True)
    loader = build_train_loader(data, seq_len=LENGTH - 1, vocab_size=VOCAB_SIZE, batch_size=args.batch_size)
    endless = (batch for batch, _ in loader.batches(sys.maxsize))
    return measure(endless, workers, args.seconds, lambda batch: batch.stored_ids.numel())


def text_speed(args: argparse.Namespace, workers: int) -> dict[str, float]:
    """Measure --train-text: endless passes with a warm cache, or one pass without a cache."""
    from open_lm.config.sections import DataConfig
    from open_lm.data.loader import build_train_loader

    data = DataConfig(**text_settings(Path(args.data), shared_folder()), workers=workers)
    if args.text == "none":
        data = replace(data, cache_limit="0")
    started = time.perf_counter()
    loader = build_train_loader(data, seq_len=LENGTH - 1, vocab_size=VOCAB_SIZE, batch_size=args.batch_size)
    if args.text == "warm":
        endless = (batch for batch, _ in loader.batches(sys.maxsize))
        return measure(endless, workers, args.seconds, lambda batch: batch.stored_ids.numel())
    (sequences,) = (source.num_sequences or 0 for source in loader.sources)
    tokens = sum(batch.stored_ids.numel() for batch, _ in loader.batches(sequences // args.batch_size))
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


# --- comparison -----------------------------------------------------------------------------------------------------
def loader_commands(args: argparse.Namespace, folder: Path) -> dict[tuple[str, int], list[str]]:
    """Return the measuring commands by (name, number of workers). Print and skip the libraries that are missing."""
    this_script, peers = [sys.executable, __file__], str(Path(__file__).resolve().with_name("bench_loader_peers.py"))
    common = ["--batch-size", str(args.batch_size), "--seconds", str(args.seconds), "--workers"]
    commands: dict[tuple[str, int], list[str]] = {}
    for workers in args.workers:
        for label, name in OURS.items():
            data = str(folder / name / "manifest.jsonl")
            commands[f"ours, {label}", workers] = [*this_script, "--measure", "--data", data, *common, str(workers)]
        for label, kind in TEXTS.items() if (folder / "text").is_dir() else ():
            words = [*this_script, "--measure", "--text", kind, "--data", str(folder)]
            commands[f"ours, {label}", workers] = [*words, *common, str(workers)]
    for name, (_, make) in PEER_LOADERS.items():
        if args.only and name not in args.only:
            continue
        python = sys.executable if make is None else str(args.peer_python)
        try:
            if make is not None:
                subprocess.run([python, peers, "make", name, str(folder)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
            print(f"MISSING {name}: {reason}; `make install-bench` installs it into .venv-bench")
            continue
        for workers in args.workers:
            commands[name, workers] = [python, peers, "speed", name, str(folder), *common, str(workers)]
    return {key: command for key, command in commands.items() if not args.only or key[0] in args.only}


def run_once(command: Sequence[str]) -> float:
    """Return the tokens per second that the command measures. Exit with its stderr if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().rpartition("\n")[2])
    return float(result["tokens"] / result["seconds"])


def table(speeds: dict[tuple[str, int], list[float]]) -> str:
    """Return a line per measurement: million tokens per second and worker, and the speedup of ours (npy) over it."""
    lines = [f"{'':28}{'workers':>8}{'median':>9}{'min':>9}{'max':>9}{'speedup of ours':>17}"]
    for (name, workers), values in sorted(speeds.items(), key=lambda item: item[0][1]):
        per_worker = [value / max(workers, 1) / 1e6 for value in values]
        ours = speeds.get((BASELINE, workers))
        ratio = f"{statistics.median(ours) / statistics.median(values):.2f} x" if ours else ""
        columns = "".join(
            f"{number:9.2f}" for number in (statistics.median(per_worker), min(per_worker), max(per_worker))
        )
        lines.append(f"{name:28}{workers:8}{columns}{ratio:>17}")
    return "\n".join(lines)


def run(args: argparse.Namespace, folder: Path) -> None:
    origin, shared = make_data(folder, args.sequences), shared_folder()
    if (shared / "data" / "raw").is_dir() and not {f"ours, {label}" for label in TEXTS}.isdisjoint(args.only or TEXTS):
        print(f"raw text: indexed in {index_text(folder, shared):.1f} s", flush=True)
    print(
        f"{args.sequences * LENGTH / 1e6:.1f} million tokens of {origin}; sequences of {LENGTH}, batches of "
        f"{args.batch_size}, {available_cpus()} CPU cores, warm page cache, {args.rounds} rounds; million "
        "tokens per second and worker (0 workers: in the main process)",
        flush=True,
    )
    commands = loader_commands(args, folder)
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in commands}
    for _ in range(args.rounds):
        for key, command in commands.items():
            speeds[key].append(run_once(command))
    print(table(speeds), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.measure:
        print(json.dumps(our_speed(args), allow_nan=False), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        run(args, args.work_dir or Path(temporary))


if __name__ == "__main__":
    main()
