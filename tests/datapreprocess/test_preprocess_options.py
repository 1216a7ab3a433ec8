"""Options of the preprocessing commands: their effects, and the messages for misuse; in one process."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from datapreprocess_helpers import (
    EOT_ID,
    documents,
    expected_tokens,
    make,
    read_shards,
    record_of,
    rejects_of,
    tokens_of,
    tree,
    write_bad_jsonl,
    write_corpus,
    write_jsonl,
)

from open_lm.data.shard_format import read_manifest
from open_lm.datapreprocess import make_2048
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("in_process")
LENGTH = 33


def ids_of(tokenizer: str, texts: Iterable[str], bos: Sequence[int] = ()) -> list[list[int]]:
    """Encode each document with `tokenizers`."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(tokenizer)
    return [[*bos, *fast.encode(text, add_special_tokens=False).ids, EOT_ID] for text in texts]


def stream(out_folder: Path) -> list[int]:
    """Return the ids of all members in order, without padding."""
    return [value for _, _, ids in read_shards(out_folder) for value in ids if value != -1]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return [value for ids in lists for value in ids]


# --- documents ---------------------------------------------------------------------------------------------------


def with_bos(tokenizer: str, path: Path) -> str:
    """Write the tokenizer with <s> instead of <a>, as begin-of-text token."""
    path.write_text(Path(tokenizer).read_text().replace('"<a>"', '"<s>"'))
    return str(path)


def test_add_bos(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str) -> None:
    folder, texts = raw
    tokenizer = with_bos(small_tokenizer, tmp_path / "bos.json")
    out_folder = make(folder, tmp_path / "out", tokenizer, "--add-bos", "--no-shuffle") / "0"
    assert stream(out_folder) == flat(ids_of(tokenizer, texts, bos=[1]))
    assert record_of(out_folder)["settings"]["bos_id"] == 1
    plain = make(folder, tmp_path / "plain", tokenizer, "--no-shuffle") / "0"
    assert stream(plain) == flat(ids_of(tokenizer, texts)) and record_of(plain)["settings"]["bos_id"] is None
    with pytest.raises(ConfigError, match="there is no begin-of-text token"):
        make(folder, tmp_path / "no", small_tokenizer, "--add-bos")


def test_eot_token(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str) -> None:
    folder, texts = raw
    out_folder = make(folder, tmp_path / "out", small_tokenizer, "--eot-token", "<b>") / "0"
    assert tokens_of(read_shards(out_folder)) == expected_tokens(texts, small_tokenizer, 2)
    assert record_of(out_folder)["settings"]["eot_id"] == 2
    with pytest.raises(ConfigError, match="<none>"):
        make(folder, tmp_path / "no", small_tokenizer, "--eot-token", "<none>")


