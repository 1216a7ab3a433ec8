"""Test that only "\\n" and "\\r\\n" end a line of a text file, and that a byte order mark is no part of its content."""

from __future__ import annotations

import ast
import io
import json
import runpy
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers_helpers import COMPRESS, read_good

from open_lm import storage
from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.data.manifest import read_manifest
from open_lm.datapreprocess.inputs import find_inputs
from open_lm.evaluate.icl.tasks import Task, first_examples
from open_lm.file_utils import get_metadata_file
from open_lm.monitor.loggers import filter_lines

ROOT = Path(__file__).resolve().parents[2]
# Characters at which str.splitlines splits, but which end no line of a file; "\r" counts only before "\n".
INNER = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
BOM = "\ufeff"


def from_script(path: str, name: str) -> Callable[..., list[str]]:
    function: Callable[..., list[str]] = runpy.run_path(str(ROOT / path))[name]
    return function


def test_no_program_splits_lines_with_splitlines() -> None:
    """`str.splitlines` and `bytes.splitlines` split at other characters too: use storage.split_lines or read_lines."""
    folders = ("open_lm", "datapreprocess", "eval", "scripts")
    paths = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    uses = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert len(paths) > 100 and uses == []


@given(st.lists(st.text(alphabet=f"ab{INNER}{BOM}", max_size=5).filter(lambda line: not line.endswith("\r"))))
def test_split_lines_inverts_joining(lines: list[str]) -> None:
    for end in ("\n", "\r\n"):
        assert storage.split_lines(BOM + "".join(line + end for line in lines)) == lines
    unfinished = [*lines, "no end"]
    assert storage.split_lines(BOM + "\n".join(unfinished)) == unfinished


def test_texts_are_read_without_byte_order_mark_and_with_their_line_ends(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(f"{BOM}a{INNER}\r\nb".encode())
    assert storage.read_text(tmp_path / "text") == f"a{INNER}\r\nb"
    assert storage.read_lines(tmp_path / "text") == [f"a{INNER}", "b"]
    with storage.open_file(tmp_path / "text", "r") as file:
        assert list(file) == [f"a{INNER}\r\n", "b"]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_prompts_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    read_prompts = from_script("open_lm/cli/generate.py", "read_prompts")
    data = f"{BOM}one{INNER}more\r\n\n two\nthree".encode()
    (tmp_path / "prompts").write_bytes(data)
    files = [str(tmp_path / "prompts")]
    if source == "standard input":
        files = []
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert read_prompts([], files, False) == [f"one{INNER}more", " two", "three"]


def test_a_prompt_of_a_whole_file_has_no_byte_order_mark(tmp_path: Path) -> None:
    read_prompts = from_script("open_lm/cli/generate.py", "read_prompts")
    (tmp_path / "prompts").write_bytes(f"{BOM}one\u2028more\r\ntwo\n".encode())
    assert read_prompts([], [str(tmp_path / "prompts")], True) == ["one\u2028more\ntwo"]


def test_examples_of_an_evaluation(tmp_path: Path) -> None:
    rows = [{"context": f"a\u2028b\x85{number}", "category": "xy"[number % 2]} for number in range(10)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "data.jsonl").write_bytes((BOM + "\n".join([*lines[:3], "", *lines[3:]])).encode())
    task = Task("t", "language_modeling", [0], str(tmp_path / "data.jsonl"), {})
    assert first_examples(task, 6) == lines[:6] and first_examples(task, None) == lines
    task.config["has_categories"] = True
    assert first_examples(task, 3) == lines[:6], "three of each category"


def test_hosts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "launch"))
    read_hosts = from_script("open_lm/cli/launch.py", "read_hosts")
    (tmp_path / "hosts").write_bytes(f"{BOM}node1\r\nnode2 # the \x0b second \u2028 node\nnode3".encode())
    assert [str(host) for host in read_hosts(tmp_path / "hosts")] == ["node1", "node2", "node3"]


def test_lists_of_inputs(tmp_path: Path) -> None:
    names = [f"{name}.jsonl" for name in ("a", "b\u2028c", "d\x0ce")]
    for name in names:
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "list").write_bytes((BOM + "\r\n".join(f"{tmp_path}/{name}" for name in names)).encode())
    assert sorted(item.url for item in find_inputs([f"@{tmp_path}/list"])) == sorted(f"{tmp_path}/{n}" for n in names)


def test_manifests(tmp_path: Path) -> None:
    lines = [{"shard": f"a\u2028\x85{number}", "num_sequences": number} for number in range(1, 4)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "manifest.jsonl").write_bytes((BOM + text).encode())
    url = str(tmp_path / "manifest.jsonl")
    assert [entry.shard for entry in read_manifest(url)] == [line["shard"] for line in lines]
    assert get_metadata_file(url) == lines


def test_json_lines_files_of_a_run(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "name": "a\u2028b"}, ensure_ascii=False) + "\n" for step in range(3)]
    storage.write_text(tmp_path / "metrics.jsonl", "".join(lines) + '{"step": 3')
    filter_lines(str(tmp_path / "metrics.jsonl"), lambda line: line["step"] < 2)
    assert storage.read_text(tmp_path / "metrics.jsonl") == "".join(lines[:2])


def test_settings_with_a_byte_order_mark(tmp_path: Path) -> None:
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 8, "vocab_size": 32}
    shape |= {"post_embed_norm": False, "weight_tying": False}
    (tmp_path / "model.json").write_bytes((BOM + json.dumps(shape)).encode())
    assert read_architecture(str(tmp_path / "model.json"))["hidden_dim"] == 16
    for name, text in {"run.json": '{"epochs": 7}', "run.yaml": "epochs: 7\n"}.items():
        (tmp_path / name).write_bytes((BOM + text).encode())
        assert parse_args(["--config", str(tmp_path / name), "--model", "open_lm_11m"]).epochs == 7


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.tar", "a.tar.gz", "a.jsonl", "a.json"])
def test_documents_have_no_byte_order_mark(tmp_path: Path, name: str) -> None:
    text = "first\u2028line\x85\r\nsecond"
    content = json.dumps({"text": text}, ensure_ascii=False) if ".json" in name else text
    data = f"{BOM}{content}".encode()
    if ".tar" in name:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("1.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        data = buffer.getvalue()
    (tmp_path / name).write_bytes(COMPRESS[".gz"](data) if name.endswith(".gz") else data)
    assert read_good(tmp_path / name) == [text]
