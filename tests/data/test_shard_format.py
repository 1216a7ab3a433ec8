"""The shard and manifest formats: members of every kind, the tar index, the writer, manifests and patterns."""

from __future__ import annotations

import gzip
import io
import json
import mmap
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.shard_format import (
    MEMBER_KINDS,
    PAD_ID,
    ManifestEntry,
    ShardWriter,
    decode_member,
    encode_member,
    expand_shards,
    index_shard,
    read_manifest,
    shard_sizes,
    split_name,
    token_dtype,
    total_sequences,
    write_manifest,
)
from open_lm.errors import DataError
from open_lm.utils.make_wds_manifest import make_manifest


@pytest.mark.parametrize("kind", MEMBER_KINDS)
@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
@settings(max_examples=30)
def test_members_survive_a_round_trip(kind: str, ids: list[int]) -> None:
    found = decode_member(encode_member(np.array(ids, np.int64), kind), kind)
    assert found.dtype == np.int64 and found.tolist() == ids


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (50432, "uint16"), (65537, "uint32")]
)
def test_npy_members_have_the_smallest_unsigned_type(vocab: int, dtype: str) -> None:
    assert token_dtype(vocab) == np.dtype(dtype)
    data = encode_member(np.array([0, vocab - 1]), "npy", token_dtype(vocab))
    assert np.load(io.BytesIO(data)).dtype == np.dtype(dtype)


def test_an_npy_member_with_pads_is_signed_and_keeps_every_id() -> None:
    data = encode_member(np.array([65535, 7, PAD_ID]), "npy", np.dtype(np.uint16))
    stored = np.load(io.BytesIO(data))
    assert stored.dtype == np.int32 and stored.tolist() == [65535, 7, -1]


def test_an_id_beyond_the_type_is_an_error() -> None:
    with pytest.raises(DataError, match="do not fit uint16"):
        encode_member(np.array([70000]), "npy", np.dtype(np.uint16))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("txt", b"[1, 2, '<|endoftext|>', 3]"),
        ("txt", b'[1, 2, "<|endoftext|>", 3]'),
        ("txt", b"(1, 2, '<|endoftext|>', 3,)\n"),
        ("json", b'[1,2,"<|endoftext|>",3]'),
        ("json.gz", gzip.compress(b'[1,2,"<|endoftext|>",3]', mtime=0)),
    ],
)
def test_the_end_of_text_string_of_old_members(kind: str, data: bytes) -> None:
    assert decode_member(data, kind, eot_id=9).tolist() == [1, 2, 9, 3]
    with pytest.raises(DataError, match="end-of-text id is not known"):
        decode_member(data, kind)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("npy", b""),
        ("npy", b"\x93NUMPY junk"),
        ("npy", encode_member(np.arange(5), "npy")[:-3]),
        ("json", b"[1, 2"),
        ("json", b'{"a": 1}'),
        ("json", b"[1.5]"),
        ("json", b"[true]"),
        ("json", b"[[1]]"),
        ("json", b'[1, "word"]'),
        ("json", b"[99999999999999999999]"),
        ("json.gz", gzip.compress(b"[1, 2, 3]", mtime=0)[:-9]),
        ("json.gz", b"[1, 2, 3]"),
        ("txt", b"__import__('os').getcwd()"),
        ("txt", b"[" * 100_000),
        ("txt", b"\xff\xfe"),
        ("parquet", b""),
    ],
)
def test_invalid_members_are_data_errors(kind: str, data: bytes) -> None:
    with pytest.raises(DataError):
        decode_member(data, kind, eot_id=0)


def test_npy_never_unpickles() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError):
        decode_member(buffer.getvalue(), "npy")
    floats, table = io.BytesIO(), io.BytesIO()
    np.save(floats, np.array([1.0]))
    np.save(table, np.zeros((2, 2), np.int64))
    for data in (floats, table):
        with pytest.raises(DataError, match="1-D list of integers"):
            decode_member(data.getvalue(), "npy")


def make_shard(path: Path, kind: str = "npy", count: int = 5) -> Path:
    with ShardWriter(path, kind, dtype=token_dtype(1000)) as writer:
        for number in range(count):
            writer.write(f"{number:012d}", np.arange(number, number + 7))
    return path


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_written_shards_are_plain_tars_and_indexed_exactly(tmp_path: Path, kind: str) -> None:
    path = make_shard(tmp_path / "shard-0000003.tar", kind)
    listing = subprocess.run(["tar", "-tvf", str(path)], capture_output=True, text=True, check=True).stdout
    assert len(listing.splitlines()) == 5 and "1970" in listing and "0/0" in listing
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for source in (path.read_bytes(), file, mapped):
            members = index_shard(source, path.name)
            assert [member.key for member in members] == [f"{number:012d}" for number in range(5)]
            assert {member.kind for member in members} == {kind}
        ids = decode_member(mapped[members[3].offset : members[3].offset + members[3].size], kind)
        assert ids.tolist() == list(range(3, 10))


