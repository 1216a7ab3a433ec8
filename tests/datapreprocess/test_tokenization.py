"""Encoding of documents: the fast tokenizer gives the same ids as the reference, which replaces it otherwise."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_lm.datapreprocess.adversarial_texts import fixed_sample, random_texts
from open_lm.datapreprocess.fast_tokenizer import FastTokenizer, NoFastTokenizer, fast_tokenizer
from open_lm.datapreprocess.tokenization import Document, DocumentEncoder
from open_lm.datapreprocess.tokenizer_check import verify
from open_lm.errors import ConfigError, DataError
from open_lm.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

FILES = ["gpt-neox-20b.json", "llama2.model", "mistral.model"]
characters = st.characters(exclude_categories=["Cs"])
fragments = st.sampled_from([*fixed_sample(["<|endoftext|>", "</s>", " " * 24])[1:200], " ", "\n", "e\u0301"])
texts = st.one_of(
    st.text(characters, max_size=60), st.lists(st.one_of(fragments, st.text(characters, max_size=3))).map("".join)
)


@pytest.fixture(scope="module", params=FILES)
def encoder(request: pytest.FixtureRequest, shared_dir: Path) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(str(shared_dir / "data" / "tokenizers" / request.param)))


@pytest.fixture(scope="module")
def neox(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(str(shared_dir / "data" / "tokenizers" / FILES[0]))


@pytest.fixture(scope="module")
def llama(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(str(shared_dir / "data" / "tokenizers" / FILES[1]))


def expected(encoder: DocumentEncoder, documents: Sequence[str]) -> list[int]:
    """Return the ids that the tokenizer gives for one text at a time."""
    tokenizer = encoder._tokenizer
    assert isinstance(tokenizer, Tokenizer)
    return [i for text in documents for i in [*tokenizer.encode(text), encoder.eot_id]]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(texts, max_size=8))
def test_any_text(encoder: DocumentEncoder, batch: list[str]) -> None:
    ids, ends = encoder.encode(batch)
    assert ids.tolist() == expected(encoder, batch)
    assert ids[ends - 1].tolist() == [encoder.eot_id] * len(batch)
    assert encoder.difference(batch) is None


def test_corpus(encoder: DocumentEncoder, shared_dir: Path) -> None:
    file = sorted((shared_dir / "data" / "raw").glob("*.zst"))[0]
    with file.open("rb") as compressed:
        lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(compressed))
        documents = [orjson.loads(line)["text"] for _, line in zip(range(100), lines, strict=False)]
    assert encoder.name == "fastokens"
    assert encoder.fallback_reason is None
    assert encoder.encode(documents).ids.tolist() == expected(encoder, documents)


def test_verification_of_the_fast_tokenizer(encoder: DocumentEncoder) -> None:
    assert encoder.self_check() is None
    result = verify(encoder, 300, ["a document"], seed=1)
    assert (result.texts, result.differing, result.examples) == (301, 0, [])
    assert f"301 texts ({result.num_bytes / 1e6:,.1f} MB, {result.tokens:,} ids) compared: 0 differ" in result.summary()


def test_reference(encoder: DocumentEncoder) -> None:
    reference = encoder.reference()
    assert reference.name in ("tokenizers", "sentencepiece")
    assert reference.reference() is reference
    assert reference.difference(["a"]) is None
    assert reference.self_check() is None
    sample = fixed_sample()[:300]
    for one, other in zip(encoder.encode(sample), reference.encode(sample), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    with pytest.raises(
        ConfigError,
        match="--verify-tokenizer: there is no fast tokenizer to verify: the reference tokenizer is requested",
    ):
        verify(reference, 10)


def test_pickles_without_the_reference(encoder: DocumentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(encoder)
    assert len(data) < 4 << 20
    copy = pickle.loads(data)
    with monkeypatch.context() as patch:
        for kind in (JsonTokenizer, SentencePieceTokenizer):
            patch.setattr(kind, "_load", None)  # encoding must not build the reference
        assert np.array_equal(copy.encode(["a b", ""]).ids, encoder.encode(["a b", ""]).ids)
        assert (copy.name, copy.fingerprint, copy.dtype) == (encoder.name, encoder.fingerprint, encoder.dtype)
    assert copy.self_check() is None


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_layout(llama: Tokenizer, add_bos: bool, fast: bool) -> None:
    encoder = DocumentEncoder(llama, add_bos=add_bos)
    encoder = encoder if fast else encoder.reference()
    assert encoder.bos_id == (1 if add_bos else None)
    documents: list[Document] = ["a b", "", np.array([7, 8, 9], np.int64), np.array([], np.int64), "c"]
    ids, ends = encoder.encode(documents)
    before = [1] if add_bos else []
    plain = [llama.encode("a b"), [], [7, 8, 9], [], llama.encode("c")]
    laid = [[*before, *part, 2] for part in plain]
    assert ids.tolist() == [i for part in laid for i in part]
    assert ends.tolist() == np.cumsum([len(part) for part in laid]).tolist()
    assert (ids.dtype, ends.dtype) == (np.uint16, np.int64)


@pytest.mark.parametrize("documents", [[], [""], [np.array([], np.int64)]])
def test_no_documents_and_empty_documents(neox: Tokenizer, documents: list[Any]) -> None:
    for encoder in (DocumentEncoder(neox), DocumentEncoder(neox).reference()):
        ids, ends = encoder.encode(documents)
        assert (ids.tolist(), ends.tolist()) == ([0] * len(documents), [1] * len(documents))
        assert (ids.dtype, ends.dtype) == (np.uint16, np.int64)


def test_dtype_is_the_smallest_that_holds_the_ids() -> None:
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32), (200_000, np.uint32)):
        encoder = DocumentEncoder(None, size, eot_id=1)
        ids, ends = encoder.encode([np.array([size - 1, 0], np.uint32), np.array([2], np.uint8)])
        assert (encoder.name, encoder.dtype, ids.dtype) == ("ids", dtype, dtype)
        assert (ids.tolist(), ends.tolist()) == ([size - 1, 0, 1, 2, 1], [3, 5])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0, 100]), "token id 100 is outside the vocabulary of 100 ids; check --vocab_size"),
        (np.array([0, -1]), "token id -1 "),
        (np.array([1 << 40]), f"token id {1 << 40} "),
        (np.array([(1 << 64) - 1], np.uint64), f"token id {(1 << 64) - 1} "),
        (np.array([65536], np.int32), "token id 65536 "),
        (np.array([1.5]), "dtype float64 and shape .*, expected a 1-D integer array"),
        (np.array([[1, 2]]), "dtype int64 and shape .*, expected a 1-D integer array"),
    ],
)
def test_invalid_ids(ids: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DocumentEncoder(None, 100).encode([np.array([5]), ids])


def test_tokenizer_ids_outside_the_vocabulary(neox: Tokenizer) -> None:
    encoder = DocumentEncoder(neox, vocab_size=1000)
    for one in (encoder, encoder.reference()):
        with pytest.raises(DataError, match=r"token id \d+ is outside the vocabulary of 1000 ids; check --vocab_size"):
            one.encode(["Hello world"])


def test_bad_settings(neox: Tokenizer, llama: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--vocab_size"):
        DocumentEncoder(None)
    with pytest.raises(ConfigError, match=r"--vocab_size 2 is too small for the end-of-text id 2"):
        DocumentEncoder(llama, vocab_size=2)
    for tokenizer in (None, neox):
        with pytest.raises(ConfigError, match="there is no begin-of-text token"):
            DocumentEncoder(tokenizer, vocab_size=60000, add_bos=True)
    with pytest.raises(ConfigError, match="use --tokenizer to encode texts"):
        DocumentEncoder(None, 10).encode(["a"])


def test_lone_surrogate(encoder: DocumentEncoder) -> None:
    for one in (encoder, encoder.reference()):
        with pytest.raises(DataError, match=r"document 1 of a batch is not valid text: character 2 is .* '\\ud800'"):
            one.encode(["good", "ba\ud800d"])


class Words:
    """A custom tokenizer."""

    eot_id, vocab_size, fingerprint = 0, 50, "words"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]


class BrokenWords(Words):
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        raise TypeError("not hidden")


def test_custom_tokenizer() -> None:
    encoder = DocumentEncoder(Words())
    assert encoder.encode(["a bcd", ""]).ids.tolist() == [1, 3, 0, 0]
    assert (encoder.name, encoder.reference() is encoder) == ("Words", True)
    assert "Words" in str(encoder.fallback_reason)
    with pytest.raises(TypeError, match="not hidden"):
        DocumentEncoder(BrokenWords()).encode(["a"])


def test_without_the_fast_library(neox: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = DocumentEncoder(neox).encode(["Hello world"]).ids
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder = DocumentEncoder(neox)
    assert encoder.name == "tokenizers"
    assert str(encoder.fallback_reason).startswith("fastokens is not installed")
    assert np.array_equal(encoder.encode(["Hello world"]).ids, ids)


def test_tokenizer_that_the_fast_library_does_not_support(tmp_path: Path) -> None:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Native

    native = Native(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "<eos>": 3}, unk_token="[UNK]"))
    native.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    native.add_special_tokens([AddedToken("<eos>", special=True)])
    native.save(str(tmp_path / "words.json"))
    encoder = DocumentEncoder(load_tokenizer(str(tmp_path / "words.json")))
    assert encoder.name == "tokenizers"
    assert str(encoder.fallback_reason).startswith("fastokens does not support this tokenizer (")
    assert encoder.encode(["ab a", "b"]).ids.tolist() == [1, 2, 1, 3, 0, 3]


def planted(tokenizer: Tokenizer) -> DocumentEncoder:
    """Return an encoder whose fast tokenizer swaps the ids of ` the` and ` a`."""
    assert isinstance(tokenizer, JsonTokenizer)
    content = json.loads(tokenizer.source)
    vocab = content["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġa"] = vocab["Ġa"], vocab["Ġthe"]
    encoder = DocumentEncoder(tokenizer)
    encoder._fast = FastTokenizer(json.dumps(content), tokenizer.added_tokens())
    return encoder


def test_planted_difference(neox: Tokenizer) -> None:
    encoder = planted(neox)
    assert encoder.difference(["Hello world", ""]) is None
    assert encoder.difference(["Hello", "Hello, the world", "the the"]) == (
        "fastokens differs from tokenizers at token 2 of the text 'Hello, the world': "
        "found [247, 1533], expected [253, 1533]"
    )
    assert "fastokens differs from tokenizers" in str(encoder.self_check())
    result = verify(encoder, 0, [f"see the {number}" for number in range(9)] + ["none"])
    assert (result.texts, result.differing, len(result.examples)) == (10, 9, 5)
    assert "9 differ" in result.summary()
    assert "'see the 0'" in result.summary()


def test_reference_of_a_wrong_encoder_is_exact(neox: Tokenizer) -> None:
    correct, wrong = DocumentEncoder(neox), planted(neox)
    replaced = wrong.reference("it differs")
    assert (replaced.name, replaced.fallback_reason) == ("tokenizers", "it differs")
    assert np.array_equal(replaced.encode(["in the end"]).ids, correct.encode(["in the end"]).ids)


def test_text_that_the_fast_library_rejects() -> None:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Native

    native = Native(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))  # other bytes have no id and are dropped
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.add_special_tokens([AddedToken("<eos>", special=True)])
    encoder = DocumentEncoder(JsonTokenizer(native.to_str(), "ab"))
    assert encoder.name == "fastokens"
    assert encoder.encode(["ab", "ab?a"]).ids.tolist() == [2, 3, 2, 0, 3]
    assert "fastokens rejects a text that tokenizers accepts" in str(encoder.difference(["ab?"]))
    assert encoder.self_check() is not None


def trained(letters: int = 9, **options: Any) -> Tokenizer:
    """Train a small sentencepiece model; the letters of its control and byte pieces occur `letters` times."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "vocab_size": 400}
    settings |= {"normalization_rule_name": "identity", "minloglevel": 2, "num_threads": 1, "character_coverage": 1.0}
    lines = [
        f"the {word * 2} of  {word} and the quick {word}s, {number * 37}" for number, word in enumerate(WORDS * 20)
    ]
    lines += ["< s / u n k > x 0 1 2 3 4 5 6 7 8 9 A B C D E F"] * letters
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**settings, **options})
    return SentencePieceTokenizer(model.getvalue(), "trained")


