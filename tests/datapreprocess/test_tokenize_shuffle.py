"""End-to-end tests of tokenize_shuffle with Ray: layout, input formats, sampling, subsets and legacy flags."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datapreprocess_helpers import (
    EOT_ID,
    documents,
    expected_tokens,
    read_shards,
    tokens_of,
    tree,
    write_corpus,
    write_jsonl,
)

from open_lm import storage
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.ray.tokenize_shuffle import choose, main
from open_lm.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def shuffle(source: object, out: Path, *flags: str) -> list[tuple[str, str, list[int]]]:
    main(["--input", str(source), "--output", str(out), "--seqlen", "32", *flags])
    return read_shards(out)


@pytest.mark.usefixtures("local_ray")
def test_layout_and_exactness(tmp_path: Path, small_tokenizer: str) -> None:
    texts = write_corpus(tmp_path / "raw" / "one")
    extra = documents(30, seed=8)
    write_jsonl(tmp_path / "raw" / "two" / "x.jsonl", extra)
    source = f"{tmp_path}/raw/one,{tmp_path}/raw/two/"
    members = shuffle(source, tmp_path / "out", "--tokenizer", small_tokenizer, "--wds_chunk_size", "40")
    assert tokens_of(members) == expected_tokens([*texts, *extra], small_tokenizer, EOT_ID)
    assert all(len(ids) == 33 and name.endswith(".json.gz") for _, name, ids in members)
    counts = Counter(shard for shard, _, _ in members)
    assert list(counts) == [f"{number:08d}.tar" for number in range(1, len(counts) + 1)]
    assert set(list(counts.values())[:-1]) == {40}
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {f"{line['shard']}.tar": line["num_sequences"] for line in lines} == counts
    pads = [ids.count(-1) for _, _, ids in members]
    assert pads[-1] == -sum(expected_tokens([*texts, *extra], small_tokenizer, EOT_ID).values()) % 33
    assert not any(pads[:-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*counts, "manifest.jsonl", "dataset.json", "tokenizer"]
    )


@pytest.mark.usefixtures("local_ray")
def test_legacy_flags_are_accepted_and_flags_without_effect_are_logged_once(
    tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "raw")
    plain = ["--tokenizer", small_tokenizer, "--wds_chunk_size", "40"]
    shuffle(tmp_path / "raw", tmp_path / "a", *plain)
    caplog.clear()
    legacy = "--content-key text --num_writers_per_node 2 --presort --allow_imbalanced_write --force_parallelism 2"
    legacy += " --force_num_cores 1 --suffixes .jsonl .zst .gz --wds-chunk-size 40"
    spill = ["--ray_spill_location", str(tmp_path / "spill")]
    shuffle(tmp_path / "raw", tmp_path / "b", "--tokenizer", small_tokenizer, *legacy.split(), *spill)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert caplog.text.count("without effect") == 1
    assert not list((tmp_path / "spill").rglob("*.run"))
    with pytest.raises(ConfigError, match="--no_such_flag"):
        main(["--input", "x", "--output", "y", "--no_such_flag"])


@pytest.mark.usefixtures("local_ray")
def test_suffixes_select_the_files(tmp_path: Path, small_tokenizer: str) -> None:
    write_corpus(tmp_path / "raw")
    members = shuffle(tmp_path / "raw", tmp_path / "out", "--tokenizer", small_tokenizer, "--suffixes", ".gz")
    assert tokens_of(members) == expected_tokens(documents(40, seed=3), small_tokenizer, EOT_ID)


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("key", ["txt", "text", "json:body"])
def test_documents_in_tar_files(tmp_path: Path, small_tokenizer: str, key: str) -> None:
    texts = documents(60)
    for part in (0, 1):
        make_tar(
            tmp_path / "raw" / f"{part}.tar",
            {f"{n}.{kind}": data for n, text in enumerate(texts[part::2])
             for kind, data in (("txt", text.encode()), ("json", json.dumps({"body": text}).encode()))},
        )  # fmt: skip
    members = shuffle(tmp_path / "raw", tmp_path / "out", "--tokenizer", small_tokenizer, "--content_key", key)
    assert tokens_of(members) == expected_tokens(texts, small_tokenizer, EOT_ID)


@pytest.mark.usefixtures("local_ray")
def test_documents_of_token_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(1, 50_000, rng.integers(0, 200)) for _ in range(40)]
    members: dict[str, bytes] = {}
    for number, array in enumerate(arrays):
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[f"{number}.npy"] = buffer.getvalue()
    make_tar(tmp_path / "raw" / "a.tar", members)
    output = shuffle(tmp_path / "raw", tmp_path / "out", "--content_key", "npy", "--vocab_size", "50432")
    expected = Counter(int(value) for array in arrays for value in array)
    expected[0] += len(arrays)
    assert tokens_of(output) == expected
    with pytest.raises(DataError, match=r"a\.tar: id out of range.*vocabulary has 100"):
        shuffle(tmp_path / "raw", tmp_path / "small", "--content_key", "npy", "--vocab_size", "100")


@pytest.mark.usefixtures("local_ray")
def test_sampling_by_source(tmp_path: Path, small_tokenizer: str) -> None:
    texts = {name: [f"{name} {text}" for text in documents(400, seed=seed, words=4)] for seed, name in enumerate("abc")}
    for name, part in texts.items():
        write_jsonl(tmp_path / "raw" / f"source-{name}.jsonl", part)
    write_jsonl(tmp_path / "raw" / "rest.jsonl", ["rest"])
    (tmp_path / "mix.yaml").write_text(
        "sources:\n- {source: A, markers: [source-a]}\n- {source: B, markers: [nothing, source-b]}\n"
        "- {source: C, markers: [source-c]}\nsampling_frequencies: {A: 2, B: 0.5, C: 0}\n"
    )
    flags = ["--tokenizer", small_tokenizer, "--do_sample", "--default_dataset_yaml", str(tmp_path / "mix.yaml")]
    tokens = tokens_of(shuffle(tmp_path / "raw", tmp_path / "out", *flags, "--format", "npy"))
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    documents_of = {name: counts["documents"] for name, counts in record["sources"].items()}
    assert documents_of["A"] == 800 and documents_of["UNKNOWN"] == 1 and "C" not in documents_of
    assert abs(documents_of["B"] - 200) < 5 * 10
    assert tokens[EOT_ID] == sum(documents_of.values()) == record["counts"]["documents"]
    assert sum(tokens.values()) == sum(counts["tokens"] for counts in record["sources"].values())
    twice = expected_tokens(texts["a"] * 2, small_tokenizer, EOT_ID)
    assert all(tokens[token] >= count for token, count in twice.items())
    repeated = tokens_of(shuffle(tmp_path / "raw", tmp_path / "repeated", *flags, "--format", "npy"))
    assert repeated == tokens


def test_subsets_depend_only_on_the_seed() -> None:
    files = [InputFile(f"{number:03d}", 1) for number in range(100)]
    chosen = choose(files, 42, 30, None)
    assert chosen == choose(files, 42, 30, None) == sorted(chosen, key=lambda item: item.url) and len(set(chosen)) == 30
    assert chosen != choose(files, 43, 30, None)
    assert len(choose(files, 42, None, 0.25)) == 25 and len(choose(files, 42, 40, 0.5)) == 20
    assert choose(files, 42, None, None) == files
    for subset, part in ((0, None), (None, 0.0), (None, 1.5), (None, 0.001)):
        with pytest.raises(ConfigError, match=r"--subset|--subfraction"):
            choose(files, 42, subset, part)


@pytest.mark.processes
def test_the_script_from_s3_to_s3_with_a_new_local_ray(tmp_path: Path, small_tokenizer: str, s3_bucket: str) -> None:
    texts = documents(50)
    path = write_jsonl(tmp_path / "a.jsonl.zst", texts)
    storage.upload(path, f"s3://{s3_bucket}/raw/a.jsonl.zst")
    out = f"s3://{s3_bucket}/tokenized"
    script = ROOT / "datapreprocess" / "ray" / "tokenize_shuffle.py"
    command = [sys.executable, str(script), "--input", f"s3://{s3_bucket}/raw/", "--output", out, "--seqlen", "32"]
    command += ["--tokenizer", small_tokenizer, "--force_num_cores", "1", "--work-dir", str(tmp_path / "work")]
    command += ["--ray-address", "local"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    for url in storage.list_files(out):
        storage.download(url, tmp_path / "copy" / url.rpartition("/")[2])
    assert tokens_of(read_shards(tmp_path / "copy")) == expected_tokens(texts, small_tokenizer, EOT_ID)
    assert {"00000001.tar", "manifest.jsonl", "dataset.json"} == {path.name for path in (tmp_path / "copy").iterdir()}
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
