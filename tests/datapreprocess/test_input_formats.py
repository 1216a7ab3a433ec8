"""End-to-end tests of all input formats."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datapreprocess_helpers import (
    EOT_ID,
    documents,
    expected_tokens,
    make,
    read_shards,
    record_of,
    tokens_of,
    write_jsonl,
)
from readers_helpers import COMPRESS

from open_lm import storage
from open_lm.datapreprocess import inputs
from open_lm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_process")
TEXTS = [text for text in documents(60, seed=11) if text]


def json_rows(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_arrow(path: Path, texts: Sequence[str]) -> None:
    table = pa.table({"text": list(texts)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def save_to_disk(path: Path, texts: Sequence[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(path, num_shards=2)


def write_nested(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"meta": {"body": text}, "text": "wrong"}) + "\n" for text in texts))


def write_many_texts(path: Path, texts: Sequence[str]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}{'.md' if number % 2 else '.txt'}").write_bytes(text.encode())


def write_separated(separator: str) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: path.write_bytes(separator.join(texts).encode())


def write_lines(compression: str) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: path.write_bytes(COMPRESS[compression](json_rows(texts)))


def as_members(suffix: str, content: Callable[[str], bytes]) -> Callable[[Path, Sequence[str]], Any]:
    return lambda path, texts: write_tar(path, {f"{n:04d}{suffix}": content(text) for n, text in enumerate(texts)})


KINDS: dict[str, tuple[str, Callable[[Path, Sequence[str]], Any], list[str]]] = {
    "parquet": ("a.parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path, row_group_size=9), []),
    "arrow": ("a.arrow", write_arrow, []),
    "saved data set": ("saved", save_to_disk, []),
    "texts": ("texts", write_many_texts, []),
    "an array": ("a.json", lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts])), []),
    "nested key": ("a.jsonl", write_nested, ["--content-key", "meta.body"]),
    "tar of texts": ("a.tar", as_members(".txt", str.encode), ["--content-key", "txt"]),
    "tar of json": (
        "a.tar", as_members(".json", lambda text: json.dumps({"body": text}).encode()), ["--content-key", "json:body"]
    ),
    "separated by lines": ("a.txt", write_separated("\n\n"), ["--separator", r"\n\n"]),
    "separated by real newlines": ("a.txt", write_separated("\n\n"), ["--separator", "\n\n"]),
    "separated by ß": ("a.txt", write_separated("ß"), ["--separator", "ß"]),
    "separated by U+2028": ("a.md", write_separated("\u2028"), ["--separator", "\u2028"]),
    "separated by escaped U+2028": ("a.md", write_separated("\u2028"), ["--separator", r"\u2028"]),
    "separated by a mixture": ("a.txt", write_separated("\t§数\\"), ["--separator", r"\t§数\\"]),
    "separated by a lookalike of an escape": ("a.txt", write_separated(r"\d\x"), ["--separator", r"\d\x"]),
    **{f"lines{suffix}": (f"a.jsonl{suffix}", write_lines(suffix), []) for suffix in COMPRESS},
    "a zst": ("00.zst", write_lines(".zst"), []),
    "an xz": ("a.txt.xz", lambda p, t: p.write_bytes(COMPRESS[".xz"]("|".join(t).encode())), ["--separator", "|"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_input_formats(tmp_path: Path, small_tokenizer: str, kind: str) -> None:
    name, write, flags = KINDS[kind]
    write(tmp_path / name, TEXTS)
    output = make(tmp_path / name, tmp_path / "out", small_tokenizer, *flags) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens(TEXTS, small_tokenizer, EOT_ID)
    record = record_of(output)
    assert record["counts"]["documents"] == len(TEXTS)
    assert record["counts"]["characters"] == sum(map(len, TEXTS))
    for item in record["inputs"]:
        digest = hashlib.sha256(Path(item["url"]).read_bytes()).hexdigest()
        assert item["sha256"] == digest and item["num_bytes"] == os.path.getsize(item["url"])


def test_documents_of_ids_larger_than_16_bits(tmp_path: Path) -> None:
    from open_lm.datapreprocess.ray.tokenize_shuffle import main

    rng = np.random.default_rng(0)
    arrays = [rng.integers(60_000, 90_000, rng.integers(1, 90)) for _ in range(30)]
    members = {}
    for number, array in enumerate(arrays):
        buffer = io.BytesIO()
        np.save(buffer, array.astype([np.uint32, np.int64][number % 2]))
        members[f"{number:03d}.npy"] = buffer.getvalue()
    write_tar(tmp_path / "a.tar", members)
    command = ["--input", str(tmp_path / "a.tar"), "--content-key", "npy", "--vocab-size", "90000", "--seqlen", "32"]
    main([*command, "--output", str(tmp_path / "out"), "--no-shuffle", "--format", "npy"])
    stream = [value for array in arrays for value in [*array.tolist(), 0]]
    shards = read_shards(tmp_path / "out")
    assert [value for _, _, ids in shards for value in ids if value != -1] == stream
    for flags, message in (
        (["--add-bos"], "no begin-of-text token"), (["--eot-token", "x"], "--eot-token x: needs a --tokenizer")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            main([*command, "--output", str(tmp_path / "no"), *flags])


def test_a_slice_of_a_local_data_set(tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    texts = documents(100, seed=4)
    write_jsonl(tmp_path / "data" / "train-0.jsonl", texts[:50])
    write_jsonl(tmp_path / "data" / "train-1.jsonl", texts[50:])
    url = f"hf-dataset://{tmp_path}/data?split=train"
    for slice_, part in (("[:10%]", texts[:10]), ("[45:55]", texts[45:55]), ("", texts)):
        out = tmp_path / f"out{len(part)}{slice_[1:3]}".replace(":", "_").replace("%", "")
        output = make([url + slice_], out, small_tokenizer) / "0"
        assert tokens_of(read_shards(output)) == expected_tokens(part, small_tokenizer, EOT_ID), slice_
        has_digest = ["sha256" in item for item in record_of(output)["inputs"]]
        assert has_digest == [not slice_] * len(has_digest), "a partially read file has no digest"


def test_files_read_in_pieces(tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MIN_UNIT_BYTES", 1 << 12)
    texts = documents(300, seed=6)
    path = write_jsonl(tmp_path / "large.jsonl", texts)
    write_jsonl(tmp_path / "large.jsonl.zst", texts)
    write_jsonl(tmp_path / "small.jsonl", texts[:2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "z.parquet", row_group_size=20)
    with pa.ipc.new_stream(tmp_path / "z0.arrow", pa.schema({"text": pa.string()})) as file:
        file.write_table(pa.table({"text": texts}), max_chunksize=20)
    output = make([tmp_path / "*.jsonl*", tmp_path / "z*"], tmp_path / "out", small_tokenizer) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens(
        [*texts * 2, *texts[:2], *texts * 2], small_tokenizer, EOT_ID
    )
    large, streamed, small, *columns = record_of(output)["inputs"]
    data = path.read_bytes()
    assert len(large["pieces"]) > 5 and "sha256" not in large
    assert large["pieces"][0][0] == 0 and large["pieces"][-1][1] >= len(data)
    digests = [hashlib.sha256(data[start:end]).hexdigest() for start, end in large["pieces"]]
    assert large["sha256_of_pieces"] == hashlib.sha256("".join(digests).encode()).hexdigest()
    for item in (streamed, small, *columns):
        assert item["sha256"] == hashlib.sha256(Path(item["url"]).read_bytes()).hexdigest()


def test_inputs_on_s3_are_recorded_with_their_etags(tmp_path: Path, small_tokenizer: str, s3_bucket: str) -> None:
    data = json_rows(TEXTS)
    storage.write_bytes(f"s3://{s3_bucket}/raw/a.jsonl", data)
    output = make([f"s3://{s3_bucket}/raw/*.jsonl"], tmp_path / "out", small_tokenizer) / "0"
    assert tokens_of(read_shards(output)) == expected_tokens(TEXTS, small_tokenizer, EOT_ID)
    (item,) = record_of(output)["inputs"]
    assert item["url"] == f"s3://{s3_bucket}/raw/a.jsonl" and item["num_bytes"] == len(data)
    assert item["etag"].strip('"') == hashlib.md5(data).hexdigest()
    assert item["sha256"] == hashlib.sha256(data).hexdigest()


def test_ten_thousand_small_files(tmp_path: Path, small_tokenizer: str) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in random.Random(0).sample(range(10_000), 10_000):
        (folder / f"{number:05d}.jsonl").write_text(f'{{"text": "the {number}"}}\n')
    output = make(folder, tmp_path / "out", small_tokenizer, "--no-shuffle") / "0"
    texts = [f"the {number}" for number in range(10_000)]
    assert tokens_of(read_shards(output)) == expected_tokens(texts, small_tokenizer, EOT_ID)
    assert len(record_of(output)["inputs"]) == 10_000
