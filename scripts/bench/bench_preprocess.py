"""Measure the preprocessor beside its parts on one corpus, in one run.

    python scripts/bench_preprocess.py --input-files 'raw/*.jsonl.zst' --tokenizer tokenizer.json

The corpus is repeated until it holds --megabytes of text. Three things are timed, in MB of text (UTF-8) a second:

- tokenizers: encode_batch_fast of the tokenizers library alone, on all processors, texts in memory (a part of them);
- ceiling: decompress, parse JSON and tokenize with the preprocessor's own tokenizer, a process for each processor, and
  nothing else: no packing, no shuffle, no output;
- ours: the command make_2048 from its start to its end, Ray's start and the tokenizer's check included; the same as it
  decides itself, where small inputs do without Ray; and the steady state, the job on a Ray that runs already and whose
  workers have loaded the tokenizer. With --memory-limit the memory of all processes of a whole command together is
  looked at every second, Ray's own included (memory that several share counts once).

Then the time of one process is shared out among the steps, which tells where the rest goes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LOOK_EVERY_S = 1.0
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-files", nargs="+", required=True, help="JSON lines, compressed or not")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json file")
    parser.add_argument("--megabytes", type=float, default=500, help="MB of text to reach by repetition (default: 500)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-limit", help="of the whole commands, e.g. 1300MiB")
    parser.add_argument("--work-dir", help="folder for corpus and output (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=1, help="times that ceiling and ours are measured in turn")
    return parser


# --- the corpus --------------------------------------------------------------------------------------------------


def gather(patterns: Sequence[str], folder: Path, megabytes: float) -> tuple[list[Path], float]:
    """Copies of the inputs, and the MB of text in them."""
    from open_lm.datapreprocess.inputs import find_inputs

    originals = [Path(item.url) for item in find_inputs(patterns)]
    once = sum(len(text.encode()) for path in originals for text in documents(path)) / 1e6
    files = []
    for copy in range(max(1, -(-int(megabytes) // max(1, int(once))))):
        for path in originals:
            files.append(folder / f"{copy:03d}-{path.name}")
            shutil.copyfile(path, files[-1])
    return files, once * len(files) / len(originals)


def documents(path: Path) -> Iterator[str]:
    from open_lm.datapreprocess.readers import TO_END, Piece, PieceReader

    for block in PieceReader(Piece(str(path), 0, TO_END, path.stat().st_size)):
        yield from (document for document in block.documents if isinstance(document, str))


# --- what is timed -----------------------------------------------------------------------------------------------


def bench_tokenizers(files: Sequence[Path], tokenizer: str, seconds: float = 20.0) -> float:
    """MB/s of encode_batch_fast on all processors, over about so many seconds of the corpus."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    fast = Tokenizer.from_file(tokenizer)
    spent, done = 0.0, 0
    for path in files:
        texts = list(documents(path))
        started = time.perf_counter()
        fast.encode_batch_fast(texts, add_special_tokens=False)
        spent += time.perf_counter() - started
        done += sum(len(text.encode()) for text in texts)
        if spent > seconds:
            break
    return done / 1e6 / spent


def _encode_files(paths: Sequence[str], tokenizer: str) -> int:
    """Runs in a process of its own: the ids of the files' documents, thrown away."""
    from open_lm.datapreprocess.commands import make_encoder

    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    encoder = make_encoder(tokenizer, None, None)
    tokens = 0
    for path in paths:
        batch: list[str] = []
        for text in documents(Path(path)):
            batch.append(text)
            if len(batch) == 256:
                tokens += len(encoder.encode(batch).ids)
                batch = []
        tokens += len(encoder.encode(batch).ids) if batch else 0
    return tokens


