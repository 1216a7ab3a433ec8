"""Compare the speed of the preprocessor with that of its parts, on one corpus in one run.

    python scripts/bench_preprocess.py --input-files 'raw/*.jsonl.zst' --tokenizer tokenizer.json

The corpus is repeated until it contains --megabytes of text. Speeds are in MB of text (UTF-8) per second:

- tokenizers: only encode_batch_fast of the tokenizers library, on all CPU cores, for some of the texts, in memory;
- ceiling: decompress, parse JSON and tokenize with the preprocessor's tokenizer in one process per worker, without
  packing, shuffle and output;
- ours, with Ray: the full command make_2048, including the start of Ray and the check of the tokenizer;
- ours, by default: the same, but the command decides whether to use Ray (not for small inputs);
- ours, steady state: the same work on a running Ray whose workers have loaded the tokenizer.

With --memory-limit, the total memory of all processes of a full command, including Ray's, is sampled every second
(shared memory counts once). Finally, one process runs under the profiler, to show the time of each step.
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

from open_lm.system.cpus import available_cpus
from open_lm.system.names import user_path

MEMORY_SAMPLE_S = 1.0
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-files", type=user_path, nargs="+", required=True, help="JSON lines, compressed or not")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="path of a tokenizer.json file")
    parser.add_argument("--megabytes", type=float, default=500, help="MB of text; inputs are repeated (default: 500)")
    parser.add_argument("--workers", type=int, default=available_cpus())
    parser.add_argument("--memory-limit", help="--memory-limit of the full commands, such as 1300MiB")
    parser.add_argument("--work-dir", type=user_path, help="folder for corpus and output (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of ceiling and ours (default: 1)")
    return parser


# --- the corpus --------------------------------------------------------------------------------------------------


def copy_inputs(patterns: Sequence[str], folder: Path, megabytes: float) -> tuple[list[Path], float]:
    """Copy the inputs until they contain `megabytes`; return the copies and the MB of text in them."""
    from open_lm.datapreprocess.inputs import find_inputs

    originals = [Path(item.url) for item in find_inputs(patterns)]
    original_mb = sum(len(text.encode()) for path in originals for text in documents(path)) / 1e6
    files = []
    for copy in range(max(1, -(-int(megabytes) // max(1, int(original_mb))))):
        for path in originals:
            files.append(folder / f"{copy:03d}-{path.name}")
            shutil.copyfile(path, files[-1])
    return files, original_mb * len(files) / len(originals)


def documents(path: Path) -> Iterator[str]:
    from open_lm.datapreprocess.readers import TO_END, Piece, PieceReader

    for block in PieceReader(Piece(str(path), 0, TO_END, path.stat().st_size)):
        yield from (document for document in block.documents if isinstance(document, str))


# --- measurements ------------------------------------------------------------------------------------------------


def bench_tokenizers(files: Sequence[Path], tokenizer: str, seconds: float = 20.0) -> float:
    """Return the MB/s of encode_batch_fast on all CPU cores, measured for about `seconds`."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    fast = Tokenizer.from_file(tokenizer)
    elapsed_s, num_bytes = 0.0, 0
    for path in files:
        texts = list(documents(path))
        started = time.perf_counter()
        fast.encode_batch_fast(texts, add_special_tokens=False)
        elapsed_s += time.perf_counter() - started
        num_bytes += sum(len(text.encode()) for text in texts)
        if elapsed_s > seconds:
            break
    return num_bytes / 1e6 / elapsed_s


