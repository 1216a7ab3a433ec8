"""End-to-end tests of make_2048 with Ray: completeness, determinism and restarts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datapreprocess_helpers import (
    EOT,
    EOT_ID,
    documents,
    expected_tokens,
    make,
    read_shards,
    record_of,
    tokens_of,
    tree,
    write_jsonl,
)

from open_lm.data.shard_format import expand_shards, read_manifest, shard_sizes
from open_lm.datapreprocess import engine
from open_lm.datapreprocess.make_2048 import main
from open_lm.datapreprocess.memory import Budget
from open_lm.errors import ConfigError, DataError


@pytest.mark.processes
@pytest.mark.usefixtures("local_ray")
def test_every_token_is_written_once_and_counted(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    folder, texts = raw
    make(folder, tmp_path / "out", small_tokenizer, "--shard-size", "50")
    output = tmp_path / "out" / "32-v1" / "0"
    members = read_shards(output)
    expected = expected_tokens(texts, small_tokenizer, EOT_ID)
    assert tokens_of(members) == expected and expected[EOT_ID] == len(texts)
    assert all(len(ids) == 33 for _, _, ids in members)
    assert all(-1 not in ids for _, _, ids in members[:-1])
    assert len({name for _, name, _ in members}) == len(members)
    entries = read_manifest(str(output / "manifest.jsonl"))
    in_shards = Counter(Path(shard).stem for shard, _, _ in members)
    assert [entry.shard for entry in entries] == [f"shard-{n:07d}" for n in range(len(entries))]
    assert {entry.shard: entry.num_sequences for entry in entries} == in_shards
    assert all(entry.num_sequences == 50 for entry in entries[:-1])
    for entry in entries:
        data = (output / f"{entry.shard}.tar").read_bytes()
        assert entry.extra["sha256"] == hashlib.sha256(data).hexdigest() and entry.extra["num_bytes"] == len(data)
    record, total = record_of(output), sum(expected.values())
    assert record["counts"]["documents"] == len(texts) and record["counts"]["tokens"] == total
    assert record["counts"]["sequences"] == len(members) == -(-total // 33)
    assert record["tail"] == {
        "fate": "padded", "tokens": total % 33, "pads": 33 - total % 33, "pad_id": -1, "folder": "0",
        "shard": entries[-1].shard, "key": members[-1][1].removesuffix(".npy"),
    }  # fmt: skip
    assert members[-1][2].count(-1) == 33 - total % 33
    assert sorted(path.name for path in (tmp_path / "out" / "32-v1").iterdir()) == ["0"]
    urls = expand_shards(str(output))
    assert sum((shard_sizes(urls) or {}).values()) == len(members)


@pytest.mark.usefixtures("local_ray")
def test_the_output_does_not_depend_on_the_number_of_workers_or_on_spilling(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(raw[0] / "large.jsonl", documents(6000, seed=9))  # large enough to be read in several pieces
    trees = []
    for workers, buffer_bytes in ((1, 1 << 25), (2, 1 << 14), (4, 1 << 25)):
        budget = Budget(workers, buffer_bytes)
        monkeypatch.setattr(engine, "plan_budget", lambda *_, budget=budget, **__: budget)
        out = tmp_path / f"out{workers}"
        make(raw[0], out, small_tokenizer, "--num-workers", str(workers), "--num-consumers", "2")
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]
    texts = [*raw[1], *documents(6000, seed=9)]
    assert tokens_of(read_shards(tmp_path / "out1")) == expected_tokens(texts, small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_the_seed_changes_only_the_order_and_no_shuffle_keeps_it(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    sequences = {}
    for name, flags in (("1", ["--seed", "1"]), ("2", ["--seed", "2"]), ("ordered", ["--no-shuffle"])):
        make(raw[0], tmp_path / name, small_tokenizer, *flags)
        sequences[name] = [tuple(ids) for _, _, ids in read_shards(tmp_path / name)]
    assert Counter(sequences["1"]) == Counter(sequences["2"]) == Counter(sequences["ordered"])
    assert sequences["1"] != sequences["2"]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(small_tokenizer)
    stream = [value for text in raw[1] for value in [*fast.encode(text, add_special_tokens=False).ids, EOT_ID]]
    assert [value for ids in sequences["ordered"] for value in ids if value != -1] == stream


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["npy", "json.gz", "json", "txt"])
def test_formats(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, kind: str) -> None:
    make(raw[0], tmp_path / "out", small_tokenizer, "--format", kind)
    members = read_shards(tmp_path / "out")
    assert {name.partition(".")[2] for _, name, _ in members} == {kind}
    assert tokens_of(members) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_the_numpy_dtype_depends_on_the_vocabulary(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    import io
    import tarfile

    for vocab, dtype in ((400, "uint16"), (70_000, "uint32")):
        make(raw[0], tmp_path / dtype, small_tokenizer, "--vocab-size", str(vocab), "--drop-tail")
        with tarfile.open(tmp_path / dtype / "32-v1" / "0" / "shard-0000000.tar") as tar:
            types = {np.load(io.BytesIO(tar.extractfile(member).read())).dtype.name for member in tar}  # type: ignore[union-attr]
        assert types == {dtype}
    with pytest.raises(DataError, match="vocabulary of 300"):
        make(raw[0], tmp_path / "small", small_tokenizer, "--vocab-size", "300")


@pytest.mark.usefixtures("local_ray")
def test_sequences_are_divided_among_consumers_and_a_dropped_tail_is_counted(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    make(raw[0], tmp_path / "out", small_tokenizer, "--num-consumers", "3", "--drop-tail")
    total = sum(expected_tokens(raw[1], small_tokenizer, EOT_ID).values())
    counts = []
    for consumer in ("0", "1", "2"):
        output = tmp_path / "out" / "32-v1" / consumer
        counts.append(sum(entry.num_sequences for entry in read_manifest(str(output / "manifest.jsonl"))))
        assert (output / "shard-0000000.tar").exists() and record_of(output) == record_of(output.parent / "0")
    assert sum(counts) == total // 33 and max(counts) - min(counts) <= 1
    assert record_of(tmp_path / "out" / "32-v1" / "0")["tail"] == {"fate": "dropped", "tokens": total % 33}


@pytest.mark.usefixtures("local_ray")
def test_a_finished_output_is_kept_and_another_job_is_an_error(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    make(raw[0], out, small_tokenizer)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with caplog.at_level("INFO"):
        make(raw[0], out, small_tokenizer)
    assert "already done" in caplog.text
    copied_tokenizer = tmp_path / "copy.json"
    copied_tokenizer.write_bytes(Path(small_tokenizer).read_bytes())
    make(raw[0], out, str(copied_tokenizer))
    with pytest.raises(ConfigError, match=r"finished data set.*seed was 0, is now 5.*another output folder"):
        make(raw[0], out, small_tokenizer, "--seed", "5")
    write_jsonl(raw[0] / "more.jsonl", ["x"])
    with pytest.raises(ConfigError, match=r"new input: .*more\.jsonl"):
        make(raw[0], out, small_tokenizer)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.usefixtures("local_ray")
def test_shards_of_unknown_origin_are_an_error(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    unknown = tmp_path / "out" / "32-v1" / "0" / "shard-0000000.tar"
    unknown.parent.mkdir(parents=True)
    unknown.write_bytes(b"unknown")
    with pytest.raises(ConfigError, match=r"shard-0000000\.tar: already in the output"):
        make(raw[0], tmp_path / "out", small_tokenizer)
    assert unknown.read_bytes() == b"unknown"


# Runs the command, and kills it with SIGKILL after the number of worker results given by the first argument.
KILLED = """
import os, signal, sys
from open_lm.datapreprocess import cluster, make_2048
run, remaining = cluster.Cluster.run, int(sys.argv.pop(1))
def run_and_kill(self, *args, **options):
    global remaining
    for result in run(self, *args, **options):
        yield result
        remaining -= 1
        if not remaining:
            os.kill(os.getpid(), signal.SIGKILL)
