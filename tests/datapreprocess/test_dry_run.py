"""Dry run: predictions from a sample compared with the full inputs, and inputs that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from datapreprocess_helpers import documents, write_jsonl

from open_lm import storage
from open_lm.datapreprocess.dry_run import Estimate, describe, estimate
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.job import Layout, PreprocessJob
from open_lm.datapreprocess.readers import ReadOptions
from open_lm.datapreprocess.sampling import Sampling
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError
from open_lm.tokenizer import load_tokenizer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": lambda data: bz2.compress(data, 1),  # smallest block size
}


@pytest.fixture(scope="session")
def encoder(small_tokenizer: str) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(small_tokenizer))


def job_for(paths: Sequence[Path | str], root: Path, **options: object) -> PreprocessJob:
    inputs = tuple(InputFile(str(path), storage.size(path)) for path in paths)
    job = PreprocessJob(inputs, Layout(str(root / "out")), tokenizer="small", seq_len=63, workers=1)
    return replace(job, **options)  # type: ignore[arg-type]


def count_tokens(encoder: DocumentEncoder, texts: Sequence[str]) -> int:
    return len(encoder.encode(texts).ids)


def write_many(path: Path, texts: Sequence[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS[path.suffix.replace(".jsonl", "")](data))
    return path


def without_times(estimate_: Estimate) -> Estimate:
    return replace(estimate_, encode_bytes_per_s=0.0, tokenize_s=0.0, write_s=0.0, memory_bytes=0)


def test_small_inputs_are_read_completely_and_counted_exactly(tmp_path: Path, encoder: DocumentEncoder) -> None:
    texts = [documents(40, seed) for seed in range(3)]
    names = ("wiki.jsonl", "web.jsonl.gz", "other-web.jsonl.zst")
    paths = [write_jsonl(tmp_path / name, part) for name, part in zip(names, texts, strict=True)]
    sampling = Sampling({"web": ["web"], "wiki": ["wiki"]}, {"wiki": 2.5})
    found = estimate(job_for(paths, tmp_path, sampling=sampling), encoder)
    wiki, web = count_tokens(encoder, texts[0]), count_tokens(encoder, [*texts[1], *texts[2]])
    assert [(part.name, part.files, part.documents) for part in found.sources] == [("web", 2, 80), ("wiki", 1, 100)]
    assert [round(part.tokens) for part in found.sources] == [web, round(2.5 * wiki)]
    assert [part.tokens_error for part in found.sources] == [0.0, 0.0] and found.total.documents_error == 0.0
    assert found.total.sampled_bytes == found.total.num_bytes
    assert found.sequences == int(web + 2.5 * wiki) // 64 + 1
    assert found.shards == -(-found.sequences // 64)
    assert found.output_bytes == found.sequences * 1024  # a header, and 128 + 128 bytes in a block of 512
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)  # nothing is written


@pytest.mark.parametrize("suffix", COMPRESS)
def test_prediction_from_a_sample(
    suffix: str, tmp_path: Path, encoder: DocumentEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_lm.datapreprocess.probe._PIECE_BYTES", 32 << 10)
    texts = [documents(4000, seed) for seed in range(3)]
    paths = [write_many(tmp_path / f"{number}.jsonl{suffix}", part) for number, part in enumerate(texts)]
    job = job_for(paths, tmp_path)
    found = estimate(job, encoder, sample_bytes=job.num_bytes // 3)
    truth = sum(count_tokens(encoder, part) for part in texts)
    assert found.total.tokens == pytest.approx(truth, rel=0.05)
    assert found.total.documents == pytest.approx(12000, rel=0.05)
    assert found.total.tokens_error is not None and found.total.tokens_error < 0.2
    assert (found.total.documents_error is None) == bool(suffix)  # beginnings do not predict the number of documents
    assert ("±?" in describe(found)) == bool(suffix)
    assert found.total.sampled_bytes < 0.5 * job.num_bytes


@pytest.mark.parametrize(("suffix", "rel"), [(".parquet", 0.1), (".txt", 0.1), (".txt.gz", 0.1), (".tar", 0.3)])
def test_other_formats(
    suffix: str, rel: float, tmp_path: Path, encoder: DocumentEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups from anywhere in a table, separated texts, and members of a tar file, which is read a MB ahead."""
    monkeypatch.setattr("open_lm.datapreprocess.probe._PIECE_BYTES", 32 << 10)
    texts = [text or "empty" for text in documents(6000, words=200)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=200)
    elif suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, text in enumerate(texts):
                member = tarfile.TarInfo(f"{number}.txt")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    else:
        data = "\n===\n".join(texts).encode()
        path.write_bytes(gzip.compress(data) if suffix == ".txt.gz" else data)
    job = job_for([path], tmp_path, options=ReadOptions(separator="\n===\n"))
    found = estimate(job, encoder, sample_bytes=job.num_bytes // 4)
    assert found.total.tokens == pytest.approx(count_tokens(encoder, texts), rel=rel)
    assert found.total.documents == pytest.approx(len(texts), rel=rel)
    assert (found.total.documents_error is None) == (suffix != ".parquet")


def test_sample_depends_only_on_the_seed(tmp_path: Path, encoder: DocumentEncoder) -> None:
    job = job_for([write_many(tmp_path / "a.jsonl", documents(9000))], tmp_path)
    first, again = (without_times(estimate(job, encoder, sample_bytes=600_000)) for _ in range(2))
    assert first == again
    other = without_times(estimate(replace(job, seed=1), encoder, sample_bytes=600_000))
    assert other != first
    assert other.total.probes == first.total.probes == 2


def test_every_source_is_sampled(tmp_path: Path, encoder: DocumentEncoder) -> None:
    """Sources of very different sizes: the one with two probes also determines the error of the other."""
    paths = [write_many(tmp_path / "big.jsonl", documents(9000)), write_many(tmp_path / "mid.jsonl", documents(3000))]
    sampling = Sampling({"big": ["big"], "mid": ["mid"]})
    found = estimate(job_for(paths, tmp_path, sampling=sampling), encoder, sample_bytes=800_000)
    assert [part.probes for part in found.sources] == [2, 1]
    assert all(part.tokens_error for part in found.sources)
    single = estimate(job_for(paths[1:], tmp_path), encoder, sample_bytes=1)
    assert single.total.probes == 1 and single.total.tokens_error is None


def test_document_longer_than_a_probe(tmp_path: Path, encoder: DocumentEncoder) -> None:
    """The sample must contain the end of a line, so reading continues until one is found."""
    long = " ".join(str(number * 7919) for number in range(200_000))
    path = write_many(tmp_path / "a.jsonl.gz", [long, *documents(2000)])
    found = estimate(job_for([path], tmp_path), encoder, sample_bytes=1)
    assert found.total.documents >= 1
    assert found.total.tokens > count_tokens(encoder, [long]) / 2


def test_bad_documents_and_broken_files_are_reported(tmp_path: Path, encoder: DocumentEncoder) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", documents(50))
    with open(good, "a") as file:
        file.write("no JSON\n" * 3)
    cut = write_jsonl(tmp_path / "cut.jsonl.gz", documents(50))
    cut.write_bytes(cut.read_bytes()[:-40])
    found = estimate(job_for([cut, good], tmp_path), encoder)
    assert found.bad_documents == 3
    assert len(found.problems) == 1 and "cut.jsonl.gz" in found.problems[0]
    text = describe(found)
    assert "bad documents in the sample: 3" in text and "problem: " in text


def test_sample_without_documents_is_an_error(tmp_path: Path, encoder: DocumentEncoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(5), key="content")
    with pytest.raises(DataError, match="content_key"):
        estimate(job_for([path], tmp_path), encoder)


def test_number_of_shards_with_one_data_set_per_source(tmp_path: Path, encoder: DocumentEncoder) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", documents(100)) for name in ("a", "b")]
    sampling = Sampling({"A": ["a.jsonl"], "B": ["b.jsonl"]})
    together = job_for(paths, tmp_path, sampling=sampling)
    layout = replace(together.layout, shard_sequences=50)
    found = estimate(replace(together, layout=layout), encoder)
    assert found.shards == -(-found.sequences // 50)
    per_source = estimate(replace(together, layout=replace(layout, per_source=True)), encoder)
    assert per_source.shards == sum(-(-(int(part.tokens) // 64) // 50) for part in per_source.sources)


def test_table(tmp_path: Path, encoder: DocumentEncoder) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", documents(100)) for name in ("a", "b")]
    sampling = Sampling({"A": ["a.jsonl"], "B": ["b.jsonl"]}, {"B": 0.5})
    rows = describe(estimate(job_for(paths, tmp_path, sampling=sampling), encoder)).splitlines()
    assert rows[0].split() == ["source", "files", "input", "factor", "documents", "tokens", "sampled"]
    assert re.fullmatch(r"A +1 +\S+ kB +1 +100 ± 0\.0% +[\d,]+ ± 0\.0% +100\.0%", rows[1])
    assert re.fullmatch(r"B +1 +\S+ kB +0\.5 +50 ± 0\.0% +[\d,]+ ± 0\.0% +100\.0%", rows[2])
    assert rows[3].startswith("total") and "150 ± 0.0%" in rows[3]
    assert re.search(r"time: about \d+:\d\d:\d\d with 1 worker: ", "\n".join(rows))
    assert "requests" not in "\n".join(rows)


def test_requests_to_remote_storage(tmp_path: Path, encoder: DocumentEncoder, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/raw/a.jsonl.zst"
    storage.upload(write_jsonl(tmp_path / "a.jsonl.zst", documents(60)), url)
    job = job_for([url], tmp_path, sampling=Sampling({"A": ["raw"]}, {"A": 1.5}))
    job = replace(job, layout=Layout(f"s3://{s3_bucket}/out"))
    found = estimate(job, encoder)
    assert round(found.total.documents) == 90
    assert (found.get_requests, found.put_requests) == (2, found.shards)
    assert "about 2 to read" in describe(found)
    assert storage.list_files(f"s3://{s3_bucket}", recursive=True) == [url]


def test_shared_corpus(shared_dir: Path, tmp_path: Path) -> None:
    """A quarter of the corpus predicts its tokens and sequences; its files begin with many short documents."""
    encoder = DocumentEncoder(load_tokenizer(str(shared_dir / "data/tokenizers/gpt-neox-20b.json")))
    paths = sorted((shared_dir / "data/raw").glob("*.jsonl.zst"))
    found = estimate(replace(job_for(paths, tmp_path), seq_len=2048), encoder)
    assert found.total.sampled_bytes <= 0.25 * sum(map(os.path.getsize, paths))
    assert found.total.tokens == pytest.approx(14_486_324, rel=0.05)
    assert found.sequences == pytest.approx(7_070, rel=0.05)
    assert found.total.documents_error is None