def test_the_same_members_give_the_same_bytes_and_correct_info(tmp_path: Path) -> None:
    import hashlib

    one, two = make_shard(tmp_path / "one.tar", "json.gz"), make_shard(tmp_path / "two.tar", "json.gz")
    assert one.read_bytes() == two.read_bytes()
    with ShardWriter(tmp_path / "x.tar", "npy", dtype=token_dtype(50)) as writer:
        writer.write("a", np.array([1, 2, 3]))
        writer.write("b", np.array([4, PAD_ID, PAD_ID]))
    data = (tmp_path / "x.tar").read_bytes()
    info = writer.info
    assert (info.stem, info.num_sequences, info.num_tokens, info.num_bytes) == ("x", 2, 4, len(data))
    assert info.sha256 == hashlib.sha256(data).hexdigest()


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError), ShardWriter(tmp_path / "x.tar", "npy") as writer:
        writer.write("a", np.array([1, 2, 3]))
        writer.write("b", np.array([1.5]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 300, 512, 600, 1024, 3000, 5119])
def test_a_truncated_shard_is_detected_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    data = make_shard(tmp_path / "s.tar").read_bytes()
    end = 5 * 1024
    assert cut < end and data[end:] == bytes(len(data) - end)
    with pytest.raises(DataError, match=r"s\.tar: .*(cut short|no valid tar header)"):
        index_shard(data[:cut], "s.tar")


def test_garbage_compressed_and_foreign_tars(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.tar: no valid tar header at byte 0"):
        index_shard(b"garbage" * 500, "x.tar")
    data = make_shard(tmp_path / "s.tar").read_bytes()
    with pytest.raises(DataError, match=r"no valid tar header at byte 1024"):
        index_shard(data[:1024] + b"x" * 512 + data[1536:], "s.tar")
    with pytest.raises(DataError, match="compressed"):
        index_shard(gzip.compress(data) + bytes(512), "s.tar")
    with tarfile.open(tmp_path / "f.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("picture.jpg"))
    with pytest.raises(DataError, match=r"no member of a known kind.*jpg"):
        index_shard((tmp_path / "f.tar").read_bytes(), "f.tar")


@pytest.mark.parametrize(("name", "kind"), [("doc/a.1.npy", "1.npy"), ("v1.0.json.GZ", "0.json.gz")])
def test_a_member_name_with_dots_is_refused_with_the_reason(name: str, kind: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=rf"found {kind}\. The kind of {name} begins at the first dot of its name"):
        index_shard(buffer.getvalue(), "s.tar")


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_with_long_names_and_folders(tmp_path: Path, format_: int) -> None:
    stem = "deep/" + "folder-é/" * 20 + "key"
    with tarfile.open(tmp_path / "t.tar", "w", format=format_) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (
            (f"{stem}.json", b"[1,2]"),
            ("notes.md", b"hello"),
            ("short.JSON.GZ", gzip.compress(b"[3]")),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = (tmp_path / "t.tar").read_bytes()
    found = index_shard(data, "t.tar")
    assert [(member.key, member.kind) for member in found] == [(stem, "json"), ("short", "json.gz")]
    assert [decode_member(data[m.offset : m.offset + m.size], m.kind).tolist() for m in found] == [[1, 2], [3]]


def test_names_are_split_like_in_webdataset() -> None:
    assert split_name("a.b/c.d/key.json.gz") == ("a.b/c.d/key", "json.gz")
    assert split_name("key") == ("key", "")


def test_the_golden_shards(shared_dir: Path) -> None:
    folder = shared_dir / "compat" / "run" / "data"
    urls = expand_shards(str(folder / "{00000001..00000008}.tar"))
    sizes = shard_sizes(urls)
    assert sizes == dict.fromkeys(urls[:6], 256)  # the two validation shards are not in the manifest
    for url in urls:
        data = Path(url).read_bytes()
        with tarfile.open(url) as tar:
            names = tar.getnames()
        members = index_shard(data, url)
        assert [f"{member.key}.{member.kind}" for member in members] == names and len(members) == 256
        assert {len(decode_member(data[m.offset : m.offset + m.size], m.kind)) for m in members} == {65}


def test_manifests_with_old_keys_and_without_a_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"shard": "a", "num_chunks": 3}\n\n{"shard": "b", "num_sequences": 4, "sha256": "x"}')
    assert read_manifest(str(path)) == [ManifestEntry("a", 3), ManifestEntry("b", 4, {"sha256": "x"})]
    write_manifest(path, read_manifest(str(path)))
    assert json.loads(path.read_text().splitlines()[1]) == {"shard": "b", "num_sequences": 4, "sha256": "x"}


def test_all_bad_manifest_lines_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(
        '{"shard": "a", "num_sequences": 3}\nnonsense\n{"shard": "b"}\n[]\n{"shard": "a", "num_sequences": 1}\n'
    )
    with pytest.raises(DataError) as caught:
        read_manifest(str(path))
    for line in (2, 3, 4, 5):
        assert f"line {line}:" in str(caught.value)
    path.write_text("")
    with pytest.raises(DataError, match="make_wds_manifest"):
        read_manifest(str(path))


def test_sizes_json_and_length_files(tmp_path: Path) -> None:
    shards = [str(make_shard(tmp_path / f"{name}.tar")) for name in ("a", "b")]
    assert shard_sizes(shards) is None and total_sequences(shards) is None
    (tmp_path / "__len__").write_text("10\n")
    assert shard_sizes(shards) is None and total_sequences(shards) == 10
    assert shard_sizes(shards[:1]) == {shards[0]: 10}
    (tmp_path / "sizes.json").write_text('{"a.tar": 5, "b.tar": 6}')
    assert shard_sizes(shards) == dict(zip(shards, (5, 6), strict=True)) and total_sequences(shards) == 11
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry("a", 1), ManifestEntry("b", 2)])
    assert total_sequences(shards) == 3
    assert shard_sizes(["pipe:cat a.tar"]) is None