WORDS = ["river", "stone", "model", "aaaa", "banana", "token", "naïve"]


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"split_digits": True, "vocab_size": 330}])
def test_sentencepiece_models_with_other_settings(options: dict[str, Any]) -> None:
    encoder = DocumentEncoder(trained(**options))
    assert encoder.name == "fastokens", encoder.fallback_reason
    assert encoder.self_check() is None
    assert verify(encoder, 500, [word * count for word in WORDS for count in range(30)]).examples == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"user_defined_symbols": ["<x>"]}, "it has user-defined or unused pieces"),
        ({"treat_whitespace_as_suffix": True}, "it adds spaces after words"),
        ({"letters": 0}, "some characters of its pieces are not pieces"),
    ],
)
def test_sentencepiece_models_that_are_not_converted(options: dict[str, Any], reason: str) -> None:
    tokenizer = trained(**options)
    with pytest.raises(NoFastTokenizer, match=f"the sentencepiece model cannot be converted: {reason}"):
        fast_tokenizer(tokenizer)
    encoder = DocumentEncoder(tokenizer)
    assert encoder.name == "sentencepiece"
    assert encoder.encode(["the river"]).ids.tolist() == [*tokenizer.encode("the river"), tokenizer.eot_id]


def test_adversarial_texts() -> None:
    assert list(random_texts(50, seed=3)) == list(random_texts(50, seed=3))
    assert list(random_texts(50, seed=3)) != list(random_texts(50, seed=4))
    sample = fixed_sample(["<my token>"])
    assert sample == fixed_sample(["<my token>"])
    assert {"", "<my token>", "a<my token> b", " " * 1000, "\r", "e\u0301"} <= set(sample)
    assert {ord(character) >> 16 for text in sample for character in text} == set(range(17))
    for text in sample:
        text.encode()  # raises for invalid text
