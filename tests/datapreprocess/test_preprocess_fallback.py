"""A fast tokenizer that differs from the reference: the output contains no ids from it."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datapreprocess_helpers import documents, make, record_of, tree, write_jsonl

from open_lm.datapreprocess import engine, make_2048, tokenization, units
from open_lm.datapreprocess.fast_tokenizer import FastTokenizer, NoFastTokenizer
from open_lm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_process")
MARK = "QUAGGA"


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fast tokenizer give wrong ids for texts that contain MARK."""
    original = FastTokenizer.encode_batch

    def encode_batch(self: FastTokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = original(self, texts)
        ids, ends = ids.copy(), np.cumsum(lengths)
        for text, end in zip(texts, ends.tolist(), strict=True):
            if MARK in text:
                ids[end - 1] = 77
        return ids, lengths

    monkeypatch.setattr(FastTokenizer, "encode_batch", encode_batch)


@pytest.fixture
def marked(tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, bytes]]:
    """Return a folder of five files, the third of which starts with MARK, and the reference tokenizer's output."""
    texts = [documents(120, seed=number) for number in range(5)]
    texts[2][0] = f"the {MARK} of brown stone"
    for number, part in enumerate(texts):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", part)

    def none(_: object) -> None:
        raise NoFastTokenizer("the test uses the reference")

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "fast_tokenizer", none)
        out_folder = make(tmp_path / "raw", tmp_path / "reference", small_tokenizer)
    assert record_of(out_folder / "0")["tool"]["encoder"] == "tokenizers"
    return tmp_path / "raw", tree(tmp_path / "reference")


@pytest.mark.usefixtures("small_units")
def test_correct_fast_tokenizer_gives_the_output_of_the_reference(
    marked: tuple[Path, dict[str, bytes]], tmp_path: Path, small_tokenizer: str
) -> None:
    out_folder = make(marked[0], tmp_path / "out", small_tokenizer)
    assert record_of(out_folder / "0")["tool"]["encoder"] == "fastokens"
    without_records = [
        {k: v for k, v in files.items() if "dataset" not in k} for files in (tree(tmp_path / "out"), marked[1])
    ]
    assert without_records[0] == without_records[1]


@pytest.mark.usefixtures("small_units", "wrong")
def test_one_difference_encodes_everything_with_the_reference(
    marked: tuple[Path, dict[str, bytes]], tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make(marked[0], tmp_path / "out", small_tokenizer)
    assert re.search(
        rf"restarting the encoding without the fast tokenizer: .*differs from tokenizers.*{MARK}", caplog.text
    )
    assert tree(tmp_path / "out") == marked[1]


@pytest.mark.usefixtures("small_units", "wrong")
@pytest.mark.parametrize("units_done", [0, 3])
def test_killed_run_resumes_with_the_reference_after_a_fallback(  # noqa: PLR0917 - fixtures
    marked: tuple[Path, dict[str, bytes]], tmp_path: Path, small_tokenizer: str, units_done: int,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    original, condition, counts = engine.run_unit, threading.Condition(), Counter[str]()

    def killed(task: units.UnitTask, encoder: tokenization.DocumentEncoder) -> units.UnitReport:
        if encoder.name != "tokenizers":
            return original(task, encoder)
        with condition:
            counts["started"] += 1
            if counts["started"] > units_done:
                # Another thread may still run the last of them.
                condition.wait_for(lambda: counts["done"] == units_done)
                raise OSError("killed")
        report = original(task, encoder)
        with condition:
            counts["done"] += 1
            condition.notify_all()
        return report

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run_unit", killed)
        with pytest.raises(OSError, match="killed"):
            make(marked[0], tmp_path / "out", small_tokenizer)
    caplog.set_level("INFO")
    caplog.clear()
    make(marked[0], tmp_path / "out", small_tokenizer)
    assert "an earlier run found that it differs" in caplog.text and "restarting" not in caplog.text
    assert ("3 of " in caplog.text) == bool(units_done)
    assert tree(tmp_path / "out") == marked[1]


@pytest.mark.usefixtures("small_units", "wrong")
def test_failed_self_check(
    marked: tuple[Path, dict[str, bytes]], tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tokenization, "fixed_sample", lambda _: ["fine", f"a {MARK}"])
    make(marked[0], tmp_path / "out", small_tokenizer)
    assert re.search(rf"the fast tokenizer is not used: .*{MARK}", caplog.text) and "restarting" not in caplog.text
    assert tree(tmp_path / "out") == marked[1]


def verify(folder: Path, out: Path, tokenizer: str, count: str = "200") -> None:
    make(folder, out, tokenizer, "--verify-tokenizer", count)


def test_verify_the_tokenizer(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    verify(raw[0], tmp_path / "out", small_tokenizer)
    assert re.search(r"^400 texts \(.* compared: 0 differ; fastokens .* tokenizers", capsys.readouterr().out)
    verify(raw[0], tmp_path / "out", small_tokenizer, "1000")
    assert "1,280 texts" in capsys.readouterr().out, "there are only 280 documents"
    for count in ("0", "-3"):
        with pytest.raises(ConfigError, match="--verify-tokenizer must be at least 1"):
            verify(raw[0], tmp_path / "out", small_tokenizer, count)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("wrong")
def test_verify_a_wrong_tokenizer(
    tmp_path: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_lm.errors import run_cli

    path = write_jsonl(tmp_path / "a.jsonl", ["the", f"fox {MARK}", "quick", MARK])
    arguments = ["--input-files", str(path), "--output-dir", str(tmp_path / "out"), "--tokenizer", small_tokenizer]
    assert run_cli(make_2048.main, [*arguments, "--verify-tokenizer", "200"]) != 0
    shown = capsys.readouterr()
    assert "204 texts" in shown.out and "2 differ" in shown.out and MARK in shown.out
    assert "differs from the reference in 2 texts" in shown.err
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]

    def none(_: object) -> None:
        raise NoFastTokenizer("there is none")

    monkeypatch.setattr(tokenization, "fast_tokenizer", none)
    with pytest.raises(ConfigError, match="there is no fast tokenizer to verify: there is none"):
        make_2048.main([*arguments, "--verify-tokenizer", "200"])
