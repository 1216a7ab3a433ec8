"""Test bits per byte: the bytes of each token, and validation sets by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE
from run_helpers import tiny_flags
from tokenizer_helpers import write_data, write_tokenizer

from open_lm.data.token_bytes import token_bytes
from open_lm.errors import ConfigError
from open_lm.evaluate.validation import format_sets
from open_lm.main import main
from open_lm.model.transformer import create_model
from open_lm.tokenizer import load_tokenizer

TEXTS = (
    "Hello world",
    " two  spaces\n\ttabs    and   more",
    "naïve 1234 x_y(z) {}",
    "日本語 и русский",
    "🙂\x07 a<|endoftext|",
)


@pytest.mark.parametrize(("name", "added"), [("gpt-neox-20b.json", 0), ("llama2.model", 1), ("mistral.model", 1)])
def test_bytes_of_tokens_are_those_of_the_text(name: str, added: int, shared_dir: Path) -> None:
    """The bytes of the tokens of a text are its UTF-8 bytes, and the space that sentencepiece adds."""
    tokenizer = load_tokenizer(str(shared_dir / "data" / "tokenizers" / name))
    counts = token_bytes(tokenizer)
    assert counts is not None and counts.shape == (tokenizer.vocab_size,)
    for text in TEXTS:
        assert counts[tokenizer.encode(text)].sum() == len(text.encode()) + added
    assert counts[tokenizer.eot_id] == 0


def test_tokenizers_that_replace_words_have_no_bytes(tmp_path: Path) -> None:
    content = json.loads(write_tokenizer(tmp_path / "bytes.json").source)
    del content["decoder"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert token_bytes(load_tokenizer(str(tmp_path / "other.json"))) is None


def test_validation_reports_names_and_bits_per_byte(tmp_path: Path) -> None:
    """A model that gives all ids the same probability needs log2(V) bits per byte if each token is one byte."""
    tokenizer = write_tokenizer(tmp_path / "bytes.json")
    flags = tiny_flags(tmp_path, tmp_path)
    model = create_model(SimpleNamespace(model=str(tmp_path / "model.json")))
    with torch.no_grad():
        model.output.weight.zero_()
    torch.save({"epoch": 1, "name": "uniform", "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
    sets = [write_data(tmp_path / name, tokenizer) for name in ("a", "b")]
    patterns = [str(Path(manifest).parent / "*.tar") for manifest in sets]
    common = [*flags, "--resume", str(tmp_path / "epoch_1.pt"), "--val-data"]
    main([*common, *patterns, "--val-names", "first", "second", "--name", "named"])
    results = json.loads((tmp_path / "named/checkpoints/results.jsonl").read_text().splitlines()[-1])
    num_targets = 2 * 40 * SEQ_LEN  # all of them bytes
    for result, name in zip(results, ("first", "second"), strict=True):
        assert result["name"] == name and result["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=1e-5)
        assert result["bits_per_byte"] == pytest.approx(math.log2(VOCAB_SIZE), abs=1e-5)
        assert result["bytes"] == result["tokens"] == num_targets
    metrics = [json.loads(line) for line in (tmp_path / "named/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["val/second/bits_per_byte"] == results[1]["bits_per_byte"]
    log = (tmp_path / "named/out.log").read_text()
    assert "bits per byte" in log and "mean of the sets" in log
    with pytest.raises(ConfigError, match=r"--val-names: found one for 2 validation sets; set one name for each"):
        main([*common, *patterns, "--val-names", "one", "--name", "wrong"])


def test_sets_without_tokens_do_not_count_in_the_means() -> None:
    results = [
        {"name": "x", "val_data": [], "tokens": 30, "loss": 1.0, "bits_per_byte": 0.5, "bytes": 10},
        {"val_data": ["s3://b/c4/shard-{0..3}.tar"], "tokens": 10, "loss": 3.0, "bits_per_byte": 1.5, "bytes": 30},
        {"name": "empty", "val_data": [], "tokens": 0, "loss": math.nan, "bits_per_byte": math.nan, "bytes": 0},
    ]
    lines = [line.split() for line in format_sets(results).splitlines()]
    assert lines[2][0] == "shard-{0" and lines[4] == ["all", "tokens", "40", "1.500000", "4.482", "1.25000"]
    assert lines[5] == ["mean", "of", "the", "sets", "40", "2.000000", "7.389", "1.00000"]
