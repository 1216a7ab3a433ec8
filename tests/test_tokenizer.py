"""Test loading and using tokenizers."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from open_lm.errors import ConfigError
from open_lm.tokenizer import Tokenizer, load_tokenizer

TEXT = "Hello wörld  x\n\n def f(): 日本\t"


@pytest.fixture(params=["gpt-neox-20b.json", "llama2.model", "mistral.model"])
def file(request: pytest.FixtureRequest, shared_dir: Path) -> Path:
    path: Path = shared_dir / "data" / "tokenizers" / request.param
    return path


@pytest.fixture
def neox(shared_dir: Path) -> Path:
    return shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json"


def test_round_trip_and_attributes(file: Path) -> None:
    tokenizer = load_tokenizer(str(file))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_batch([TEXT, "", "a b"]) == [ids, [], tokenizer.encode("a b")]
    expected = {"gpt-neox-20b.json": (0, 50277), "llama2.model": (2, 32000), "mistral.model": (2, 32000)}
    assert (tokenizer.eot_id, tokenizer.vocab_size) == expected[file.name]
    assert tokenizer.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    assert tokenizer.decode([*ids, tokenizer.eot_id]) == TEXT


def test_no_tokens_are_added(neox: Path) -> None:
    tokenizer = load_tokenizer(str(neox))
    assert tokenizer.encode("Hello world") == [12092, 1533]


def test_ids_outside_the_vocabulary(file: Path) -> None:
    tokenizer = load_tokenizer(str(file))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([1, 99_999_999])
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([-1])


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return (one.fingerprint, one.eot_id, one.encode(TEXT)) == (other.fingerprint, other.eot_id, other.encode(TEXT))


def test_folders(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / f"tokenizer{file.suffix}")
    assert same(load_tokenizer(str(tmp_path)), load_tokenizer(str(file)))


def test_folder_configures_its_end_of_text_token(neox: Path, tmp_path: Path) -> None:
    shutil.copy(neox, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|padding|>"}}))
    assert load_tokenizer(str(tmp_path)).eot_id == 1
    assert load_tokenizer(str(tmp_path), eot_token="<|endoftext|>").eot_id == 0


def test_end_of_text_token(file: Path) -> None:
    with pytest.raises(ConfigError, match="--eot-token <nope>: not in the vocabulary"):
        load_tokenizer(str(file), eot_token="<nope>")


def test_unclear_end_of_text(neox: Path, tmp_path: Path) -> None:
    content = json.loads(neox.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 0]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"which token ends a document.*<\|padding\|>.*--eot-token"):
        load_tokenizer(str(path))
    assert load_tokenizer(str(path), eot_token="<|padding|>").eot_id == 1


def test_missing_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"expected tokenizer.json or tokenizer.model.*found readme.txt"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"), [("bad.json", b"{}"), ("bad.model", b"\x00junk"), ("x.bin", b"\xff\xfe\x00")]
)
def test_invalid_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(tmp_path / name))


def test_beginning_of_text_token(file: Path, neox: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(file)).bos_id == (None if file == neox else 1)
    shutil.copy(file, tmp_path / f"tokenizer{file.suffix}")
    bos_token = "<|padding|>" if file == neox else "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": bos_token}}))
    assert load_tokenizer(str(tmp_path)).bos_id == (1 if file == neox else 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    assert load_tokenizer(str(tmp_path)).bos_id is None


def test_pickle_contains_only_the_source(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(file))
    data = pickle.dumps(tokenizer)
    assert len(data) < file.stat().st_size + 2000
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "_load", None)  # unpickling and the attributes need no native tokenizer
        copy = pickle.loads(data)
        assert (copy.eot_id, copy.bos_id, copy.name) == (tokenizer.eot_id, tokenizer.bos_id, tokenizer.name)
    assert same(copy, tokenizer)
    assert copy.decode(copy.encode(TEXT)) == TEXT


class Hub(BaseHTTPRequestHandler):
    """A minimal hub server for the files in `files`."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        data = self.files.get(self.path.rpartition("/")[2])
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", hashlib.sha256(data or b"").hexdigest())
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET" and data is not None:
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """Start a hub server on the loopback interface, with an empty local cache."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/main/{{filename}}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(Hub, "files", {})
        yield server
        server.shutdown()


def test_hub(hub: ThreadingHTTPServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Hub.files, f"tokenizer{file.suffix}", file.read_bytes())
    monkeypatch.setitem(Hub.files, "tokenizer_config.json", b'{"bos_token": "<s>"}')
    tokenizer = load_tokenizer("some/name")
    assert tokenizer.name == "some/name"
    assert same(tokenizer, load_tokenizer(str(file)))
    hub.shutdown()
    hub.server_close()  # from here on only cached files are available
    assert same(load_tokenizer("some/name"), tokenizer)
    with pytest.raises(ConfigError, match="other/name: no such local file or folder, and the download from the hub"):
        load_tokenizer("other/name")


def test_chat_template_of_the_hub(hub: ThreadingHTTPServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Hub.files, f"tokenizer{file.suffix}", file.read_bytes())
    monkeypatch.setitem(Hub.files, "chat_template.jinja", b"{{ messages }}")
    assert load_tokenizer("some/name").config["chat_template"] == "{{ messages }}"
    monkeypatch.setitem(Hub.files, "tokenizer_config.json", b'{"chat_template": "{{ own }}"}')
    assert load_tokenizer("some/another").config["chat_template"] == "{{ own }}"


def test_hub_without_such_a_file(hub: ThreadingHTTPServer) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer.json nor tokenizer.model under this name"):
        load_tokenizer("some/name")
