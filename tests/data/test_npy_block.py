"""Reading members at once gives the same result as reading them one by one, for every kind of tar."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.data.npy_block import NpyRows
from open_lm.data.order import DataOrder, OrderSettings, Source
from open_lm.data.shard_format import decode_member, encode_member, index_shard, iter_files
from open_lm.data.stream import SampleReader, StreamSpec
from open_lm.errors import DataError

LENGTH, VOCAB_SIZE = 9, 100


def tar_of(files: list[tuple[str, bytes]], mtime: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, (name, data) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime * number
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npy(number: int, dtype: str = "uint16", length: int = LENGTH) -> bytes:
    return encode_member((np.arange(length) + number) % VOCAB_SIZE, "npy", np.dtype(dtype))


def listing(source: object) -> list[tuple[str, int, int]] | str:
    try:
        return list(iter_files(source, "a.tar"))  # type: ignore[arg-type]
    except DataError as error:
        return str(error)


NAMES = st.sampled_from(["{:06d}.npy", "{}.npy", "dir/{}.npy", "{:03d}.v1.npy", "{}.txt", "x" * 120 + "{}.npy"])
FILES = st.lists(st.tuples(NAMES, st.integers(1, 30), st.sampled_from(["uint16", "uint8", "int32", ">i4"])), max_size=6)


@settings(deadline=None, max_examples=60)
@given(FILES, st.integers(0, 5), st.data())
def test_bytes_and_files_are_listed_alike_even_if_damaged(
    groups: list[tuple[str, int, str]], mtime: int, data: st.DataObject
) -> None:
    files = [(name.format(k), npy(k, dtype)) for name, count, dtype in groups for k in range(count)]
    tar = bytearray(tar_of(files, mtime))
    assert listing(bytes(tar)) == listing(io.BytesIO(tar))
    if files:
        assert len(listing(memoryview(tar))) == len(files)
    position = data.draw(st.integers(0, len(tar) - 1))
    tar[position] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(tar[: data.draw(st.integers(position, len(tar)))])
    assert listing(cut) == listing(io.BytesIO(cut))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["uint16", "int32", "long", "short", "pads", "wrong type"]), min_size=1, max_size=20))
def test_rows_are_the_members_with_the_header_of_the_first(kinds: list[str]) -> None:
    encoders = {
        "long": lambda k: npy(k, length=LENGTH + 1),
        "short": lambda k: npy(k, length=3),
        "pads": lambda k: encode_member(np.full(LENGTH, -1), "npy", np.dtype(np.uint16)),
        "wrong type": lambda k: npy(k).replace(b"<u2", b"<f2"),
    }
    files = [(f"{k}.npy", encoders.get(kind, lambda k, kind=kind: npy(k, kind))(k)) for k, kind in enumerate(kinds)]
    data = tar_of(files)
    members = index_shard(data, "a.tar")
    if kinds[0] == "wrong type":
        with pytest.raises(ValueError, match="integers"):
            NpyRows(data, members)
        return
    rows = NpyRows(data, members)
    header = files[0][1][: len(files[0][1]) - rows.length * rows.gather(np.array([0])).itemsize]
    expected = [len(file) == len(files[0][1]) and file.startswith(header) for _, file in files]
    assert rows.is_row.tolist() == expected
    numbers = np.flatnonzero(rows.is_row)[::-1]
    for number, ids in zip(numbers.tolist(), rows.gather(numbers), strict=True):
        assert ids.tolist() == decode_member(files[number][1], "npy").tolist()


@pytest.mark.parametrize("first", [b"", b"\x93NUMPY", b"\x93NUMPY\x02\x00" + bytes(100), b"no npy at all"])
def test_a_first_member_that_is_not_a_plain_array_is_an_error(first: bytes) -> None:
    data = tar_of([("0.npy", first), ("1.npy", npy(1))])
    with pytest.raises(ValueError, match=r"\w"):
        NpyRows(data, index_shard(data, "a.tar"))


IDS = st.integers(-3, VOCAB_SIZE + 1) | st.integers(0, VOCAB_SIZE - 1)
ROWS = st.lists(st.lists(IDS, min_size=LENGTH - 1, max_size=LENGTH + 4), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.booleans(), st.integers(0, 3))
def test_the_reader_agrees_with_decoding_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], narrow: bool, seed: int
) -> None:
    """Members as npy (read at once) and as txt (one by one) give the same ids, or the same error."""
    found = []
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("npy", "txt"):
        dtype = np.dtype(np.uint16 if narrow else np.int64) if kind == "npy" else None
        files = [
            (f"{k}.{kind}", encode_member(np.array(ids), kind, dtype)) for k, ids in enumerate([*rows, [1] * LENGTH])
        ]
        path = folder / f"{kind}.tar"
        path.write_bytes(tar_of(files))
        source = Source("s", (str(path),), (len(files),))
        reader = SampleReader(StreamSpec((source,), LENGTH - 1, VOCAB_SIZE, None))
        samples = DataOrder([source], seed, OrderSettings()).take(len(files))
        try:
            read, filled = reader.read(samples)
            found.append((read.tolist(), filled.tolist()))
        except DataError as error:
            found.append((str(error).partition("found the id")[2].partition(",")[2],))
    assert found[0] == found[1]
