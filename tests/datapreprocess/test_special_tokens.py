"""Documents that quote a special token, such as <|endoftext|>: it stays text, in every tokenizer and command."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datapreprocess_helpers import EOT, EOT_ID, make, read_shards, record_of, tokens_of, tree, write_jsonl

from open_lm.datapreprocess import engine
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.datapreprocess.special_tokens import SubstringFinder
from open_lm.datapreprocess.tokenization import DocumentEncoder, make_encoder
from open_lm.errors import ConfigError
from open_lm.tokenizer import JsonTokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("in_process")
ALLOW = "--allow-special-tokens-in-text"
QUOTING = [
    EOT,
    f"the {EOT}",
    f"{EOT}{EOT} of",
    f"a{EOT[:-1]} {EOT}\n",
    "</s>",
    "<s>the</s>",
    "<pad> <a>b</a> <|padding|>",
]
PLAIN = ["the quick brown fox", "", "x < y | z > 1", "<|endoftext>"]
FILES = ["small", "gpt-neox-20b.json", "llama2.model", "mistral.model"]


@pytest.fixture
def path(request: pytest.FixtureRequest, small_tokenizer: str) -> str:
    """Return the path of the tokenizer that the test's parameter names."""
    if request.param == "small":
        return small_tokenizer
    return str(request.getfixturevalue("shared_dir") / "data/tokenizers" / request.param)


