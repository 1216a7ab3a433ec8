"""Run folders for the tests of reports, with everything that a run can leave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title='attacked'\">"
SPIKE_STEP, STEPS, STEP_TOKENS = 150, 200, 4096
SECRET = "hf_abcdefghijklmnopqrstuvwx"


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_line(step: int, **more: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl; the loss falls, and has a spike at SPIKE_STEP."""
    loss = 2.0 + 4.0 / (1 + step / 10) + 0.01 * (step % 3) + (3.0 if step == SPIKE_STEP else 0.0)
    values = {
        "loss": loss, "grad_norm": 0.5 + 0.01 * (step % 5), "lr": 1e-3, "data_time": 0.01, "batch_time": 0.5,
        "tokens_per_second": 8192.0, "mfu": 0.4, "peak_memory_bytes": 2.0**31, "forward_time": 0.1,
        "backward_time": 0.3, "optimizer_time": 0.1, "skipped_steps": int(step > 100), "spikes": 0,
        "tokens/web": step * 3072, "tokens/books": step * 1024,
    }  # fmt: skip
    common = {"step": step, "time": 1_700_000_000 + 0.5 * step + 600 * (step > 120), "tokens": step * STEP_TOKENS}
    return {**common, **{f"train/{name}": value for name, value in values.items()}, **more}


def task(name: str, score: float, baseline: float) -> dict[str, Any]:
    return {
        "task": name, "shots": 0, "metric": "InContextLearningMultipleChoiceAccuracy", "score": score,
        "baseline": baseline, "n": 100, "interval": [score - 0.1, score + 0.1], "interval_method": "wilson",
    }  # fmt: skip


def write_run(folder: Path, steps: int = STEPS, **settings: str) -> Path:
    """Write the folder of a run that was resumed at step 120 with another learning rate, and return it."""
    folder.mkdir(parents=True)
    text = {
        "name": folder.name, "model": "tiny.json", "seq_len": "64", "global_batch_size": "64", "lr": "0.001",
        "lr_scheduler": "cosine", "dataset_manifest": "['web/manifest.jsonl', 'books/manifest.jsonl']",
        "remote_sync": f"s3://bucket/logs?token={SECRET}", **settings,
    }  # fmt: skip
    (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in sorted(text.items())))
    validation = [{"step": step, "tokens": step * STEP_TOKENS, "val/loss": 3.0 - step / 200} for step in (100, 200)]
    write_lines(folder / "metrics.jsonl", [*map(train_line, range(1, steps + 1)), *validation])
    write_lines(
        folder / "checkpoints" / "results.jsonl",
        [[{"loss": 3.0 - s / 200, "tokens": 6400, "train_tokens": s * STEP_TOKENS, "val_data": ["v/held_out.tar"]}]
         for s in (100, 200)],
    )  # fmt: skip
    write_lines(folder / "icl.jsonl", [icl_line(0, 0.26), icl_line(200, 0.41)])
    write_lines(
        folder / "samples.jsonl",
        [{"step": s, "tokens": s * STEP_TOKENS, "number": 1, "temperature": 0.0, "prompt": "A <b>river", "text": t}
         for s, t in ((0, "qq qq"), (100, "in the middle"), (200, f"runs {ATTACK}"))],
    )  # fmt: skip
    sources = [source("web", "3/4", 40_000), source("books", "1/4", 500)]
    sources[0]["datasets"][0]["sources"] = {"wiki": {"tokens": 600_000}, "news": {"tokens": 1_800_000}}
    (folder / "data.json").write_text(json.dumps({"format": 1, "sources": sources}))
    (folder / "environment.json").write_text(json.dumps(environment()))
    (folder / "out.log").write_text(
        "".join(f"2026-01-02,10:00:0{i % 10} | {line}\n" for i, line in enumerate(log(text)))
    )
    return folder


def icl_line(step: int, score: float) -> dict[str, Any]:
    tasks = [task("choose_zeroshot", score, 0.25), task("continue", score / 2, 0.0)]
    average = sum(item["score"] for item in tasks) / 2
    return {"step": step, "tokens": step * STEP_TOKENS, "average": average, "centered_average": 0.1, "tasks": tasks}


def source(name: str, weight: str, num_sequences: int) -> dict[str, Any]:
    shards = [{"shard": "00000000", "num_sequences": num_sequences}]
    dataset = {"digest": "d" * 32, "settings": {"seqlen": 64, "eot_id": 3}, "inputs": "e" * 32}
    return {
        "name": f"{name}/manifest.jsonl", "fingerprint": f"fingerprint-{name}", "weight": weight, "data_key": "npy",
        "num_sequences": num_sequences, "datasets": [dataset], "shards": shards,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the content of environment.json."""
    progress = {"seconds": 60.0, "step": 120, "tokens": 120 * STEP_TOKENS, "flops": 2e15, "energy_joules": 1.8e6}
    start = {
        "time": "2026-01-02T10:00:00+00:00", "step": 0, "world_size": 8, "nodes": 1,
        "devices": [{"name": "NVIDIA H100", "memory_bytes": 8 << 30, "ranks": 8}], "cpu": {"model": "A CPU"},
        "packages": {"torch": "2.11.0"}, "code": {"fingerprint": "c0de", "commit": "abc123", "modified": False},
        "progress": {**progress, "energy_method": "counters of the devices", "energy_is_estimate": False},
    }  # fmt: skip
    return {"format": 1, "starts": [start, {**start, "step": 120}]}


def log(settings: Mapping[str, str]) -> list[str]:
    """Return the lines of out.log after their time."""
    first = [f"INFO |   {key}: {value}" for key, value in settings.items()]
    second = [f"INFO |   {key}: {value}" for key, value in {**settings, "lr": "0.0005"}.items()]
    start = [
        "INFO | Running with a single process. Device cuda:0.",
        "INFO | Model (has 12345 parameters):",
        "INFO | Params:",
    ]
    return [
        *start, *first, "INFO | 200 steps of 4096 tokens, 819200 in total.",
        "WARNING | step 100 is not finite and was skipped (loss nan, gradient norm nan, learning rate 0.001); of ...",
        "WARNING | stopped by a signal after step 120; the state is saved", *start, *second,
        "INFO | loaded logs/run/checkpoints/step_00000120 (epoch 0, step 120)",
        "WARNING | loss spike at step 160: rolled back to the state of step 140; the 20 batches since are skipped",
        "INFO | Model has seen the desired number of tokens. Ending training.",
    ]  # fmt: skip