def test_patterns(tmp_path: Path) -> None:
    for name in ("x/0.tar", "x/1.tar", "y/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_shard(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in ("x/0.tar", "x/1.tar", "y/0.tar"))
    assert expand_shards(f"{tmp_path}/x/{{0..1}}.tar::{c}") == [a, b, c]
    assert expand_shards(f"{tmp_path}/*/0.tar") == [a, c]
    assert expand_shards(f"{tmp_path}/x") == [a, b]
    assert expand_shards("pipe:aws s3 cp s3://b/{0..1}.tar -") == [f"pipe:aws s3 cp s3://b/{n}.tar -" for n in (0, 1)]
    assert expand_shards("s3://bucket/{0..1}.tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    with pytest.raises(DataError) as caught:
        expand_shards(f"{tmp_path}/x/{{0..3}}.tar::{tmp_path}/z*.tar")
    assert "x/2.tar" in str(caught.value) and "x/3.tar" in str(caught.value) and "z*.tar" in str(caught.value)
    with pytest.raises(DataError, match="braces"):
        expand_shards("a{0..1.tar")


@pytest.mark.parametrize("pattern", ["*.tar.gz", "*", "*.tar", "0.tar", "{0..1}.tar", "", "/"])
def test_a_tar_gz_shard_for_a_pattern_is_named_as_compressed(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "packed"
    for number in range(2):
        packed = gzip.compress(make_shard(folder / f"{number}.tar").read_bytes())
        (folder / f"{number}.tar").unlink()
        (folder / f"{number}.tar.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"found [12] compressed tar files, such as .*0\.tar\.gz(.|\n)*decompress"):
        expand_shards(f"{folder}/{pattern}" if pattern.strip("/") else f"{folder}{pattern}")
    with pytest.raises(DataError, match=r"found 2 compressed tar files"):
        make_manifest(str(folder))


def test_shards_and_manifests_in_s3(s3_bucket: str) -> None:
    base = f"s3://{s3_bucket}/set"
    with ShardWriter(f"{base}/00000001.tar", "json.gz") as writer:
        writer.write("a", np.array([1, 2]))
    write_manifest(f"{base}/manifest.jsonl", [ManifestEntry("00000001", 1)])
    assert expand_shards(f"{base}/*.tar") == expand_shards(f"{base}/") == [f"{base}/00000001.tar"]
    assert shard_sizes([f"{base}/00000001.tar"]) == {f"{base}/00000001.tar": 1}
