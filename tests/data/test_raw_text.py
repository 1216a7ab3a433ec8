"""--train-text: an index of raw text, whose units are tokenized when a rank opens them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from datapreprocess_helpers import documents, make, read_shards, tokens_of, write_bad_jsonl, write_corpus, write_jsonl
from raw_text_worker import SEQ_LEN, VOCAB_SIZE, loader_of, prepare, read
from run_helpers import tiny_flags, train_rows
from tokenizer_helpers import write_tokenizer

from open_lm import storage
from open_lm.config.command_line import parse_args
from open_lm.config.doubts import doubtful_settings
from open_lm.config.sections import Config
from open_lm.data.text_folder import TextFolder
from open_lm.data.text_index import text_folder
from open_lm.data.text_units import UnitText
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.datapreprocess.tokenization import make_encoder
from open_lm.errors import ConfigError, DataError
from open_lm.main import main
from open_lm.release.datasets import find_folders
from open_lm.release.reproduce import raw_obstacle
from open_lm.release.run_facts import read_run
from open_lm.tokenizer import load_tokenizer

pytestmark = pytest.mark.processes  # the units of an index are tokenized in processes
BATCH, STEPS = 8, 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a plain, a zstd and a gzip file, and return their folder."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def flags_of(*names: Path, tokenizer: str) -> list[str]:
    return ["--train-text", *map(str, names), "--tokenizer", tokenizer, "--workers", "0"]


def index_of(logs: Path, name: Path) -> TextFolder:
    return text_folder(str(logs / "run" / "text_index"), str(name))


def steps_of(results: list[Any]) -> list[list[list[int]]]:
    return [rows for rows, _ in results]


# --- the order -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: str) -> tuple[Path, list[Any]]:
    """Return the folder of a run on one rank without workers, and its batches with the states after them."""
    logs = tmp_path_factory.mktemp("one")
    return logs, read(flags_of(corpus, tokenizer=tokenizer), str(logs), BATCH, STEPS)


def test_ranks_and_workers_do_not_change_the_global_batches(
    tmp_path: Path, corpus: Path, tokenizer: str, uninterrupted: tuple[Path, list[Any]], ranks: Callable[..., Any]
) -> None:
    flags = [*flags_of(corpus, tokenizer=tokenizer), "--workers", "2", "--cache-limit", "20KB"]
    job = {"flags": flags, "logs": str(tmp_path / "logs"), "batch": BATCH, "steps": STEPS // 2}
    nodes = {**job, "logs": str(tmp_path / "disk-{rank}"), "flags": flags_of(corpus, tokenizer=tokenizer), "steps": 4}
    other = index_of(tmp_path / "disk-1", corpus).url("tokenizer/tokenizer.model")  # of an earlier index
    storage.write_bytes(other, b"")
    ranks(2, "raw_text_worker", str(tmp_path), json.dumps(job), json.dumps(nodes))
    assert not Path(other).exists()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    logs, expected = uninterrupted
    for by_rank in zip(*results, strict=True):  # on one node, then on two
        for step, (whole, parts) in enumerate(zip(expected, zip(*by_rank, strict=True), strict=False)):
            assert Counter(map(tuple, whole[0])) == Counter(map(tuple, [*parts[0][0], *parts[1][0]])), step
            assert whole[1] == parts[0][1] == parts[1][1], step
    for name in ("manifest.jsonl", "dataset.json", "tails.tar"):
        paths = [index_of(folder, corpus).url(name) for folder in (logs, tmp_path / "disk-0", tmp_path / "disk-1")]
        assert len({Path(path).read_bytes() for path in paths}) == 1, name
    made = [len(list((tmp_path / f"disk-{rank}/run/text_index/units.cache").glob("*.tar"))) for rank in range(2)]
    assert min(made) > 1, "both nodes tokenize units"
    _, state = results[0][0][-1]
    (position,) = state["sources"]
    assert len(json.dumps(state)) < 1000
    assert 0 < position["fixed"] + position["shared"] < position["num_sequences"]
    resumed = read(flags_of(corpus, tokenizer=tokenizer), str(tmp_path / "logs"), BATCH, STEPS // 2, state)
    assert resumed == expected[STEPS // 2 :]


def test_a_full_cache_does_not_change_the_batches(
    tmp_path: Path, corpus: Path, tokenizer: str, uninterrupted: tuple[Path, list[Any]]
) -> None:
    flags = flags_of(corpus, tokenizer=tokenizer)
    logs, expected = uninterrupted
    index = index_of(logs, corpus)
    cached = list((logs / "run" / "text_index" / "units.cache").glob("*.tar"))
    assert len(cached) == len(index.units) > 5
    index_flags = ["--text-index", str(logs / "run" / "text_index"), "--cache-dir", str(tmp_path / "cache")]
    assert read([*flags, *index_flags, "--cache-limit", "0"], str(tmp_path), BATCH, 10) == expected[:10]
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not (tmp_path / "run" / "text_index").exists()


@pytest.mark.usefixtures("in_process", "small_units")
@pytest.mark.parametrize("options", [{}, {"split": True}])
def test_the_text_gives_the_tokens_of_preprocessing(
    tmp_path: Path, corpus: Path, tokenizer: str, options: dict[str, bool]
) -> None:
    flags = flags_of(corpus, tokenizer=tokenizer) + (["--text-split-documents"] if options else [])
    data = prepare(flags, str(tmp_path))
    index = index_of(tmp_path, corpus)
    loader = loader_of(data, 1)
    (source,) = loader.sources
    assert source.num_sequences is not None
    rows = []
    for batch, _ in loader.batches(source.num_sequences):
        rows += batch.tokens.tolist()
    loader.close()
    loaded = Counter(token for row in rows for token in row)
    loaded.pop(VOCAB_SIZE - 1, None)  # padding, -1
    out = make(corpus, tmp_path / "out", tokenizer, *(["--split-documents"] if options else []))
    members = read_shards(out)
    expected = tokens_of(members)
    expected.pop(-1, None)
    assert loaded == expected
    record = json.loads(Path(index.url("dataset.json")).read_text())
    reference = json.loads(next(out.rglob("dataset.json")).read_text())
    for name in ("documents", "characters", "tokens", "bad_documents"):
        assert record["counts"][name] == reference["counts"][name], name
    for item, other in zip(record["inputs"], reference["inputs"], strict=True):
        is_split = item["url"].endswith(".jsonl")  # into other pieces than in preprocessing
        assert is_split or item["sha256"] == other["sha256"], item
    if not options:
        assert record["counts"]["sequences"] == reference["counts"]["sequences"] == len(members)


def test_mixtures_follow_weights_and_factors(tmp_path: Path, tokenizer: str) -> None:
    first = write_jsonl(tmp_path / "a" / "a.jsonl", ["a" * 200] * 40)
    second = write_jsonl(tmp_path / "b" / "b.jsonl", ["b" * 200] * 40)
    flags = [*flags_of(first, second, tokenizer=tokenizer), "--train-data-mix-weights", "3", "1"]
    results = read([*flags, "--train-data-upsampling-factors", "1::2"], str(tmp_path), 5, 20)
    _, state = results[-1]
    assert [source["samples"] for source in state["sources"]] == [60, 40]
    resampled = read([*flags, "--dataset-resampled"], str(tmp_path), 4, 5)
    assert [source["samples"] for source in resampled[-1][1]["sources"]] == [15, 5]


# --- changed data ----------------------------------------------------------------------------------------------------
def test_changed_text_and_another_tokenizer_are_refused(tmp_path: Path, tokenizer: str) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", documents(60, seed=1))
    flags, logs = flags_of(text, tokenizer=tokenizer), str(tmp_path / "logs")
    before = read(flags, logs, 4, 4)
    original, times = text.read_bytes(), (text.stat().st_atime_ns, text.stat().st_mtime_ns)
    os.utime(text, ns=(times[0], times[1] + 10**9))  # only touched
    assert read(flags, logs, 4, 4) == before

    text.write_bytes(original.replace(b"model", b"MODEL"))  # the same size
    os.utime(text, ns=(times[0], times[1] + 2 * 10**9))
    with pytest.raises(DataError, match=r"a\.jsonl: the content of its files changed"):
        prepare(flags, logs)
    text.write_bytes(original + b'{"text": "more"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl had {len(original)} bytes, now it has {len(original) + 17}"):
        prepare(flags, logs)
    write_tokenizer(tmp_path / "other.json", reverse=True)
    text.write_bytes(original)
    with pytest.raises(DataError, match="tokenizer_fingerprint was"):
        prepare([*flags, "--tokenizer", str(tmp_path / "other.json")], logs)
    with pytest.raises(DataError, match="content_key was 'text', now it is 'id'"):
        prepare([*flags, "--text-key", "id"], logs)
    assert read(flags, logs, 4, 4) == before

    text.write_bytes(original + b'{"text": "more"}\n')
    (_, state) = before[-1]
    data = prepare([*flags, "--allow-changed-data"], logs)
    with pytest.raises(DataError, match=r"The training data differs.*a\.jsonl differs in"):
        loader_of(prepare(flags, logs), 4, state)
    assert loader_of(data, 4, state).state["sources"][0]["samples"] == 0


def test_text_that_changes_during_a_run_is_an_error(tmp_path: Path, tokenizer: str) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", documents(60, seed=1))
    data = prepare([*flags_of(text, tokenizer=tokenizer), "--cache-limit", "0"], str(tmp_path))
    text.write_bytes(text.read_bytes().replace(b"model", b"other"))
    with pytest.raises(DataError, match=r"a\.jsonl: the text .* changed since it was indexed"):
        list(loader_of(data, 4).batches(20))


def test_a_killed_index_continues(
    tmp_path: Path, corpus: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(flags_of(corpus, tokenizer=tokenizer), str(tmp_path))
    index = index_of(tmp_path, corpus)
    manifest = Path(index.url("manifest.jsonl")).read_bytes()
    lines = Path(index.url("units.jsonl")).read_bytes().splitlines(keepends=True)
    for name in ("manifest.jsonl", "units.jsonl", "dataset.json", "tails.tar"):
        Path(index.url(name)).unlink()
    done = json.loads(lines[0])
    Path(index.url("progress.jsonl")).write_bytes(lines[0] + lines[1][:30])  # killed while it wrote a line
    tokenized = list[str]()
    from open_lm.data.text_pool import TextPool

    enter = TextPool.__enter__

    def spy(pool: TextPool) -> TextPool:
        tokenized.append(str(pool._remaining))
        return enter(pool)

    monkeypatch.setattr(TextPool, "__enter__", spy)
    prepare(flags_of(corpus, tokenizer=tokenizer), str(tmp_path))
    assert tokenized == [str(len(lines) - 1)]
    assert Path(index.url("manifest.jsonl")).read_bytes() == manifest
    assert done["key"] in {unit.key for unit in TextFolder(index.path).units.values()}
    assert not list(Path(index.path).glob("progress*"))


def test_formats_and_stores_that_preprocessing_reads(tmp_path: Path, tokenizer: str, s3_bucket: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = documents(30, seed=4)
    write_jsonl(tmp_path / "a.jsonl.gz", texts[:10])
    storage.copy(str(tmp_path / "a.jsonl.gz"), f"s3://{s3_bucket}/raw/a.jsonl.gz")
    pq.write_table(pa.table({"text": texts[10:20]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("\n--\n".join(texts[20:]))
    name = f"s3://{s3_bucket}/raw/*::{tmp_path}/b.parquet::{tmp_path}/*.txt"
    flags = ["--train-text", name, "--tokenizer", tokenizer, "--workers", "0", "--text-separator", r"\n--\n"]
    (source,) = loader_of(prepare(flags, str(tmp_path)), 4).sources
    record = json.loads(Path(text_folder(str(tmp_path / "run" / "text_index"), name).url("dataset.json")).read_text())
    assert record["counts"]["documents"] == len([text for text in texts if text])
    assert source.num_sequences == -(-record["counts"]["tokens"] // (SEQ_LEN + 1))


def test_one_command_trains_and_records_its_data(tmp_path: Path, corpus: Path, tokenizer: str) -> None:
    flags = [flag for flag in tiny_flags(tmp_path, tmp_path) if flag not in ("--data-key", "npy")]
    model = tmp_path / "model.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"vocab_size": VOCAB_SIZE}))
    words = ["--name", "run", "--train-text", str(corpus), "--tokenizer", tokenizer, "--epochs", "1"]
    main([*flags, *words, "--global-batch-size", "1024"])
    run = tmp_path / "run"
    (counts,) = [json.loads(path.read_text())["counts"] for path in run.glob("text_index/*/dataset.json")]
    assert train_rows(run)[-1]["tokens"] == counts["sequences"] // 1024 * 1024 * 8  # one pass
    assert choose_tokenizer(str(run)).fingerprint == load_tokenizer(tokenizer).fingerprint
    (source,) = json.loads((run / "data.json").read_text())["sources"]
    assert source["datasets"][0]["settings"]["raw_text"] is True
    facts = read_run(run)
    (folder,) = find_folders(facts, include_shards=False)
    assert "tokenized its raw text itself" in str(raw_obstacle(folder))
    with pytest.raises(ConfigError, match="--include-data: the run tokenized its raw text itself"):
        find_folders(facts, include_shards=True)


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("in_process")
def test_bad_documents_are_counted_as_in_preprocessing(tmp_path: Path, tokenizer: str) -> None:
    text = write_bad_jsonl(tmp_path / "raw", 40, 2)
    flags, logs = flags_of(text, tokenizer=tokenizer), str(tmp_path / "logs")
    with pytest.raises(DataError, match=r"(?s)2 of 42 documents cannot be used \(2 .*a\.jsonl: line 1"):
        prepare(flags, logs)
    prepare([*flags, "--ignore-parse-errors"], logs)
    record = json.loads(Path(index_of(tmp_path / "logs", text).url("dataset.json")).read_text())
    out = make(text.parent, tmp_path / "out", tokenizer, "--skip-bad-lines")
    reference = json.loads(next(out.rglob("dataset.json")).read_text())
    assert record["bad_documents"] == reference["bad_documents"]
    assert record["counts"]["documents"] == reference["counts"]["documents"] == 40


def test_unusable_text_is_one_clear_error(tmp_path: Path, tokenizer: str) -> None:
    logs = str(tmp_path / "logs")
    broken = write_jsonl(tmp_path / "broken.jsonl.zst", documents(60, seed=1))
    broken.write_bytes(broken.read_bytes()[:-200])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    wrong = write_jsonl(tmp_path / "wrong.jsonl", documents(60, seed=1), key="content")
    for name, error in [
        (broken, r"broken\.jsonl\.zst: .*(cut short|incomplete|truncated|ends)"),
        (empty, r"empty\.jsonl: "),
        (wrong, r"60 of 60 documents cannot be used .* Check --text-key text"),
        (tmp_path / "*.none", r"no file matches"),
    ]:
        with pytest.raises(DataError, match=error):
            prepare(flags_of(name, tokenizer=tokenizer), logs)
    with pytest.raises(ConfigError, match=r"--tokenizer .*: no such file"):
        prepare(flags_of(wrong, tokenizer=str(tmp_path / "none.json")), logs)
    with pytest.raises(ConfigError, match=r"--text-index s3://b/i: expected a local folder"):
        prepare([*flags_of(wrong, tokenizer=tokenizer), "--text-index", "s3://b/i"], logs)


def test_contradictory_flags_are_reported_together() -> None:
    flags = ["--train-text", "a", "a", "--train-data", "b", "--distill-cache", "c", "--text-separator", ""]
    with pytest.raises(ConfigError) as caught:
        parse_args([*flags, "--distill-loss", "forward_kl"], for_run=True)
    for problem in [
        "--train-data and --train-text are mutually exclusive", "--train-text: a is given twice",
        "--distill-cache belongs to shards", "--text-separator must not be empty", "--train-text requires --tokenizer",
    ]:  # fmt: skip
        assert problem in str(caught.value)
    assert "--train-num-samples" not in str(caught.value)  # one pass
    config = Config.from_namespace(parse_args(["--train-text", "raw/a-00.jsonl", "raw/a-01.jsonl"]))
    (doubt,) = doubtful_settings(config, {})
    assert "such as --train-text 'raw/a-*.jsonl'" in doubt


def test_a_unit_is_encoded_by_the_reference_after_a_difference(tmp_path: Path, tokenizer: str) -> None:
    from open_lm.data.text_units import TextOptions, TextUnit
    from open_lm.datapreprocess.readers import Piece

    text = write_jsonl(tmp_path / "a.jsonl", documents(20, seed=1))
    unit, options, encoder = (
        TextUnit("key", (Piece(str(text)),)),
        TextOptions(SEQ_LEN),
        make_encoder(tokenizer, None, None),
    )
    expected = UnitText(unit, options, encoder.reference())
    assert encoder._fast is not None
    rows = [block.tolist() for block in expected.sequences()]
    encode = encoder._fast.encode_batch
    encoder._fast.encode_batch = lambda texts: (encode(texts)[0] ^ 1, encode(texts)[1])  # a faulty library
    unequal = UnitText(unit, options, encoder)
    assert [block.tolist() for block in unequal.sequences()] == rows
    assert "differs from" in unequal.report.mismatch
    assert orjson.loads(orjson.dumps(unequal.report.to_json()))["tokens"] == expected.report.tokens