def parts_of(sequence: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the documents, or parts of documents, of a sequence."""
    ids = [value for value in sequence if value != -1]
    ends = [number + 1 for number, value in enumerate(ids) if value == EOT_ID]
    for start, end in zip([0, *ends], [*ends, len(ids)], strict=True):
        if start < end:
            yield tuple(ids[start:end])


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("order", ["shuffled", "kept"])
def test_split_documents_never_continues_a_document(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, order: str
) -> None:
    folder, texts = raw
    short = documents(300, seed=20, words=12)
    write_jsonl(folder / "short.jsonl", short)
    more = ["--no-shuffle"] if order == "kept" else []
    out_folder = make(folder, tmp_path / "out", small_tokenizer, "--split-documents", *more) / "0"
    encoded = ids_of(small_tokenizer, [*texts, *short])
    parts = [tuple(ids[at : at + LENGTH]) for ids in encoded for at in range(0, len(ids), LENGTH)]
    members = [ids for _, _, ids in read_shards(out_folder)]
    found = [part for ids in members for part in parts_of(ids)]
    assert found == parts if order == "kept" else Counter(found) == Counter(parts)
    pads = sum(ids.count(-1) for ids in members)
    assert all(len(ids) == LENGTH and -1 not in ids[: LENGTH - ids.count(-1)] for ids in members)
    record, entries = record_of(out_folder), read_manifest(str(out_folder / "manifest.jsonl"))
    assert record["counts"]["pads"] == pads > 0
    assert record["counts"]["tokens"] == sum(map(len, encoded)) == sum(entry.extra["num_tokens"] for entry in entries)
    assert record["tail"] == {"fate": "none", "tokens": 0}
    for entry in entries:
        shard = [ids for name, _, ids in read_shards(out_folder) if name == f"{entry.shard}.tar"]
        assert entry.extra["num_tokens"] == sum(LENGTH - ids.count(-1) for ids in shard)


@pytest.mark.processes
def test_trainer_masks_padding(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str) -> None:
    import torch

    from open_lm.config.command_line import parse_args
    from open_lm.data import get_data
    from open_lm.data.masking import IGNORE_INDEX

    out_folder = make(raw[0], tmp_path / "out", small_tokenizer, "--split-documents", "--no-shuffle") / "0"
    count = record_of(out_folder)["counts"]["sequences"]
    args = parse_args(["--dataset-manifest", str(out_folder / "manifest.jsonl"), "--train-num-samples", str(count)])
    args.seq_len, args.vocab_size, args.per_gpu_batch_size, args.rank, args.world_size = 32, 400, 5, 0, 1
    batches = list(get_data(args)["train"].loader.batches(count // 5))
    inputs_ = torch.cat([batch.inputs for batch, _ in batches])
    targets = torch.cat([batch.targets for batch, _ in batches])
    known = {tuple(ids[:-1]) for _, _, ids in read_shards(out_folder)}
    masked = targets == IGNORE_INDEX
    assert 0 < masked.float().mean() < 0.5 and inputs_.min() >= 0
    assert torch.equal(targets[:, :-1][~masked[:, :-1]], inputs_[:, 1:][~masked[:, :-1]])
    for row, is_masked in zip(inputs_.tolist(), masked.tolist(), strict=True):
        length = len(row) - is_masked.count(True)
        assert any(tuple(row[:length]) == ids[:length] for ids in known)


def test_tail_is_dropped_or_padded(raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str) -> None:
    folder, texts = raw
    total = sum(expected_tokens(texts, small_tokenizer, EOT_ID).values())
    for more in ([], ["--no-shuffle"]):
        out_folder = make(folder, tmp_path / f"dropped{len(more)}", small_tokenizer, "--drop-tail", *more) / "0"
        members = read_shards(out_folder)
        assert len(members) == total // LENGTH and all(-1 not in ids for _, _, ids in members)
        record = record_of(out_folder)
        assert record["tail"] == {"fate": "dropped", "tokens": total % LENGTH}
        assert record["counts"]["tokens"] == total and record["counts"]["pads"] == 0
    write_jsonl(tmp_path / "one.jsonl", ["the"])
    with pytest.raises(DataError, match="2 tokens, too few for one sequence of 33 ids, and --drop-tail drops them"):
        make(tmp_path / "one.jsonl", tmp_path / "none", small_tokenizer, "--drop-tail")
    out_folder = make(tmp_path / "one.jsonl", tmp_path / "one", small_tokenizer) / "0"
    assert [ids.count(-1) for _, _, ids in read_shards(out_folder)] == [31]


@pytest.mark.usefixtures("small_units")
def test_no_shuffle_keeps_the_order_of_units_files_and_sources(tmp_path: Path, small_tokenizer: str) -> None:
    texts = []
    for number, count in enumerate((90, 1, 0, 300, 2, 40)):
        texts += documents(count, seed=number)
        write_jsonl(
            tmp_path / "raw" / f"{number}-{'ab'[number % 2]}.jsonl{'.gz' if number == 5 else ''}",
            texts[-count:] if count else [""],
        )
        texts += [""] if not count else []
    more = ["--no-shuffle", "--num-consumers", "2", "--shard-size", "17"]
    sources = ["--source", f"even={tmp_path}/raw/*-a.*", "--source", f"odd={tmp_path}/raw/*-b.*"]
    out_folder = make([], tmp_path / "out", small_tokenizer, *more, *sources)
    assert stream(out_folder) == flat(ids_of(small_tokenizer, texts))
    assert set(record_of(out_folder / "0")["sources"]) == {"even", "odd"}


# --- bad input ---------------------------------------------------------------------------------------------------


def test_max_bad_fraction(tmp_path: Path, small_tokenizer: str) -> None:
    path = write_bad_jsonl(tmp_path, 99, 1)
    for number, fraction in enumerate(("0", "0.001", "0.0099")):
        with pytest.raises(DataError, match=f"1 of 100 documents.*allows {float(fraction):g}"):
            make(path, tmp_path / f"no{number}", small_tokenizer, "--max-bad-fraction", fraction)
    for number, fraction in enumerate(("0.01", "1")):
        out_folder = make(path, tmp_path / f"yes{number}", small_tokenizer, "--max-bad-fraction", fraction)
        assert record_of(out_folder / "0")["counts"]["bad_documents"] == 1
        assert rejects_of(out_folder) == [("a.jsonl", 1, "invalid JSON")]
    for fraction in ("-0.1", "1.01", "nan"):
        with pytest.raises(ConfigError, match="--max-bad-fraction must be from 0 to 1"):
            make(path, tmp_path / "never", small_tokenizer, "--max-bad-fraction", fraction)
    assert not (tmp_path / "never").exists()
    clean = make(
        write_jsonl(tmp_path / "b.jsonl", ["the"]), tmp_path / "clean", small_tokenizer, "--max-bad-fraction", "0"
    )
    assert not (clean / "rejects.jsonl").exists()


@pytest.mark.usefixtures("small_units")
def test_rejects_are_in_input_order(tmp_path: Path, small_tokenizer: str) -> None:
    folder = tmp_path / "raw"
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in documents(200, seed=number)]
        for at in (0, 120, 199):
            lines[at] = f"{{broken {number}-{at}"
        (folder / f"{number}.jsonl").parent.mkdir(exist_ok=True)
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    for more in ([], ["--no-shuffle"]):
        out_folder = make(folder, tmp_path / f"out{len(more)}", small_tokenizer, "--skip-bad-lines", *more)
        lines_ = [json.loads(line) for line in (out_folder / "rejects.jsonl").read_text().splitlines()]
        assert [line["content"] for line in lines_] == [f"{{broken {n}-{at}" for n in range(4) for at in (0, 120, 199)]
        assert all(Path(line["url"]).name == f"{line['content'][8]}.jsonl" and line["detail"] for line in lines_)
        assert record_of(out_folder / "0")["bad_documents_first"][1].endswith("0.jsonl line 121")


def test_rejects_of_a_failed_run_are_removed_when_the_input_is_fixed(tmp_path: Path, small_tokenizer: str) -> None:
    path = write_bad_jsonl(tmp_path / "raw", 30, 2)
    with pytest.raises(DataError, match=r"2 of 32 documents.*are listed in .*rejects\.jsonl"):
        make(path, tmp_path / "out", small_tokenizer)
    assert len(rejects_of(tmp_path / "out" / "32-v1")) == 2
    write_jsonl(path, ["the end"])
    out_folder = make(path, tmp_path / "out", small_tokenizer)
    assert not (out_folder / "rejects.jsonl").exists() and record_of(out_folder / "0")["counts"]["documents"] == 1


# --- the command line --------------------------------------------------------------------------------------------


def test_abbreviation_of_one_flag_in_two_spellings_is_not_ambiguous() -> None:
    parser = make_2048.make_parser()
    args = parser.parse_args(["--input", "a", "b", "--output-d", "out", "--num_w", "2", "--no_s"])
    assert (args.input_files, args.output_dir, args.num_workers, args.no_shuffle) == (["a", "b"], "out", 2, True)
    with pytest.raises(ConfigError, match="ambiguous option: --num could match --num-workers, --num-consumers"):
        parser.parse_args(["--num", "2"])


@pytest.mark.parametrize("module", [make_2048, tokenize_shuffle])
def test_help_shows_every_option_and_both_spellings_parse(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = module.make_parser()
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    known = [action for action in parser._actions if action.dest != "help"]
    assert len(known) > 25
    for action in known:
        assert action.help and action.option_strings[0] in shown
        body = action.option_strings[0].removeprefix("--")
        for spelling in {body, body.replace("-", "_"), body.replace("_", "-")}:
            value = [] if action.nargs == 0 else ["1"] if action.type else list(action.choices or ["x"])[:1]
            required = ["--output", "o"] if module is tokenize_shuffle else ["--output-dir", "o"]
            parsed = vars(parser.parse_args([*required, f"--{spelling}", *value]))
            assert parsed[action.dest] not in (None, False, [])


MISUSES = {
    "--skip-bad-lines --max-bad-fraction 0.5": "use only one of them",
    "--separator=": "--separator must not be empty",
    r"--separator \ud800": "cannot be encoded as UTF-8",
    "--output-per-source": "--output-per-source needs sources",
    "--mixture-tokens 5": "--mixture-tokens needs a --mixture with rates",
    "--mixture-tokens 5 --source a=RAW": "--mixture-tokens needs a --mixture with rates",
    "--mixture MIX --mixture-tokens 5 --output-per-source": "the sources are mixed in training",
    "--mixture wikipedia_mixtur": "did you mean wikipedia_mixture",
    "--mixture FACTORS": "has both rates and sampling_frequencies",
    "--source a": "expected NAME=PATTERN",
    "--num-consumers 0": "--num-consumers must be at least 1",
    "--num-workers 0": "number of workers must be at least 1",
    "--format tsv": "invalid choice",
    "--seqlen x": "invalid int",
    "--seed 9223372036854775808": "--seed must fit 64 bits",
    "--vocab-size 0": "--vocab-size must be at least 1",
    "--vocab-size 2": "--vocab_size 2 is too small for the end-of-text id 3",
}


@pytest.mark.parametrize("flags", MISUSES)
def test_misuse_is_reported_before_anything_is_written(tmp_path: Path, small_tokenizer: str, flags: str) -> None:
    write_corpus(tmp_path / "raw")
    (tmp_path / "mix.yaml").write_text("sources:\n- {source: a, markers: [raw], rate: 1}\n")
    (tmp_path / "both.yaml").write_text(
        "sources:\n- {source: a, markers: [raw], rate: 1}\nsampling_frequencies: {a: 2}\n"
    )
    before = tree(tmp_path)
    places = {"RAW": "raw", "MIX": "mix.yaml", "FACTORS": "both.yaml"}
    words = [re.sub("RAW|MIX|FACTORS", lambda m: str(tmp_path / places[m[0]]), word) for word in flags.split()]
    with pytest.raises(ConfigError, match=MISUSES[flags]):
        make(tmp_path / "raw", tmp_path / "out", small_tokenizer, *words)
    assert tree(tmp_path) == before


def test_flags_without_effect_are_reported(
    tmp_path: Path, small_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the"])
    make(path, tmp_path / "out", small_tokenizer, "--split-documents", "--drop-tail", "--separator", "x")
    for part in ("--drop-tail: without effect", "--separator: without effect"):
        assert part in caplog.text
    plain = ["--input", str(path), "--tokenizer", small_tokenizer, "--seqlen", "32"]
    yaml = str(tmp_path / "mix.yaml")
    more = [
        "--default-dataset-yaml",
        yaml,
        "--ray-spill-location",
        str(tmp_path / "a"),
        "--work-dir",
        str(tmp_path / "b"),
    ]
    tokenize_shuffle.main([*plain, "--output", str(tmp_path / "shuffled"), *more])
    for part in ("--default_dataset_yaml: without effect", "--ray_spill_location: without effect"):
        assert part in caplog.text
    with pytest.raises(ConfigError, match="--mixture dolma_mixture and --do_sample exclude each other"):
        tokenize_shuffle.main([*plain, "--output", str(tmp_path / "x"), "--do-sample", "--mixture", "dolma_mixture"])


def test_no_input_and_missing_inputs(tmp_path: Path, small_tokenizer: str) -> None:
    with pytest.raises(ConfigError, match=r"no input files: use --input-files, or .*--source NAME=PATTERN"):
        make([], tmp_path / "out", small_tokenizer)
    with pytest.raises(ConfigError, match="no input files: use --input,"):
        tokenize_shuffle.main(["--output", str(tmp_path / "out"), "--tokenizer", small_tokenizer])
    with pytest.raises(DataError, match="no file matches"):
        make(tmp_path / "nowhere", tmp_path / "out", "no tokenizer of this name")
    assert not list(tmp_path.iterdir())
