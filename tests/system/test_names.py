"""Names with braces, brackets, spaces, control characters and bytes that are not UTF-8 are names, not patterns."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from open_lm import storage
from open_lm.config.architecture import read_written_params
from open_lm.data.manifest import ManifestEntry, expand_shards, read_manifest, write_manifest
from open_lm.data.sources import find_validation_source
from open_lm.datapreprocess.inputs import find_inputs
from open_lm.errors import DataError, StorageError
from open_lm.monitor.run_folder import write_params
from open_lm.storage.strict_json import to_json
from open_lm.system import names
from open_lm.utils.data_sets import find_folders

FRAGMENTS = [
    *(bytes([byte]) for byte in b"a0{}[]?*~-%,@=:!$&'\"\\ \t\n\r"),
    b"{a,b}", b"{0..9}", b"[1]", b"::", b"%s", b"\xff", b"\xc3", b"\xc3\xa9", b"e\xcc\x81", b"\\xff", b"\\x5c", b"**",
]  # fmt: skip
NAMES = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12).map(b"".join).map(os.fsdecode)
LONG = "n" * 240
every_name = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_name
@given(NAMES)
@example("\\xff\udcff\\x5c\n")
def test_escapes_are_text_and_lead_back_to_the_name(name: str) -> None:
    for escape in (names.escape, names.escape_line):
        assert names.unescape(escape(name).encode("utf-8").decode()) == name
    assert names.escape_line(name).isprintable()
    assert names.unescaped(orjson.loads(orjson.dumps(names.escaped({name: [name, 1]})))) == {name: [name, 1]}
    assert names.printable(name).encode("utf-8")
    assert orjson.loads(to_json({"name": name})) == {"name": names.printable(name)}


def test_names_without_escapes_are_written_unchanged() -> None:
    for name in ("data/é {1..2} [a]", "C:\\data\\x1", "日本", ""):
        assert names.escape(name) == name and names.unescape(name) == name


@every_name
@given(NAMES, NAMES)
@example("run [1]", "{a,b}")
@example("cur{ly}", LONG)
@example("a::b", "c::d")
@example("a", "*")
def test_existing_names_are_no_patterns(folder: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        root = os.path.join(parent, folder)
        shards = sorted(os.path.join(root, f"{stem}.tar") for stem in {name, "0", "1"})
        for shard in shards:
            storage.write_bytes(shard, bytes(1024))
        file = os.path.join(root, f"{name}.jsonl")
        storage.write_bytes(file, b"{}\n")
        for shard in shards:
            assert expand_shards(shard) == [shard]
        assert expand_shards("::".join(shards)) == shards
        assert sorted(expand_shards(root)) == sorted(s for s in shards if not os.path.basename(s).startswith("."))
        assert expand_shards(f"{root}/{{0..1}}.tar") == expand_shards(f"{root}/[01].tar") or "[01]" in name
        assert [folder.url for folder in find_folders([root])] == [root]
        for pattern in (file, root, f"{root}/*.jsonl"):
            assert [item.url for item in find_inputs([pattern], [".jsonl"])] == [os.path.abspath(file)]
        assert names.input_list(f"{file},{root}") == [file, root]

        manifest = os.path.join(root, "manifest.jsonl")
        entries = [ManifestEntry(os.path.basename(shard)[:-4], 1, {"num_bytes": 1024}) for shard in shards]
        write_manifest(manifest, entries)
        assert read_manifest(manifest) == entries
        assert list(find_validation_source(manifest).shards) == shards


@every_name
@given(NAMES)
def test_params_txt_keeps_names(name: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        run = os.path.join(parent, name)
        write_params(os.path.join(run, "params.txt"), {"model": name, "lr": 0.1, "train_data": [name]})
        assert read_written_params(f"{run}/checkpoints/epoch_1.pt")["model"] == name
        assert len(storage.read_lines(os.path.join(run, "params.txt"))) == 3


def test_params_txt_escapes_the_names_in_a_list(tmp_path: Path) -> None:
    train_data = [os.fsdecode(b"a\xff/x.tar"), "it's \\udcff.tar", "b.tar"]
    write_params(str(tmp_path / "params.txt"), {"train_data": train_data})
    expected = r"""train_data: ['a\xff/x.tar', "it's \\udcff.tar", 'b.tar']"""
    assert storage.read_lines(str(tmp_path / "params.txt")) == [expected]
    assert read_written_params(f"{tmp_path}/checkpoints/epoch_1.pt")["train_data"] == names.setting_text(train_data)


def test_patterns_select_what_no_literal_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("000.tar", "001.tar", "002.tar", "d[12]/x.tar", "d1/y.tar"):
        storage.write_bytes(tmp_path / name, bytes(1024))
    monkeypatch.chdir(tmp_path)
    assert expand_shards("{000..002}.tar") == ["000.tar", "001.tar", "002.tar"]
    assert expand_shards("00[02].tar::001.tar") == ["000.tar", "002.tar", "001.tar"]
    assert expand_shards("d[12]/x.tar") == ["d[12]/x.tar"]
    assert expand_shards("d[12]/y.tar") == ["d1/y.tar"], "the literal folder has no match"
    (tmp_path / "{000..001}.tar").write_bytes(bytes(1024))
    assert expand_shards("{000..001}.tar") == ["{000..001}.tar"]
    assert expand_shards("s3://bucket/{0..1}.tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert expand_shards("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    with pytest.raises(DataError, match="No shard found"):
        expand_shards("d[12]/z.tar")
    storage.write_bytes(tmp_path / "data" / "2048-v1" / "0" / "shard-0000000.tar", bytes(1024))
    with pytest.raises(DataError, match=r"pattern: data \(shards are in folders below it, such as data/2048-v1/0\)"):
        expand_shards("data")


def test_home_folder_replaces_a_leading_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    assert names.user_path("~/a~b") == f"{home}/a~b" and names.user_path("~no-such-user/a") == "~no-such-user/a"
    assert names.shard_pattern("~/{0..1}.tar::s3://b/~::./~") == f"{home}/{{0..1}}.tar::s3://b/~::./~"
    assert names.input_pattern("@~/list") == f"@{home}/list"
    assert names.input_list("~/a, b ,,s3://c/") == [f"{home}/a", "b", "s3://c/"]
    assert names.source_pattern("wiki=~/w/*.jsonl") == f"wiki={home}/w/*.jsonl"
    storage.write_bytes(tmp_path / "in" / "x.jsonl", b"{}\n")
    storage.write_text(tmp_path / "list", "# inputs\n~/in\n")
    assert [item.url for item in find_inputs(["@~/list"])] == [f"{home}/in/x.jsonl"]


@given(NAMES)
def test_urls_and_commands_pass_unchanged(name: str) -> None:
    assume("::" not in name)
    for prefix in ("s3://bucket/", "https://host/", "hf-dataset://", "pipe:cat ", "org/", "./"):
        for read in (names.user_path, names.shard_pattern, names.input_pattern):
            assert read(prefix + name) == prefix + name


@pytest.mark.usefixtures("s3_bucket")
def test_existing_objects_and_folders_of_a_store_are_no_patterns(s3_bucket: str) -> None:
    folder = f"s3://{s3_bucket}/run [1]"
    for name in ("a[1].tar", "b.tar", "c.jsonl"):
        storage.write_bytes(f"{folder}/{name}", bytes(1024))
    assert expand_shards(f"{folder}/a[1].tar") == [f"{folder}/a[1].tar"]
    assert expand_shards(f"{folder}/") == [f"{folder}/a[1].tar", f"{folder}/b.tar"]
    assert [item.url for item in find_inputs([folder], [".jsonl"])] == [f"{folder}/c.jsonl"]


def test_temporary_files_of_long_names_fit_the_file_system(tmp_path: Path) -> None:
    for name in ("é" * 127, LONG + "12345"):
        storage.write_text(tmp_path / name, "x")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    with pytest.raises(StorageError, match="name too long"):
        storage.write_text(tmp_path / ("n" * 300), "x")
