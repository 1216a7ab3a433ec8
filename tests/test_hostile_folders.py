"""All programs work in a folder whose name has characters of patterns and bytes that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from datapreprocess_helpers import documents, write_jsonl

from open_lm.system import names

ROOT = Path(__file__).resolve().parents[1]
NAMES = [b"cur{ly} [1]*?~%s", b"-\xff\ne\xcc\x81::{a,b}", b"long" + b"n" * 240]


def write_inputs(folder: Path) -> None:
    """Write raw text, with a name that is not UTF-8 and with a bad line, to folder/raw, and the tiny model."""
    write_jsonl(folder / "raw" / os.fsdecode(b"in\xff[1].jsonl"), documents(80, seed=1))
    bad = write_jsonl(folder / "raw" / "b,c.jsonl", documents(80, seed=2))
    bad.write_text("{\n" + bad.read_text())


def write_model(folder: Path, shared_dir: Path) -> Path:
    config = json.loads((shared_dir / "compat" / "run" / "tiny_bytes.json").read_text())
    path = folder / os.fsdecode(b"m{1}\xff.json")
    path.write_text(json.dumps(config | {"vocab_size": 400, "seq_len": 32}))
    return path


def check_files(folder: Path) -> None:
    """Check that all text files that the programs wrote are UTF-8, and all JSON is strict."""
    written = [path for path in folder.rglob("*") if path.parent.name != "raw"]
    files = [path for path in written if path.suffix in (".json", ".jsonl", ".txt", ".log")]
    assert len(files) > 3
    for path in files:
        text = path.read_bytes().decode("utf-8")
        for line in text.split("\n") if path.suffix == ".jsonl" else [text] if path.suffix == ".json" else []:
            assert not line or orjson.loads(line) is not None


@pytest.fixture(params=NAMES, ids=["patterns", "bytes", "long"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a hostile name the working directory."""
    path = tmp_path / os.fsdecode(request.param)
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def test_data_programs_in_a_hostile_folder(folder: Path, small_tokenizer: str) -> None:
    from open_lm.datapreprocess.make_2048 import main as make_2048
    from open_lm.datapreprocess.ray.tokenize_shuffle import main as tokenize_shuffle
    from open_lm.utils.inspect_shards import inspect
    from open_lm.utils.inspect_shards import make_parser as inspect_parser
    from open_lm.utils.make_wds_manifest import make_manifest

    write_inputs(folder)
    common = ["--tokenizer", small_tokenizer, "--seqlen", "32", "--max-bad-fraction", "0.5"]
    first = [*common, "--input-files", f"{folder}/raw", "--output-dir", "out", "--num-workers", "1"]
    make_2048(first)
    make_2048(first)  # already done
    rejects = orjson.loads((folder / "out" / "32-v1" / "rejects.jsonl").read_bytes().split(b"\n")[0])
    assert rejects["url"].endswith("raw/b,c.jsonl")
    tokenize_shuffle([*common, "--input", f"raw/in*.jsonl,{folder}/raw/b,c.jsonl", "--output", f"{folder}/two",
                      "--force_parallelism", "1", "--format", "npy", "--source", "a=raw/in*[[]1].jsonl"])  # fmt: skip
    os.rename(folder / "two" / "00000001.tar", folder / "two" / os.fsdecode(b"sh\xff [1].tar"))
    assert make_manifest("two", workers=1) == make_manifest(f"{folder}/out/32-v1/0", workers=1) > 0
    report = inspect(inspect_parser().parse_args([str(folder), "--verify", "--num-workers", "1", "--samples", "1"]))
    assert not report["problems"] and len(report["folders"]) == 2
    check_files(folder)


