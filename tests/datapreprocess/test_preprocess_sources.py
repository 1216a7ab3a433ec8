"""Sources and mixtures end to end: token shares, one data set per source, and consistent records."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from pathlib import Path

import pytest
from datapreprocess_helpers import (
    EOT_ID,
    documents,
    expected_tokens,
    make,
    read_shards,
    record_of,
    tokens_of,
    tree,
    write_jsonl,
)

from open_lm.data.shard_format import read_manifest
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.errors import ConfigError, DataError
from open_lm.utils import inspect_shards

pytestmark = pytest.mark.usefixtures("in_process")
LENGTH = 33
Texts = dict[str, list[str]]


@pytest.fixture
def sources(tmp_path: Path) -> Texts:
    """Write two files of wiki, one of web and one of code; their tokens leave an incomplete last sequence."""
    texts = {"wiki": documents(80, seed=1), "web": documents(150, seed=2), "code": documents(25, seed=3)}
    write_jsonl(tmp_path / "raw" / "wiki" / "0.jsonl", texts["wiki"][:50])
    write_jsonl(tmp_path / "raw" / "wiki" / "1.jsonl", texts["wiki"][50:])
    write_jsonl(tmp_path / "raw" / "web.jsonl.gz", texts["web"])
    write_jsonl(tmp_path / "raw" / "code.jsonl", texts["code"])
    return texts


def flags(root: Path, *names: str) -> list[str]:
    patterns = {"wiki": "wiki", "web": "web*", "code": "*.jsonl"}
    return [word for name in names for word in ("--source", f"{name}={root}/raw/{patterns[name]}")]


def counted(texts: Texts, tokenizer: str) -> dict[str, int]:
    return {name: sum(expected_tokens(part, tokenizer, EOT_ID).values()) for name, part in texts.items()}


def verified(out: Path) -> dict[str, int]:
    """Check a data set with `inspect_shards --verify` and return its totals."""
    facts = inspect_shards.inspect(
        inspect_shards.make_parser().parse_args([str(out), "--verify", "--num-workers", "1"])
    )
    assert facts["problems"] == [] and facts["notes"] == []
    assert facts["verified"]["sequences"] == facts["total"]["sequences"]
    return {str(key): int(value) for key, value in facts["total"].items()}


# --- one output --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    "more", [[], ["--no-shuffle"], ["--split-documents"], ["--drop-tail"], ["--num-consumers", "2"]]
)
def test_manifest_counts_the_tokens_of_each_source(
    sources: Texts, tmp_path: Path, small_tokenizer: str, more: list[str]
) -> None:
    out_folder = make([], tmp_path / "out", small_tokenizer, *flags(tmp_path, "wiki", "web", "code"), *more)
    expected = counted(sources, small_tokenizer)
    record = record_of(out_folder / "0")
    assert {name: counts["tokens"] for name, counts in record["sources"].items()} == expected
    assert {name: counts["documents"] for name, counts in record["sources"].items()} == {
        name: len(part) for name, part in sources.items()
    }
    assert {name: counts["files"] for name, counts in record["sources"].items()} == {"wiki": 2, "web": 1, "code": 1}
    members = read_shards(out_folder)
    entries = [entry for path in sorted(out_folder.glob("*/manifest.jsonl")) for entry in read_manifest(str(path))]
    counts: Counter[str] = Counter()
    for entry in entries:
        assert sum(entry.extra["sources"].values()) == entry.extra["num_tokens"]
        counts.update(entry.extra["sources"])
    dropped = record["tail"]["tokens"] if record["tail"]["fate"] == "dropped" else 0
    assert sum(counts.values()) == sum(expected.values()) - dropped == sum(tokens_of(members).values())
    assert all(0 <= expected[name] - counts[name] <= dropped for name in expected)
    if not dropped:
        assert tokens_of(members) == expected_tokens(
            [text for part in sources.values() for text in part], small_tokenizer, EOT_ID
        )
    sums = verified(tmp_path / "out")
    assert sums["tokens"] == sum(counts.values()) and sums["shards"] == record["counts"]["shards"]
    assert sums["sequences"] == record["counts"]["sequences"] and sums["bytes"] == record["counts"]["bytes"]


def test_tails_of_sources_are_joined(tmp_path: Path, small_tokenizer: str) -> None:
    """Ten sources, each with too few tokens for a sequence."""
    texts = {f"s{number}": [f"stone {number}"] for number in range(10)}
    given: list[str] = []
    for name, part in texts.items():
        given += ["--source", f"{name}={write_jsonl(tmp_path / 'raw' / f'{name}.jsonl', part)}"]
    out_folder = make([], tmp_path / "out", small_tokenizer, *given) / "0"
    expected = counted(texts, small_tokenizer)
    assert max(expected.values()) < LENGTH < sum(expected.values())
    counts: Counter[str] = Counter()
    for entry in read_manifest(str(out_folder / "manifest.jsonl")):
        counts.update(entry.extra["sources"])
    assert counts == expected
    assert sum(verified(tmp_path / "out").values()) > 0


def test_file_of_two_sources_and_files_of_no_source(
    sources: Texts, tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    overlapping = ["--source", f"all={tmp_path}/raw/wiki/0.jsonl", *flags(tmp_path, "wiki")]
    with pytest.raises(ConfigError, match=r"0\.jsonl belongs to all and to wiki"):
        make([], tmp_path / "out", small_tokenizer, *overlapping)
    with pytest.raises(DataError, match=r"nowhere/\*: no file matches"):
        make([], tmp_path / "out", small_tokenizer, *flags(tmp_path, "wiki"), "--source", f"x={tmp_path}/nowhere/*")
    assert not (tmp_path / "out").exists()
    out_folder = make(tmp_path / "raw", tmp_path / "out", small_tokenizer, *flags(tmp_path, "wiki")) / "0"
    assert "2 files match no source, for example" in caplog.text and "code.jsonl" in caplog.text
    expected = counted(sources, small_tokenizer)
    tokens = {name: counts["tokens"] for name, counts in record_of(out_folder)["sources"].items()}
    assert tokens == {"wiki": expected["wiki"], "UNKNOWN": expected["web"] + expected["code"]}


def test_one_source_from_several_patterns(sources: Texts, tmp_path: Path, small_tokenizer: str) -> None:
    given = [word for number in (0, 1) for word in ("--source", f"w={tmp_path}/raw/wiki/{number}.jsonl")]
    out_folder = make([], tmp_path / "out", small_tokenizer, *given) / "0"
    assert record_of(out_folder)["sources"]["w"]["documents"] == len(sources["wiki"])


@pytest.mark.processes
@pytest.mark.parametrize("more", [[], ["--num-consumers", "2"], ["--output-per-source"]])
def test_inspection_reports_the_rejects_file(
    sources: Texts, tmp_path: Path, small_tokenizer: str, more: list[str]
) -> None:
    write_jsonl(tmp_path / "raw" / "code.jsonl", [7, *sources["code"]])  # type: ignore[list-item]
    given = [*flags(tmp_path, "code"), "--max-bad-fraction", "0.1", *more]
    out_folder = make([], tmp_path / "out", small_tokenizer, *given)
    facts = inspect_shards.inspect(inspect_shards.make_parser().parse_args([str(tmp_path / "out")]))
    folder = out_folder / "code" if "--output-per-source" in more else out_folder
    assert {data_set["rejects"] for data_set in facts["data_sets"]} == {str(folder / "rejects.jsonl")}


# --- one data set per source ------------------------------------------------------------------------------------


@pytest.mark.parametrize("consumers", [1, 2])
def test_output_per_source(
    sources: Texts, tmp_path: Path, small_tokenizer: str, consumers: int, caplog: pytest.LogCaptureFixture
) -> None:
    code = tmp_path / "raw" / "code.jsonl"
    code.write_text("{\n" + code.read_text())
    more = [*flags(tmp_path, "wiki", "web", "code"), "--output-per-source", "--num-consumers", str(consumers)]
    more += ["--max-bad-fraction", "0.01"]
    out_folder = make([], tmp_path / "out", small_tokenizer, *more)
    assert sorted(path.name for path in out_folder.iterdir()) == [
        "code",
        "dataset.json",
        "rejects.jsonl",
        "web",
        "wiki",
    ]
    root_record = record_of(out_folder)
    expected = counted(sources, small_tokenizer)
    for name, part in sources.items():
        folders = [out_folder / name] if consumers == 1 else [out_folder / name / "0", out_folder / name / "1"]
        assert tokens_of(read_shards(out_folder / name)) == expected_tokens(part, small_tokenizer, EOT_ID)
        entries = [entry for folder in folders for entry in read_manifest(str(folder / "manifest.jsonl"))]
        assert all(entry.extra["sources"] == {name: entry.extra["num_tokens"]} for entry in entries)
        record = record_of(folders[-1])
        assert record["counts"]["tokens"] == expected[name] and list(record["sources"]) == [name]
        assert record["counts"]["sequences"] == sum(entry.num_sequences for entry in entries)
        assert {
            Path(item["url"]).parts[-2 if name == "wiki" else -1].partition(".")[0] for item in record["inputs"]
        } == {name}
        assert record["counts"]["bad_documents"] == (name == "code") == (out_folder / name / "rejects.jsonl").exists()
        assert record["tail"]["fate"] in ("padded", "none")
    assert root_record["counts"]["tokens"] == sum(expected.values()) and set(root_record["sources"]) == set(sources)
    assert len(root_record["inputs"]) == 4
    assert json.loads((out_folder / "rejects.jsonl").read_text()) == json.loads(
        (out_folder / "code" / "rejects.jsonl").read_text()
    )
    sums = verified(tmp_path / "out")
    assert sums["tokens"] == root_record["counts"]["tokens"] and sums["sequences"] == root_record["counts"]["sequences"]
    before = {path: path.stat().st_mtime_ns for path in out_folder.rglob("*")}
    caplog.set_level("INFO")
    make([], tmp_path / "out", small_tokenizer, *more)
    assert "already done" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in out_folder.rglob("*")}


def test_only_the_root_record_marks_the_run_as_finished(
    sources: Texts, tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_lm.datapreprocess import engine

    more = [*flags(tmp_path, "wiki", "web"), "--output-per-source"]
    clean = make([], tmp_path / "clean", small_tokenizer, *more)
    written: list[str] = []
    original = engine.write_dataset

    def killed(url: str, record: dict[str, object]) -> None:
        if len(written) == 2:
            raise OSError("killed")
        written.append(url)
        original(url, record)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_dataset", killed)
        with pytest.raises(OSError, match="killed"):
            make([], tmp_path / "out", small_tokenizer, *more)
    out_folder = tmp_path / "out" / "32-v1"
    assert written == [str(out_folder / name / "dataset.json") for name in ("web", "wiki")]
    assert not (out_folder / "dataset.json").exists()
    make([], tmp_path / "out", small_tokenizer, *more)
    assert tree(out_folder).keys() == tree(clean).keys()


def test_source_without_documents(sources: Texts, tmp_path: Path, small_tokenizer: str) -> None:
    (tmp_path / "void.jsonl").write_text("{\n")
    more = [*flags(tmp_path, "web"), "--source", f"void={tmp_path}/void.jsonl", "--skip-bad-lines"]
    with pytest.raises(DataError, match="source void contains no documents; fix its files or remove the source"):
        make([], tmp_path / "out", small_tokenizer, *more, "--output-per-source")
    assert not list((tmp_path / "out").rglob("*.tar"))
    out_folder = make([], tmp_path / "together", small_tokenizer, *more) / "0"
    assert tokens_of(read_shards(out_folder)) == expected_tokens(sources["web"], small_tokenizer, EOT_ID)


def test_source_with_factor_zero(sources: Texts, tmp_path: Path, small_tokenizer: str) -> None:
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"sources: [{{source: wiki, inputs: [{tmp_path}/raw/wiki]}}, {{source: web, inputs: [{tmp_path}/raw/web*]}}]\n"
        "sampling_frequencies: {wiki: 0, web: 2}\n"
    )
    out_folder = make([], tmp_path / "out", small_tokenizer, "--mixture", str(mixture), "--output-per-source")
    assert not (out_folder / "wiki").exists()
    assert tokens_of(read_shards(out_folder)) == expected_tokens(sources["web"] * 2, small_tokenizer, EOT_ID)
    assert verified(tmp_path / "out")["tokens"] == 2 * counted(sources, small_tokenizer)["web"]


# --- mixtures ----------------------------------------------------------------------------------------------------


def test_logged_flags_train_at_the_rates(
    tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    from open_lm.main import main

    for number, name in enumerate(("cc_en", "wiki")):
        write_jsonl(tmp_path / "raw" / name / "0.jsonl", documents(60, seed=number))
    caplog.set_level(logging.INFO)
    mixture = ["--mixture", "wikipedia_mixture", "--output-per-source"]
    out_folder = make(tmp_path / "raw", tmp_path / "out", small_tokenizer, *mixture)
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [message for message in messages if "training flags for the rates" in message]
    flags_ = shlex.split(message.partition(": ")[2])
    manifests = [str(out_folder / name / "manifest.jsonl") for name in ("cc_en", "wiki")]
    assert flags_ == ["--dataset-manifest", *manifests, "--train-data-mix-weights", "9.09", "90.91"]
    model = tmp_path / "model.json"
    model.write_text(json.dumps({"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 32, "vocab_size": 400}))
    run = ["--model", str(model), "--train-num-samples", "640", "--global-batch-size", "4", "--workers", "0"]
    run += ["--precision", "fp32", "--logs", str(tmp_path), "--name", "run", "--warmup", "1", "--epochs", "1"]
    main([*run, *flags_])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 5


def test_rates_that_do_not_match_are_reported_before_the_run(
    sources: Texts, tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    for more in ([], ["--output-per-source"]):
        with pytest.raises(ConfigError, match=r"cc_en: has rate 9\.09, but no"):
            make(tmp_path / "raw", tmp_path / "out", small_tokenizer, "--mixture", "wikipedia_mixture", *more)
    assert not list((tmp_path / "out").rglob("*.*"))
    more = ["--mixture", "wikipedia_mixture", "--output-per-source", "--num-consumers", "2"]
    make(tmp_path / "raw" / "wiki", tmp_path / "out", small_tokenizer, *more)
    assert "use --num-consumers 1" in caplog.text


def rated(tmp_path: Path, rates: dict[str, float]) -> tuple[list[str], Texts]:
    """Return the flags and the texts of a custom mixture with short documents of equal length."""
    texts = {name: [f"the {name} the {n % 10}" for n in range(3000)] for name in rates}
    lines = []
    for name, rate in rates.items():
        path = write_jsonl(tmp_path / "raw" / f"{name}.jsonl", texts[name])
        lines.append(f"- {{source: {name}, inputs: [{path}], rate: {rate}}}\n")
    (tmp_path / "mix.yaml").write_text("sources:\n" + "".join(lines))
    return ["--mixture", str(tmp_path / "mix.yaml")], texts


@pytest.mark.parametrize("total", [None, 30_000, 150_000])
def test_rates_of_one_output_are_reached_by_sampling(tmp_path: Path, small_tokenizer: str, total: int | None) -> None:
    rates = {"a": 60.0, "b": 30.0, "c": 10.0}
    given, texts = rated(tmp_path, rates)
    more = [] if total is None else ["--mixture-tokens", str(total)]
    out_folder = make([], tmp_path / "out", small_tokenizer, *given, *more) / "0"
    record = record_of(out_folder)
    tokens = {name: counts["tokens"] for name, counts in record["sources"].items()}
    expected = total or counted(texts, small_tokenizer)["a"] / 0.6  # a is used once, the others less often
    assert sum(tokens.values()) == record["counts"]["tokens"] == pytest.approx(expected, rel=0.05)
    assert {name: 100 * count / sum(tokens.values()) for name, count in tokens.items()} == pytest.approx(
        rates, rel=0.08
    )
    if total is None:
        assert record["sources"]["a"]["documents"] == 3000 and record["mixture"]["factors"]["a"] == 1.0
    assert record["mixture"]["factors"] == record["settings"]["sampling"]["factors"]
    assert verified(tmp_path / "out")["tokens"] == sum(tokens.values())


def test_invalid_mixture_tokens(tmp_path: Path, small_tokenizer: str) -> None:
    given, _ = rated(tmp_path, {"a": 1.0})
    for total, message in (("10000000000", "the maximum is 1000"), ("0", "must be at least 1")):
        with pytest.raises(ConfigError, match=message):
            make([], tmp_path / "out", small_tokenizer, *given, "--mixture-tokens", total)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_tokenize_shuffle_samples_with_its_default_factors(tmp_path: Path, small_tokenizer: str, spelling: str) -> None:
    texts = {name: [f"the {name} {n}" for n in range(500)] for name in ("wikipedia", "book", "rest")}
    for name, part in texts.items():
        write_jsonl(tmp_path / "raw" / f"{name}.jsonl", part)
    arguments = ["--input", f"{tmp_path}/raw/", "--output", str(tmp_path / "out"), "--tokenizer", small_tokenizer]
    arguments += ["--do_sample", "--seqlen", "32", "--content_key", "text", "--wds_chunk_size", "64", "--no_shuffle"]
    tokenize_shuffle.main([word.replace("_", spelling) if word.startswith("--") else word for word in arguments])
    record = record_of(tmp_path / "out")
    taken = {name: counts["documents"] for name, counts in record["sources"].items()}
    assert taken["UNKNOWN"] == 500 and taken["WIKIPEDIA"] == pytest.approx(1134, abs=45)
    assert taken["BOOKS"] == pytest.approx(1047, abs=45)
    assert verified(tmp_path / "out")["tokens"] == record["counts"]["tokens"]


def test_source_flags_extend_the_default_sources_of_tokenize_shuffle(tmp_path: Path, small_tokenizer: str) -> None:
    path = write_jsonl(tmp_path / "odd" / "x.jsonl", [f"the {n}" for n in range(200)])
    arguments = ["--output", str(tmp_path / "out"), "--tokenizer", small_tokenizer, "--do_sample", "--seqlen", "32"]
    tokenize_shuffle.main([*arguments, "--source", f"BOOKS={path}"])
    assert record_of(tmp_path / "out")["sources"]["BOOKS"]["documents"] > 380
    with pytest.raises(ConfigError, match="NOVELS is not a source of"):
        tokenize_shuffle.main([*arguments, "--source", f"NOVELS={path}"])