cluster.Cluster.run = run_and_kill
make_2048.main(sys.argv[1:])
"""


@pytest.mark.processes
@pytest.mark.usefixtures("local_ray")
def test_the_same_command_completes_a_killed_run(
    tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", documents(3000, seed=number))
    make(tmp_path / "raw", tmp_path / "clean", small_tokenizer)
    out = tmp_path / "out"
    arguments = ["--input-files", str(tmp_path / "raw"), "--output-dir", str(out), "--tokenizer", small_tokenizer]
    arguments += ["--seqlen", "32", "--num-workers", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "1", *arguments], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = out / "32-v1" / ".work"
    assert len(list(work.glob("unit-*.json"))) == 1
    with caplog.at_level("INFO"):
        main(arguments)
    assert "1 of 4 units already done" in caplog.text
    assert tree(out) == tree(tmp_path / "clean")


@pytest.mark.usefixtures("local_ray")
def test_the_task_of_a_killed_worker_is_retried_without_duplicates(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    died, original = tmp_path / "died", engine._run_unit_in_worker

    def run_and_die_once(*arguments: Any) -> Any:
        result = original(*arguments)
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(engine, "_run_unit_in_worker", run_and_die_once)
    make(raw[0], tmp_path / "out", small_tokenizer)
    assert died.exists()
    assert tokens_of(read_shards(tmp_path / "out")) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_existing_shards_are_not_rewritten(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_manifests", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            make(raw[0], out, small_tokenizer)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert before and not list(out.rglob("manifest.jsonl")) and not list(out.rglob("dataset.json"))
    make(raw[0], out, small_tokenizer)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert tokens_of(read_shards(out)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_unfinished_work_with_other_settings_is_discarded_only_with_restart(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_manifests", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            make(raw[0], out, small_tokenizer, "--shard-size", "7")
    other = ["--seed", "4", "--shard-size", "90"]
    with pytest.raises(ConfigError, match=r"(?s)unfinished work.*seed was 0, is now 4.*--restart"):
        make(raw[0], out, small_tokenizer, *other)
    make(raw[0], out, small_tokenizer, *other, "--restart")
    assert "restarting, discarding" in caplog.text and "seed was 0, is now 4" in caplog.text
    assert tokens_of(read_shards(out)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_changed_inputs_are_logged_and_only_their_units_are_repeated(
    tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "raw", tmp_path / "out"
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", documents(3000, seed=number))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_manifests", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            make(folder, out, small_tokenizer)
    write_jsonl(folder / "3.jsonl", documents(3000, seed=77))
    with caplog.at_level("INFO"):
        make(folder, out, small_tokenizer)
    assert "changed input: " in caplog.text and "3.jsonl" in caplog.text
    assert "3 of 4 units already done" in caplog.text
    make(folder, tmp_path / "clean", small_tokenizer)
    assert tree(out) == tree(tmp_path / "clean")


@pytest.mark.usefixtures("local_ray")
def test_real_text_with_real_tokenizers(shared_dir: Path, tmp_path: Path) -> None:
    import zstandard

    source = shared_dir / "data" / "raw" / "wiki-00.jsonl.zst"
    lines = zstandard.ZstdDecompressor().stream_reader(source.read_bytes()).read().splitlines()[:40]
    path = tmp_path / "wiki.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts = [json.loads(line)["text"] for line in lines]
    neox = str(shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json")
    main(["--input-files", str(path), "--output-dir", str(tmp_path / "neox"), "--tokenizer", neox])
    members = read_shards(tmp_path / "neox" / "2048-v1" / "0")
    assert tokens_of(members) == expected_tokens(texts, neox, 0)
    assert {len(ids) for _, _, ids in members} == {2049}
    from sentencepiece import SentencePieceProcessor

    llama = str(shared_dir / "data" / "tokenizers" / "llama2.model")
    main(["--input-files", str(path), "--output-dir", str(tmp_path / "llama"), "--tokenizer", llama])
    pieces = SentencePieceProcessor(model_file=llama)
    expected = Counter(value for text in texts for value in pieces.encode(text))
    expected[pieces.eos_id()] += len(texts)
    assert tokens_of(read_shards(tmp_path / "llama")) == expected


def test_special_tokens_inside_documents_match_the_tokenizers_library_on_ray(
    tmp_path: Path, small_tokenizer: str, local_ray: None
) -> None:
    texts = [f"before {EOT} after", EOT, "", "  "]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    make(source, tmp_path / "text", small_tokenizer)
    tokens = tokens_of(read_shards(tmp_path / "text"))
    assert tokens == expected_tokens(texts, small_tokenizer, EOT_ID, split_special=True) and tokens[EOT_ID] == 4
    make(source, tmp_path / "ids", small_tokenizer, "--allow-special-tokens-in-text")
    tokens = tokens_of(read_shards(tmp_path / "ids"))
    assert tokens == expected_tokens(texts, small_tokenizer, EOT_ID) and tokens[EOT_ID] == 6