def test_training_and_plan_in_a_hostile_folder(folder: Path, shared_dir: Path) -> None:
    from open_lm.config.architecture import read_run_settings
    from open_lm.main import main
    from open_lm.planner.command import make_plan
    from open_lm.utils.convert_checkpoint import main as convert

    shutil.copytree(shared_dir / "compat" / "run" / "data", folder / "data")
    model = folder / os.fsdecode(b"m{1}\xff.json")
    shutil.copy(shared_dir / "compat" / "run" / "tiny_bytes.json", model)
    common = ["--model", str(model), "--precision", "fp32", "--global-batch-size", "4", "--workers", "0"]
    train = [*common, "--train-num-samples", "512", "--warmup", "1", "--data-key", "json.gz", "--logs", str(folder)]
    patterns = ["--train-data", f"data/{{00000001..00000002}}.tar::{folder}/data/00000003.tar"]
    main([*train, *patterns, "--name", "a", "--epochs", "1", "--checkpoint-dir", "ck", "--averagers", "ema_0.9"])
    main([*train, *patterns, "--name", "a", "--epochs", "2", "--checkpoint-dir", "ck", "--averagers", "ema_0.9",
          "--resume", "latest"])  # fmt: skip
    saved = folder / "ck" / "a" / "checkpoints"
    assert read_run_settings(str(folder / "a" / "checkpoints" / "epoch_2.pt"))["model"] == str(model)
    log = (folder / "a" / "out.log").read_text(encoding="utf-8")
    assert "m{1}\\xff.json" in log
    assert "--epochs was 1" in log and "--model was" not in log
    interchange = ["--checkpoint-format", "interchange", "--dataset-manifest", f"{folder}/data/manifest.jsonl"]
    main([*train, *interchange, "--name", "b", "--epochs", "1", "--pretrained", str(saved / "epoch_2.pt")])
    main([*train, *interchange, "--name", "b", "--epochs", "2", "--resume", "latest"])
    main([*common, "--data-key", "json.gz", "--name", "c", "--logs", ".", "--val-data", f"{folder}/data/*[78].tar",
          "--average", "b/checkpoints/epoch_2.pt", str(saved / "epoch_1.pt")])  # fmt: skip
    assert convert([str(saved / "step_00000004"), "--output", f"{folder}/converted"]).startswith(str(folder))
    assert make_plan(["--model", str(model), "--devices", "1", "--train-tokens", "1e6"]).recommended
    check_files(folder)


@pytest.mark.processes
def test_preprocess_train_generate_and_evaluate_as_processes_in_a_hostile_folder(
    tmp_path: Path, shared_dir: Path, small_tokenizer: str, forked_python: str
) -> None:
    folder = tmp_path / os.fsdecode(b"- {c,d}[1]?*~%s\n\xff::e\xcc\x81")
    folder.mkdir()
    write_inputs(folder)
    model = write_model(folder, shared_dir)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder)}

    def run(*words: str | Path, python: str = sys.executable) -> str:
        command = [python, *map(str, words)]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        assert "Traceback" not in result.stdout + result.stderr
        return result.stdout

    run(
        "-m", "open_lm.datapreprocess.make_2048", "--input-files", folder / "raw", "--output-dir", "~/out",
        "--tokenizer", small_tokenizer, "--seqlen", "32", "--max-bad-fraction", "0.5", "--num-workers", "1",
    )  # fmt: skip
    data = folder / "out" / "32-v1" / "0"
    assert not (folder / "~").exists()
    assert r"\xff::e" in run("-m", "open_lm.utils.make_wds_manifest", "--data-dir", data, "--num-workers", "1")
    train = [
        "-m", "open_lm.main", "--model", model, "--train-data", f"{data}/shard-{{0000000..0000001}}.tar",
        "--val-data", data / "shard-0000000.tar", "--train-num-samples", "256", "--global-batch-size", "4",
        "--warmup", "1", "--precision", "fp32", "--logs", "~/logs", "--name", "a", "--workers", "1",
    ]  # fmt: skip
    run(*train, "--epochs", "1")
    run(*train, "--epochs", "2", "--resume", "latest", python=forked_python)
    checkpoint = folder / "logs" / "a" / "checkpoints" / "epoch_2.pt"
    generated = run(
        ROOT / "scripts" / "generate.py", "--checkpoint", checkpoint, "--tokenizer", small_tokenizer,
        "--prompt", "the", "--max-new-tokens", "2", "--json",
    )  # fmt: skip
    assert json.loads(generated)["prompt"] == "the"
    evaluate = ["--pretrained", checkpoint, "--val-data", data / "*.tar", "--logs", folder / "logs", "--name", "eval"]
    run(
        "-m", "open_lm.main", "--model", model, "--precision", "fp32", "--workers", "0", *evaluate, python=forked_python
    )
    results = (folder / "logs" / "eval" / "checkpoints" / "results.jsonl").read_bytes()
    assert orjson.loads(results)[0]["val_data"] == [names.printable(f"{data}/*.tar")]
    assert not (folder / "~").exists()
    check_files(folder)