def bench_ceiling(files: Sequence[Path], tokenizer: str, workers: int, megabytes: float) -> float:
    """MB/s of reading and tokenizing alone; processes are started and warmed before the clock runs."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [[str(path) for path in files[start::workers]] for start in range(workers)]
        list(pool.map(_encode_files, [share[:1] for share in shares], [tokenizer] * workers))
        started = time.perf_counter()
        list(pool.map(_encode_files, shares, [tokenizer] * workers))
        return megabytes / (time.perf_counter() - started)


def bench_whole(files: Sequence[Path], args: argparse.Namespace, folder: Path, *, ray: bool) -> tuple[float, float]:
    """Seconds of the whole command, with a Ray of its own or as it decides itself, and MiB of its processes at most.

    Looking at the memory takes time from the command, so it is done only where a limit of it is what is tried.
    """
    from open_lm.datapreprocess.progress import memory_in_use

    shutil.rmtree(folder / "out", ignore_errors=True)
    names = folder / "inputs.txt"
    names.write_text("\n".join(map(str, files)))
    command = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", f"@{names}"]
    command += ["--output-dir", str(folder / "out"), "--tokenizer", args.tokenizer, "--num-workers", str(args.workers)]
    command += ["--ray-address", "local"] if ray else []
    command += ["--memory-limit", args.memory_limit] if args.memory_limit else []
    most = 0
    started = time.perf_counter()
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        while args.memory_limit and process.poll() is None:
            most = max(most, memory_in_use() - memory_in_use([os.getpid()]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_EVERY_S)
        process.wait()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    return seconds, most / 2**20


def bench_steady(files: Sequence[Path], tokenizer: str, workers: int, folder: Path) -> float:
    """Seconds of the same job on a Ray whose workers run and have loaded the tokenizer."""
    import ray

    from open_lm.datapreprocess import make_2048

    def job(names: Sequence[Path], out: Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        command = ["--input-files", *map(str, names), "--output-dir", str(out), "--tokenizer", tokenizer]
        started = time.perf_counter()
        make_2048.main([*command, "--num-workers", str(workers)])
        return time.perf_counter() - started

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        job(files[: 4 * workers], folder / "warm")
        return job(files, folder / "out")
    finally:
        ray.shutdown()


# Steps of a run by the function in whose time they show, seen from one process.
STEPS = {
    "decompress": ("decompress", ""),
    "split lines and parse JSON": ("read_lines", "json_lines"),
    "tokenize": ("encode_batch_flat", ""),
    "ends of documents, types, range check": ("encode", "tokenization"),
    "compare with the reference": ("difference", "tokenization"),
    "load the tokenizer and check it": ("self_check", "tokenization"),
    "keys, sort and spill": ("flush", "shuffle"),
    "gather in the shuffled order": ("_part", "shuffle"),
    "lay out members": ("npy_members", "npy_block"),
    "sha256": ("update", "HASH"),
    "wait for the disk": ("fsync", ""),
}


class _Inline(ThreadPoolExecutor):
    """Runs what is submitted at once in the calling thread, where the profiler sees it."""

    def submit(self, function: Callable[..., object], /, *args: object, **options: object) -> Future[object]:  # type: ignore[override]
        future: Future[object] = Future()
        future.set_result(function(*args, **options))
        return future


def profile_alone(files: Sequence[Path], tokenizer: str, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a run in one process, and of its steps (those that contain others are counted without them)."""
    import cProfile
    import pstats

    from open_lm.datapreprocess import make_2048, tasks

    tasks.ThreadPoolExecutor = _Inline  # type: ignore[misc]
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    shutil.rmtree(folder / "out", ignore_errors=True)
    profile = cProfile.Profile()
    started = time.perf_counter()
    profile.runcall(
        make_2048.main,
        ["--input-files", *map(str, files), "--output-dir", str(folder / "out"), "--tokenizer", tokenizer],
    )
    whole = time.perf_counter() - started
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    seconds = dict.fromkeys(STEPS, 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in stats.items():
        for step, (function, place) in STEPS.items():
            exact = name == function or f"'{function}'" in name or name.endswith(f".{function}>")
            if exact and (place in file or place in name):
                seconds[step] += cumulative
    seconds["split lines and parse JSON"] -= seconds["decompress"]
    seconds["ends of documents, types, range check"] -= seconds["tokenize"]
    return whole, seconds


# --- telling -----------------------------------------------------------------------------------------------------


def in_process(function: Callable[..., object], *args: object) -> object:
    """The result of a function in a fresh process, so that nothing that one measurement leaves behind helps another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        folder = Path(name)
        files, megabytes = gather(args.input_files, folder, args.megabytes)
        size = sum(path.stat().st_size for path in files) / 1e6
        print(
            f"{megabytes:,.0f} MB of text in {len(files)} files of {size:,.0f} MB, {args.workers} workers", flush=True
        )
        base = float(in_process(bench_tokenizers, files, args.tokenizer))  # type: ignore[arg-type]
        row("tokenizers, encode_batch_fast alone", base, base)
        ceilings, wholes, steadies = [], [], []
        for _ in range(args.rounds):
            ceilings.append(bench_ceiling(files, args.tokenizer, args.workers, megabytes))
            row("ceiling: decompress, parse, tokenize", ceilings[-1], base)
            whole_s, most = bench_whole(files, args, folder, ray=True)
            wholes.append(megabytes / whole_s)
            row(f"ours, with Ray ({told(whole_s, most)})", wholes[-1], base)
            whole_s, most = bench_whole(files, args, folder, ray=False)
            row(f"ours, by default ({told(whole_s, most)})", megabytes / whole_s, base)
            steady_s = float(in_process(bench_steady, files, args.tokenizer, args.workers, folder))  # type: ignore[arg-type]
            steadies.append(megabytes / steady_s)
            row(f"ours, steady state ({steady_s:.1f} s)", steadies[-1], base)
        print(f"whole command with Ray: {min(wholes) / base:.1f} to {max(wholes) / base:.1f} times tokenizers alone")
        shares = [steady / ceiling for steady, ceiling in zip(steadies, ceilings, strict=True)]
        print(f"steady state: {min(shares):.0%} to {max(shares):.0%} of the ceiling")
        once = files[: max(1, round(len(files) * 240 / megabytes))]
        profiled: Any = in_process(profile_alone, once, args.tokenizer, folder)
        whole_s, steps = profiled
        print(f"\none process, {len(once)} files, {whole_s:.2f} s under the profiler:")
        for step, seconds in [*steps.items(), ("everything else", whole_s - sum(steps.values()))]:
            print(f"  {step:42} {seconds:6.2f} s  {seconds / whole_s:4.0%}")


def told(seconds: float, mebibytes: float) -> str:
    return f"{seconds:.1f} s, {mebibytes:,.0f} MiB" if mebibytes else f"{seconds:.1f} s"


def row(name: str, rate: float, base: float) -> None:
    print(f"{name:42} {rate:8.1f} MB/s  {rate / base:6.1f} x", flush=True)


if __name__ == "__main__":
    main()