def _encode_files(paths: Sequence[str], tokenizer: str) -> int:
    """Tokenize the documents of the files in a separate process, discard the ids, and return their number."""
    from open_lm.datapreprocess.tokenization import make_encoder

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
    """Return the MB/s of only reading and tokenizing. The processes start and warm up before the measurement."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        groups = [[str(path) for path in files[start::workers]] for start in range(workers)]
        list(pool.map(_encode_files, [group[:1] for group in groups], [tokenizer] * workers))
        started = time.perf_counter()
        list(pool.map(_encode_files, groups, [tokenizer] * workers))
        return megabytes / (time.perf_counter() - started)


def bench_command(files: Sequence[Path], args: argparse.Namespace, folder: Path, *, ray: bool) -> tuple[float, float]:
    """Return the seconds of the full command and the peak MiB of its processes.

    ray: start a local Ray; otherwise the command decides. Memory is sampled only with --memory-limit, because sampling
    slows the command down; otherwise the peak is 0.
    """
    from open_lm.datapreprocess.progress import memory_in_use

    shutil.rmtree(folder / "out", ignore_errors=True)
    names = folder / "inputs.txt"
    names.write_text("\n".join(map(str, files)))
    command = [sys.executable, str(ROOT / "datapreprocess" / "make_2048.py"), "--input-files", f"@{names}"]
    command += ["--output-dir", str(folder / "out"), "--tokenizer", args.tokenizer, "--num-workers", str(args.workers)]
    command += ["--ray-address", "local"] if ray else []
    command += ["--memory-limit", args.memory_limit] if args.memory_limit else []
    peak_bytes = 0
    started = time.perf_counter()
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        while args.memory_limit and process.poll() is None:
            peak_bytes = max(peak_bytes, memory_in_use() - memory_in_use([os.getpid()]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(MEMORY_SAMPLE_S)
        process.wait()
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    return seconds, peak_bytes / 2**20


def bench_steady(files: Sequence[Path], tokenizer: str, workers: int, folder: Path) -> float:
    """Return the seconds of the same run on a running Ray whose workers have loaded the tokenizer."""
    import ray

    from open_lm.datapreprocess import make_2048

    def run(names: Sequence[Path], out: Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        command = ["--input-files", *map(str, names), "--output-dir", str(out), "--tokenizer", tokenizer]
        started = time.perf_counter()
        make_2048.main([*command, "--num-workers", str(workers)])
        return time.perf_counter() - started

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        run(files[: 4 * workers], folder / "warm")
        return run(files, folder / "out")
    finally:
        ray.shutdown()


# Step -> (function that the profiler reports for it, part of its file name or qualified name).
STEPS = {
    "decompress": ("decompress", ""),
    "split lines and parse JSON": ("read_lines", "json_lines"),
    "tokenize": ("encode_batch_flat", ""),
    "document ends, types, range check": ("encode", "tokenization"),
    "compare with the reference": ("difference", "tokenization"),
    "load the tokenizer and check it": ("self_check", "tokenization"),
    "keys, sort and spill": ("flush", "shuffle"),
    "merge in the shuffled order": ("_merge", "shuffle"),
    "format npy members": ("npy_members", "npy_block"),
    "sha256": ("update", "HASH"),
    "wait for the disk": ("fsync", ""),
}


class _Inline(ThreadPoolExecutor):
    """An executor that runs each call immediately in the calling thread, where the profiler sees it."""

    def submit(self, function: Callable[..., object], /, *args: object, **options: object) -> Future[object]:  # type: ignore[override]
        future: Future[object] = Future()
        future.set_result(function(*args, **options))
        return future


def profile_run(files: Sequence[Path], tokenizer: str, folder: Path) -> tuple[float, dict[str, float]]:
    """Return the seconds of a run in one process and of each of its steps, excluding nested steps."""
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
    total_s = time.perf_counter() - started
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    seconds = dict.fromkeys(STEPS, 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in stats.items():
        for step, (function, location) in STEPS.items():
            is_function = name == function or f"'{function}'" in name or name.endswith(f".{function}>")
            if is_function and (location in file or location in name):
                seconds[step] += cumulative
    seconds["split lines and parse JSON"] -= seconds["decompress"]
    seconds["document ends, types, range check"] -= seconds["tokenize"]
    return total_s, seconds


# --- report ------------------------------------------------------------------------------------------------------


def in_process(function: Callable[..., object], *args: object) -> object:
    """Return the result of a function in a new process, so that no measurement profits from an earlier one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        folder = Path(name)
        files, megabytes = copy_inputs(args.input_files, folder, args.megabytes)
        size = sum(path.stat().st_size for path in files) / 1e6
        print(
            f"{megabytes:,.0f} MB of text in {len(files)} files of {size:,.0f} MB, {args.workers} workers", flush=True
        )
        base = float(in_process(bench_tokenizers, files, args.tokenizer))  # type: ignore[arg-type]
        print_row("tokenizers, only encode_batch_fast", base, base)
        ceilings, commands, steadies = [], [], []
        for _ in range(args.rounds):
            ceilings.append(bench_ceiling(files, args.tokenizer, args.workers, megabytes))
            print_row("ceiling: decompress, parse, tokenize", ceilings[-1], base)
            command_s, peak_mib = bench_command(files, args, folder, ray=True)
            commands.append(megabytes / command_s)
            print_row(f"ours, with Ray ({format_cost(command_s, peak_mib)})", commands[-1], base)
            command_s, peak_mib = bench_command(files, args, folder, ray=False)
            print_row(f"ours, by default ({format_cost(command_s, peak_mib)})", megabytes / command_s, base)
            steady_s = float(in_process(bench_steady, files, args.tokenizer, args.workers, folder))  # type: ignore[arg-type]
            steadies.append(megabytes / steady_s)
            print_row(f"ours, steady state ({steady_s:.1f} s)", steadies[-1], base)
        print(f"full command with Ray: {min(commands) / base:.1f} to {max(commands) / base:.1f} times tokenizers")
        shares = [steady / ceiling for steady, ceiling in zip(steadies, ceilings, strict=True)]
        print(f"steady state: {min(shares):.0%} to {max(shares):.0%} of the ceiling")
        profiled_files = files[: max(1, round(len(files) * 240 / megabytes))]
        profiled: Any = in_process(profile_run, profiled_files, args.tokenizer, folder)
        total_s, steps = profiled
        print(f"\none process, {len(profiled_files)} files, {total_s:.2f} s under the profiler:")
        for step, seconds in [*steps.items(), ("everything else", total_s - sum(steps.values()))]:
            print(f"  {step:42} {seconds:6.2f} s  {seconds / total_s:4.0%}")


def format_cost(seconds: float, mebibytes: float) -> str:
    return f"{seconds:.1f} s, {mebibytes:,.0f} MiB" if mebibytes else f"{seconds:.1f} s"


def print_row(name: str, rate: float, base: float) -> None:
    print(f"{name:42} {rate:8.1f} MB/s  {rate / base:6.1f} x", flush=True)


if __name__ == "__main__":
    main()
