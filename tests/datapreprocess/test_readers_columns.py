"""Readers of Parquet and Arrow files, of saved Hugging Face data sets, and of data sets by name and slice."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datapreprocess_helpers import documents
from readers_helpers import collect, full_piece, json_lines, read, read_good, read_until_break

from open_lm import storage
from open_lm.datapreprocess.readers import PieceReader, expand_folder, split
from open_lm.errors import ConfigError, DataError

TEXTS = documents(500)


def write_arrow(path: Path, table: pa.Table, rows: int = 64) -> Path:
    """Write an Arrow stream, as `datasets` does."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)
    return path


def write_arrow_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=64)
    return path


def write_feather(path: Path, table: pa.Table) -> Path:
    pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=64)
    return path


def write_parquet(path: Path, table: pa.Table, rows: int = 64) -> Path:
    pq.write_table(table, path, row_group_size=rows)
    return path


WRITERS = {"a.parquet": write_parquet, "a.arrow": write_arrow, "b.arrow": write_arrow_file, "c.arrow": write_feather}


def invalid_utf8() -> pa.Array:
    data = [b"\xff", b"ok"]
    return pa.Array.from_buffers(pa.string(), 2, pa.array(data, pa.binary()).buffers())


# --- Parquet and Arrow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_text_column_in_one_and_in_several_pieces(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, pa.table({"id": range(500), "text": TEXTS}))
    size = path.stat().st_size
    reader = PieceReader(full_piece(path))
    assert collect(reader) == (TEXTS, [])
    assert (reader.lines, reader.digest) == (500, hashlib.sha256(path.read_bytes()).hexdigest())
    for unit_bytes in (1, size // 3):
        pieces = split(str(path), size, unit_bytes)
        assert len(pieces) == 8 if unit_bytes == 1 else 2 <= len(pieces) <= 4
        assert 0.9 * size < sum(piece.num_bytes for piece in pieces) <= size
        readers = [PieceReader(piece) for piece in pieces]
        assert [text for reader in readers for text in collect(reader)[0]] == TEXTS
        assert sum(reader.lines for reader in readers) == 500
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    assert read_good(packed) == TEXTS
    assert collect(PieceReader(full_piece(f"{path}?rows=60:200"))) == (TEXTS[60:200], [])
    assert collect(PieceReader(full_piece(f"{path}?rows=499:500"))) == (TEXTS[499:], [])


@pytest.mark.parametrize("name", WRITERS)
def test_nested_columns_and_text_types(tmp_path: Path, name: str) -> None:
    structs = [{"b": "deep", "c": 1}, None, {"b": None, "c": 2}]
    path = WRITERS[name](tmp_path / name, pa.table({"a": structs, "flat.b": ["x", "y", "z"], "n": [1, 2, 3]}))
    found, bad = read(path, content_key="a.b")
    assert found == ["deep"] and [(item.kind, item.line) for item in bad] == [("null", 2), ("null", 3)]
    assert read_good(path, content_key="flat.b") == ["x", "y", "z"]
    for key, kind in {"text": "missing key", "a.x": "missing key", "n.b": "missing key", "n": "wrong type"}.items():
        error = read_until_break(path, content_key=key)[1]
        assert error.kind == kind and "--content_key" in str(error) and key in str(error)
    types = [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
    for kind in types[:3] if name != "a.arrow" else types:
        table = pa.table({"text": pa.array(["ä", "b"]).cast(kind)})
        assert read_good(WRITERS[name](tmp_path / f"t-{name}", table)) == ["ä", "b"]


@pytest.mark.parametrize("name", WRITERS)
def test_bad_rows(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, pa.table({"text": invalid_utf8()}))
    found, bad = read(path)
    assert found == ["ok"] and [(item.kind, item.line, item.content) for item in bad] == [("invalid UTF-8", 1, "\\xff")]
    path = WRITERS[name](path, pa.table({"text": pa.array(["x", None, "y"])}))
    found, bad = read(path)
    assert found == ["x", "y"] and [(item.kind, item.line) for item in bad] == [("null", 2)]
    path.write_bytes(b"")
    assert [item.kind for item in read(path)[1]] == ["empty file"]
    path = WRITERS[name](path, pa.table({"text": pa.array([], pa.string())}))
    assert read(path) == ([], [])


@pytest.mark.parametrize("name", WRITERS)
def test_broken_column_files(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, pa.table({"text": TEXTS}))
    data = path.read_bytes()
    for cut in (data[: len(data) // 2], b"junk" * 1000, data[:5]):
        path.write_bytes(cut)
        assert read_until_break(path)[1].kind in ("damaged", "cut short")
        assert split(str(path), len(cut), 1)[0].url == str(path)


def test_arrow_stream_without_end_marker_is_truncated(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": TEXTS}))
    path.write_bytes(path.read_bytes()[:-8])
    found, error = read_until_break(path)
    assert found == TEXTS and error.kind == "cut short"


def test_column_files_in_s3(tmp_path: Path, s3_bucket: str) -> None:
    for name, write in WRITERS.items():
        path = write(tmp_path / name, pa.table({"text": TEXTS}))
        url = f"s3://{s3_bucket}/{name}"
        storage.upload(path, url)
        pieces = split(url, path.stat().st_size, path.stat().st_size // 3)
        assert [text for piece in pieces for text in collect(PieceReader(piece))[0]] == TEXTS


# --- saved data sets ---------------------------------------------------------------------------------------------


def expanded(url: str) -> list[str]:
    """Return the documents of a data set."""
    infos = expand_folder(url)
    assert infos is not None and all(info.size > 0 for info in infos)
    return [text for info in infos for text in collect(PieceReader(full_piece(info.url)))[0]]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable network access and put the cache into the test folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_folders_made_by_save_to_disk(tmp_path: Path, s3_bucket: str) -> None:
    import datasets

    train = datasets.Dataset.from_dict({"text": TEXTS}, split="train")
    test = datasets.Dataset.from_dict({"text": ["t1", "t2"]}, split="test")
    train.save_to_disk(tmp_path / "single", num_shards=3)
    datasets.DatasetDict({"train": train.select(range(10, 20)), "test": test}).save_to_disk(tmp_path / "both")
    single, both = str(tmp_path / "single"), str(tmp_path / "both")
    assert expanded(single) == expanded(f"{single}?split=train") == TEXTS
    assert expanded(both) == [*TEXTS[10:20], "t1", "t2"]
    assert expanded(f"{both}?split=test") == ["t1", "t2"]
    for slice_ in ("train[:10%]", "train[50%:]", "train[3:400]", "train[-7:]", "train[33%:34%]"):
        (part,) = datasets.ReadInstruction.from_spec(slice_).to_absolute({"train": 500})
        assert expanded(f"{single}?split={slice_}") == TEXTS[part.from_ : part.to]
    assert expanded(f"{both}?split=train[:2]+test") == [*TEXTS[10:12], "t1", "t2"]
    for path in sorted((tmp_path / "both").rglob("*.*")):
        storage.upload(path, f"s3://{s3_bucket}/both/{path.relative_to(tmp_path / 'both')}")
    assert expanded(f"s3://{s3_bucket}/both?split=test") == ["t1", "t2"]


def test_folders_that_are_not_data_sets_and_broken_data_sets(tmp_path: Path) -> None:
    assert expand_folder(str(tmp_path)) is None
    assert expand_folder(str(tmp_path / "no?thing=[ab].jsonl")) is None
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}], "_split": "train"}')
    with pytest.raises(DataError, match=r"data-0\.arrow, which does not exist"):
        expand_folder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"unknown option config; supported here: split$"):
        expand_folder(f"{tmp_path}?split=train&config=x")
    write_arrow(tmp_path / "data-0.arrow", pa.table({"text": ["a"]}))
    for spec in ("valid", "valid[:3]", "train[5:9]", "train[2:1]", "train[", "train[:1%](odd)"):
        with pytest.raises(ConfigError, match="cannot be used"):
            expand_folder(f"{tmp_path}?split={spec}")
    (tmp_path / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{}]}')
    with pytest.raises(DataError, match="flatten_indices"):
        expand_folder(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"state\.json is missing in train"):
        expand_folder(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text("junk")
    with pytest.raises(DataError, match=r"dataset_dict\.json: invalid JSON"):
        expand_folder(str(tmp_path))


# --- data sets by name -------------------------------------------------------------------------------------------


def make_data(folder: Path, kind: str) -> dict[str, list[str]]:
    """Make a local folder of data files like a hub repository: 3 files of the split train, 1 of test."""
    folder.mkdir()
    texts: dict[str, list[str]] = {"train": TEXTS[:333], "test": TEXTS[333:340]}
    for split_name, count in {"train": 3, "test": 1}.items():
        for number in range(count):
            part = texts[split_name][number * 150 : (number + 1) * 150]
            path = folder / f"{split_name}-{number:05d}.{kind}"
            if kind == "parquet":
                write_parquet(path, pa.table({"text": part}))
            else:
                path.write_bytes(gzip.compress(json_lines(part)))
    return texts


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_slices_agree_with_datasets(tmp_path: Path, hub_cache: None, kind: str) -> None:
    import datasets

    texts = make_data(tmp_path / "data", kind)
    url = f"hf-dataset://{tmp_path}/data"
    assert sorted(expanded(url)) == sorted(texts["train"] + texts["test"])
    loaded = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    for spec in ("train", "test", "train[:10%]", "train[33%:67%]", "train[140:160]", "train[:150]", "train[-40:]",
                 "train[150:300]", "test[:2]+train[300:]", "train[99%:]"):  # fmt: skip
        expected: list[str] = []
        for part in datasets.ReadInstruction.from_spec(spec).to_absolute({"train": 333, "test": 7}):
            expected += loaded[part.splitname][part.from_ : part.to]["text"]
        assert expanded(f"{url}?split={spec}") == expected, spec


def test_percentages_use_the_recorded_row_counts(tmp_path: Path, hub_cache: None) -> None:
    make_data(tmp_path / "data", "jsonl.gz")
    splits = "[{{name: train, num_examples: {}}}, {{name: test, num_examples: 7}}]"
    readme = f"---\ndataset_info:\n  splits: {splits}\n---\n"
    (tmp_path / "data" / "README.md").write_text(readme.format(200))
    assert expanded(f"hf-dataset://{tmp_path}/data?split=train[:10%]") == TEXTS[:20]
    (tmp_path / "data" / "README.md").write_text(readme.format(1000))
    with pytest.raises(ConfigError, match="files hold 333 rows, but the data set records at least"):
        expand_folder(f"hf-dataset://{tmp_path}/data?split=train[:90%]")


def test_slices_of_remote_lines_need_absolute_rows(tmp_path: Path, s3_bucket: str) -> None:
    from open_lm.datapreprocess.readers import hub

    storage.write_bytes(f"s3://{s3_bucket}/a.jsonl", json_lines(TEXTS))
    info = storage.info(f"s3://{s3_bucket}/a.jsonl")
    assert info is not None
    with pytest.raises(ConfigError, match=r"number of rows.*train\[:100000\]"):
        hub._slice("x", "train[:10%]", {"train": [info]}, {})
    (part,) = hub._slice("x", "train[5:10]", {"train": [info]}, {})
    assert part.url == f"{info.url}?rows=5:10" and collect(PieceReader(full_piece(part.url)))[0] == TEXTS[5:10]


def test_hub_names_that_cannot_be_read(tmp_path: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be found"):
        expand_folder(f"hf-dataset://{tmp_path}/nothing")
    with pytest.raises(ConfigError, match="unknown option splits; supported here: split, config, revision"):
        expand_folder(f"hf-dataset://{tmp_path}?splits=train")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("text\nx\n")
    with pytest.raises(ConfigError, match=r"builder 'csv'.*save_to_disk"):
        expand_folder(f"hf-dataset://{tmp_path}/csv")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "open_lm\[hub\]"'):
        expand_folder("hf-dataset://cerebras/SlimPajama-627B?split=train[:10%]")


def test_json_prefix_of_the_content_key_is_allowed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.table({"body": ["x"]}))
    assert read_good(path, content_key="json:body") == ["x"]
