"""The one loader of tokenizers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

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


def test_round_trip_and_facts(file: Path) -> None:
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


def test_ids_beyond_the_vocabulary(file: Path) -> None:
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


def test_folder_names_its_end_of_text(neox: Path, tmp_path: Path) -> None:
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


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"expected tokenizer.json or tokenizer.model.*found readme.txt"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"), [("bad.json", b"{}"), ("bad.model", b"\x00junk"), ("x.bin", b"\xff\xfe\x00")]
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(tmp_path / name))


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name: str, filename: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ConfigError, match=r"some/name: no such file or folder here, and the hub could not give it"):
        load_tokenizer("some/name")


def test_hub(monkeypatch: pytest.MonkeyPatch, neox: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(name: str, filename: str) -> str:
        if filename == "tokenizer.json":
            return str(neox)
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = load_tokenizer("EleutherAI/gpt-neox-20b")
    assert (tokenizer.name, tokenizer.eot_id) == ("EleutherAI/gpt-neox-20b", 0)