def content(encoder: DocumentEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text without its end-of-text id."""
    ids, ends = encoder.encode(texts)
    return [part.tolist()[:-1] for part in np.split(ids, ends[:-1])]


@pytest.mark.parametrize("path", FILES, indirect=True)
def test_special_tokens_are_text_in_the_fast_tokenizer_and_the_reference(path: str) -> None:
    encoder, tokenizer = make_encoder(path, None, None), load_tokenizer(path)
    assert encoder.name == "fastokens" and encoder.self_check() is None
    texts = [*QUOTING, *PLAIN, *(f"x {token} y" for token in tokenizer.special_tokens())]
    ids = content(encoder, texts)
    assert encoder.difference(texts) is None
    for other in (
        encoder.reference(),
        pickle.loads(pickle.dumps(encoder)),
        pickle.loads(pickle.dumps(encoder.reference())),
    ):
        assert content(other, texts) == ids
    special = {tokenizer.eot_id, tokenizer.bos_id, *(tokenizer.encode(t)[0] for t in tokenizer.special_tokens())}
    for text, one in zip(texts, ids, strict=True):
        assert not special & set(one), text
        assert tokenizer.decode(one) == text
    assert content(encoder, PLAIN) == content(make_encoder(path, None, None, False, True), PLAIN)
    assert tokenizer.encode(EOT) == load_tokenizer(path).encode(EOT), "prompts of generation may hold special tokens"
    assert encoder.unsplittable_tokens() == []


@pytest.mark.parametrize("path", FILES, indirect=True)
def test_they_are_ids_if_allowed(path: str) -> None:
    encoder, tokenizer = make_encoder(path, None, None, allow_special_tokens=True), load_tokenizer(path)
    assert content(encoder, QUOTING) == content(encoder.reference(), QUOTING) == [tokenizer.encode(t) for t in QUOTING]
    assert encoder.special_tokens_in_text == ("ids" if path.endswith(".json") else None)
    if path.endswith(".json"):
        assert content(encoder, [f"a{EOT}"])[0][-1] == tokenizer.eot_id
        assert encoder.count_special([*QUOTING, *PLAIN, np.array([1])]) >= 4
    else:
        assert encoder.count_special(QUOTING) == 0, "sentencepiece never finds special tokens in a text"


@pytest.mark.parametrize("fast", [True, False])
def test_an_added_token_that_ends_documents_is_split_even_if_it_is_not_marked_as_special(
    fast: bool, small_tokenizer: str
) -> None:
    source = json.loads(Path(small_tokenizer).read_text())
    for token in source["added_tokens"]:
        token["special"] = False
    tokenizer = JsonTokenizer(json.dumps(source), "unmarked", eot_token=EOT)
    encoder = DocumentEncoder(tokenizer)
    encoder = encoder if fast else encoder.reference()
    assert encoder.name == ("fastokens" if fast else "tokenizers")
    (ids, other) = content(encoder, [f"the {EOT}", "<a>"])
    assert EOT_ID not in ids and tokenizer.decode(ids) == f"the {EOT}"
    assert other == tokenizer.encode("<a>"), "other added tokens keep their ids"
    assert encoder.count_special([EOT, "<a>"]) == 1
    assert encoder.tokenizer_files()["tokenizer.json"] == json.dumps(source).encode(), "the copy is the original file"
    assert encoder.fingerprint == tokenizer.fingerprint


def test_the_finder_finds_exactly_the_strings() -> None:
    strings = ["<|end|>", "<|e.d|>", "[CLS]", "é"]
    finder = SubstringFinder(strings)
    for text in ("<|end|>", "a<|e.d|>b", "[[CLS]]", "caf\u00e9"):
        assert finder(text), text
    for text in ("", "<|exd|>", "<|", "[CL", "cafe\u0301"):
        assert not finder(text), text
    assert not SubstringFinder([])("anything")


TEXTS = [*QUOTING, *PLAIN, *(f"the river {number}" for number in range(40))]
NUM_QUOTING = 5  # of the small tokenizer: four with <|endoftext|>, one with <pad>


def make_shuffled(source: Path, out: Path, tokenizer: str, *flags: str) -> Path:
    arguments = ["--input", str(source), "--output", str(out), "--tokenizer", tokenizer, "--seqlen", "32"]
    tokenize_shuffle.main([*arguments, *flags])
    return out


def make_plain(source: Path, out: Path, tokenizer: str, *flags: str) -> Path:
    return make(source, out, tokenizer, *flags) / "0"


@pytest.mark.parametrize("command", [make_plain, make_shuffled])
def test_both_commands_keep_documents_whole_and_report_them(
    command: Callable[..., Path], tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = write_jsonl(tmp_path / "raw/a.jsonl", TEXTS)
    folder = command(source, tmp_path / "text", small_tokenizer)
    record = record_of(folder)
    assert tokens_of(read_shards(folder))[EOT_ID] == len(TEXTS) == record["counts"]["documents"]
    assert record["settings"]["special_tokens_in_text"] == "text"
    assert record["counts"]["special_token_documents"] == NUM_QUOTING
    assert f"; {NUM_QUOTING} documents with the text of special tokens, encoded as plain text" in caplog.text
    folder = command(source, tmp_path / "ids", small_tokenizer, ALLOW)
    allowed = record_of(folder)
    assert tokens_of(read_shards(folder))[EOT_ID] == len(TEXTS) + 5
    assert allowed["settings"]["special_tokens_in_text"] == "ids"
    assert allowed["counts"]["special_token_documents"] == NUM_QUOTING
    assert (
        f"; {NUM_QUOTING} documents with the text of special tokens, encoded as ids, which end documents" in caplog.text
    )
    command(source, tmp_path / "none", small_tokenizer, "--verify-tokenizer", "60")  # raises for a difference


def test_another_setting_is_another_data_set(tmp_path: Path, small_tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "raw/a.jsonl", TEXTS)
    out = tmp_path / "out"
    folder = make_plain(source, out, small_tokenizer, ALLOW)
    before = tree(out)
    with pytest.raises(ConfigError, match=r"special_tokens_in_text was 'ids', is now 'text'.*--allow-special-tokens"):
        make_plain(source, out, small_tokenizer)
    record = record_of(folder)
    del record["settings"]["special_tokens_in_text"]  # as an earlier version wrote it
    (out / "32-v1/dataset.json").unlink(missing_ok=True)
    for path in out.rglob("dataset.json"):
        path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="special_tokens_in_text was 'ids', is now 'text'"):
        make_plain(source, out, small_tokenizer)
    make_plain(source, out, small_tokenizer, ALLOW)
    assert {name: data for name, data in tree(out).items() if name.endswith(".tar")} == {
        name: data for name, data in before.items() if name.endswith(".tar")
    }


def test_unfinished_work_with_another_setting_is_not_continued(
    tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "raw/a.jsonl", TEXTS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_write_outputs", interrupt)
        make_plain(source, tmp_path / "out", small_tokenizer, ALLOW)
    with pytest.raises(ConfigError, match=r"unfinished work with other settings.*was 'ids', is now 'text'"):
        make_plain(source, tmp_path / "out", small_tokenizer)
    folder = make_plain(source, tmp_path / "out", small_tokenizer, "--restart")
    assert tokens_of(read_shards(folder))[EOT_ID] == len(TEXTS)


def test_a_tokenizer_without_special_tokens_in_texts_has_no_such_setting(
    tmp_path: Path, shared_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "raw/a.jsonl", TEXTS)
    llama = str(shared_dir / "data/tokenizers/llama2.model")
    folder = make_plain(source, tmp_path / "out", llama, ALLOW)
    assert "--allow-special-tokens-in-text: without effect: the tokenizer finds no special tokens" in caplog.text
    assert "special_tokens_in_text" not in record_of(folder)["settings"]
    assert record_of(folder)["counts"]["special_token_documents"] == 0
    make_plain(source, tmp_path / "out", llama)  # the same data set


def test_a_vocabulary_that_contains_the_token_as_a_word_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    native = Tokenizer(models.WordLevel({"[UNK]": 0, EOT: 1, "the": 2}, unk_token="[UNK]"))
    native.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    native.add_special_tokens([AddedToken(EOT, special=True)])
    native.save(str(tmp_path / "words.json"))
    source = write_jsonl(tmp_path / "raw/a.jsonl", ["the the", EOT] * 40)
    make_plain(source, tmp_path / "out", str(tmp_path / "words.json"))
    assert f"documents that contain {EOT}: the tokenizer's own vocabulary gives this text the id" in caplog.text
