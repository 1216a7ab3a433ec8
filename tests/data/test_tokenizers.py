"""The tokenizer of data sets and runs: its copies, its use by default, and the refusal of another one."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import SEQ_LEN, write_source
from run_helpers import before_step, tiny_flags, train
from tokenizer_helpers import write_data, write_tokenizer

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.provenance import describe
from open_lm.data.sources import find_sources
from open_lm.data.tokenizer_copies import same_ids
from open_lm.data.tokenizers import check_tokenizers, choose_tokenizer, find_run_tokenizer
from open_lm.errors import ConfigError, DataError
from open_lm.evaluate.icl.tasks import EvalSettings
from open_lm.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The ids of a text"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    return [*tiny_flags(tmp_path, logs=tmp_path / "runs"), "--name", "run"]


@pytest.fixture
def own(tmp_path: Path) -> Tokenizer:
    return write_tokenizer(tmp_path / "own.json")


@pytest.fixture
def other(tmp_path: Path) -> Tokenizer:
    return write_tokenizer(tmp_path / "other.json", reverse=True)


def write_run(root: Path, manifest: str, tokenizer: Tokenizer | None) -> str:
    """Write the record of a run, without training it; return the path of a checkpoint."""
    (root / "checkpoints").mkdir(parents=True)
    description = describe(find_sources(DataConfig(dataset_manifest=[manifest])))
    (root / "data.json").write_text(json.dumps(description))
    for file, content in tokenizer.files().items() if tokenizer else ():
        storage.write_bytes(root / "tokenizer" / file, content)
    return str(root / "checkpoints" / "epoch_1.pt")


# --- tokenizers ------------------------------------------------------------------------------------------------------
def test_tokenizers_are_compared_by_their_ids_not_by_their_files(
    own: Tokenizer, other: Tokenizer, tmp_path: Path
) -> None:
    formatted = write_tokenizer(tmp_path / "formatted.json", indent=1)
    assert formatted.fingerprint != own.fingerprint and same_ids(own, formatted) and same_ids(formatted, own)
    assert other.vocab_size == own.vocab_size and not same_ids(own, other)


def test_converted_sentencepiece_models_have_the_same_ids(shared_dir: Path, tmp_path: Path) -> None:
    from open_lm.hf import load_hf_tokenizer

    llama = load_tokenizer(str(shared_dir / "data/tokenizers/llama2.model"))
    load_hf_tokenizer(llama).save_pretrained(tmp_path)
    assert same_ids(llama, load_tokenizer(str(tmp_path)))


def test_the_files_of_a_tokenizer_load_the_same_one(own: Tokenizer, tmp_path: Path) -> None:
    for eot_token in (None, "<|end|>"):
        tokenizer = load_tokenizer(own.name, eot_token)
        for name, content in tokenizer.files().items():
            (tmp_path / name).write_bytes(content)
        copy = load_tokenizer(str(tmp_path))
        assert (copy.fingerprint, copy.eot_id) == (own.fingerprint, 256 if eot_token is None else 257)
        assert copy.files() == tokenizer.files()


# --- data sets -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("in_process")
def test_the_preprocessor_copies_the_tokenizer_to_every_folder(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    from datapreprocess_helpers import make

    from open_lm.datapreprocess.readers.registry import is_data_name

    root = make(raw[0], tmp_path / "out", small_tokenizer, "--num-consumers", "2", "--eot-token", "<a>")
    for folder in (root / "0", root / "1"):
        copy = load_tokenizer(str(folder / "tokenizer"))
        settings = json.loads((folder / "dataset.json").read_text())["settings"]
        assert copy.fingerprint == settings["tokenizer_fingerprint"]
        assert (copy.eot_id, copy.token(copy.eot_id)) == (settings["eot_id"], "<a>")
        files = [str(path) for path in (folder / "tokenizer").iterdir()]
        assert len(files) == 2 and not any(map(is_data_name, files)), "not input of another run"
    assert is_data_name("raw/tokenizer.jsonl")


def test_a_data_set_of_one_tokenizer_is_accepted(
    own: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    formatted = write_tokenizer(tmp_path / "formatted.json", indent=1)
    manifests = [write_data(tmp_path / "a", own), write_data(tmp_path / "b", formatted)]
    manifests += [write_source(tmp_path / "unknown", [3])]
    check_tokenizers(find_sources(DataConfig(dataset_manifest=manifests)))
    assert not caplog.records


def test_sources_with_different_tokenizers_are_refused(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = write_data(tmp_path / "a", own), write_data(tmp_path / "b", other)
    more = ["--val-data", second]
    with pytest.raises(DataError, match="different ids") as error:
        train(flags, first, 1, *more)
    for part in (own.fingerprint[:12], other.fingerprint[:12], first, second, "--allow-other-tokenizer"):
        assert part in str(error.value)
    assert not list((tmp_path / "runs").glob("*"))
    train(flags, first, 1, *more, "--allow-other-tokenizer")
    assert "different ids" in caplog.text


def test_tokenizers_without_copies_that_may_differ_are_a_warning(
    own: Tokenizer, other: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifests = [write_data(tmp_path / "a", own), write_data(tmp_path / "b", other, copy=False)]
    check_tokenizers(find_sources(DataConfig(dataset_manifest=manifests)))
    assert "if they give different ids" in caplog.text and other.fingerprint[:12] in caplog.text


def test_a_copy_of_another_tokenizer_is_not_used(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_data(tmp_path / "data", own)
    shutil.copy(other.name, tmp_path / "data/tokenizer/tokenizer.json")
    train(flags, manifest, 1)
    assert f"not used, because its fingerprint {other.fingerprint[:12]}" in caplog.text
    assert not (tmp_path / "runs/run/tokenizer").exists()


def test_samples_are_decoded_with_the_copy(own: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from open_lm.utils.inspect_shards import main

    write_data(tmp_path / "data", own)
    Path(own.name).unlink()
    main([str(tmp_path / "data"), "--samples", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [] and "text" in found["samples"][0]["pieces"][0]


def test_a_copy_that_cannot_be_read_does_not_stop_a_run(
    own: Tokenizer,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = write_data(tmp_path / "data", own, copy=False)
    (tmp_path / "data/tokenizer/tokenizer.json").mkdir(parents=True)
    info = storage.info
    monkeypatch.setattr(storage, "info", lambda url, *more: url if "tokenizer" in str(url) else info(url, *more))
    train(flags, manifest, 1)
    assert "cannot read the copy of the tokenizer" in caplog.text


# --- runs ------------------------------------------------------------------------------------------------------------
def test_a_run_keeps_its_tokenizer(own: Tokenizer, flags: list[str], tmp_path: Path) -> None:
    manifest = write_data(tmp_path / "data", load_tokenizer(own.name, "<|end|>"))
    flags += ["--checkpoint-dir", str(tmp_path / "saved")]
    flags += ["--remote-sync", str(tmp_path / "copy"), "--remote-sync-protocol", "fsspec"]
    train(flags, manifest, 1)
    shutil.rmtree(tmp_path / "data/tokenizer")
    Path(own.name).unlink()
    train(flags, manifest, 1, "--resume", "latest", epochs=2)
    run, saved = tmp_path / "runs/run", tmp_path / "saved/run"
    places = [
        run,
        tmp_path / "copy/run",
        saved,
        saved / "checkpoints",
        saved / "checkpoints/epoch_2.pt",
        saved / "checkpoints/step_00000002",
    ]
    for place in places:
        tokenizer = choose_tokenizer(str(place))
        assert (tokenizer.fingerprint, tokenizer.eot_id) == (own.fingerprint, 257), place
    assert json.loads((run / "data.json").read_text())["sources"][0]["datasets"][0]["tokenizer"] == own.name


def test_exported_checkpoints_keep_the_tokenizer(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path
) -> None:
    from open_lm.utils.convert_checkpoint import main as convert

    train(flags, write_data(tmp_path / "data", own), 1)
    step = str(tmp_path / "runs/run/checkpoints/step_00000001")
    write_run(tmp_path / "exported", write_data(tmp_path / "b", other), other)
    path = convert([step, "--output", str(tmp_path / "exported")])
    convert([step, "--output", str(tmp_path / "runs/run/checkpoints")])
    assert not (tmp_path / "runs/run/checkpoints/data.json").exists(), "the run has it"
    shutil.rmtree(tmp_path / "runs")
    assert choose_tokenizer(path).fingerprint == own.fingerprint, "of the last export"


def test_a_run_on_other_data_follows_their_tokenizer(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(flags, write_data(tmp_path / "a", own), 1)
    resume = ("--resume", "latest", "--allow-changed-data")
    with pytest.raises(DataError, match="different ids"):
        train(flags, write_data(tmp_path / "b", other), 1, *resume, epochs=2)
    with pytest.raises(DataError, match="different ids"):
        pretrained = ("--pretrained", str(tmp_path / "runs/run/checkpoints/epoch_1.pt"))
        train([*flags, "--name", "second"], str(tmp_path / "b/manifest.jsonl"), 1, *pretrained)
    allowed = (*resume, "--allow-other-tokenizer")
    train(flags, write_data(tmp_path / "no_copy" / "b", other, copy=False), 1, *allowed, epochs=2)
    assert "if they give different ids" in caplog.text
    assert not list((tmp_path / "runs/run/tokenizer").iterdir()), "not that of the data"
    train(flags, write_data(tmp_path / "b", other), 1, *allowed, epochs=3)
    assert choose_tokenizer(str(tmp_path / "runs/run")).fingerprint == other.fingerprint


def test_a_new_run_gets_the_tokenizer_of_its_initial_weights(own: Tokenizer, flags: list[str], tmp_path: Path) -> None:
    train(flags, write_data(tmp_path / "data", own), 1)
    shutil.rmtree(tmp_path / "data/tokenizer")
    pretrained = ("--pretrained", str(tmp_path / "runs/run/checkpoints/epoch_1.pt"), "--name", "second")
    train(flags, str(tmp_path / "data/manifest.jsonl"), 1, *pretrained)
    found = find_run_tokenizer(str(tmp_path / "runs/second"))
    assert found is not None and found.copy is not None and found.copy.fingerprint == own.fingerprint


def test_a_failed_start_leaves_no_tokenizer(
    own: Tokenizer, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError

    before_step(0, fail, monkeypatch)
    with pytest.raises(MemoryError):
        train(flags, write_data(tmp_path / "data", own), 1, "--checkpoint-dir", str(tmp_path / "saved"))
    assert not (tmp_path / "runs/run").exists() and not (tmp_path / "saved/run").exists()


def test_another_tokenizer_is_refused_unless_allowed(
    own: Tokenizer, other: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write_run(tmp_path / "run", write_data(tmp_path / "data", own), own)
    with pytest.raises(ConfigError, match="gives other ids") as error:
        choose_tokenizer(checkpoint, other.name)
    for part in (own.fingerprint[:12], other.fingerprint[:12], "leave out --tokenizer", "--allow-other-tokenizer"):
        assert part in str(error.value)
    assert choose_tokenizer(checkpoint, own.name, allow_other=True).fingerprint == own.fingerprint
    assert not caplog.records
    assert choose_tokenizer(checkpoint, other.name, allow_other=True).fingerprint == other.fingerprint
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "gives other ids than the one that the run in" in record.message
    assert other.name in record.message and "because of --allow-other-tokenizer" in record.message


def test_an_equal_tokenizer_gets_the_end_of_text_id_of_the_training_data(own: Tokenizer, tmp_path: Path) -> None:
    trained = load_tokenizer(own.name, "<|end|>")
    checkpoint = write_run(tmp_path / "run", write_data(tmp_path / "data", trained), trained)
    formatted = write_tokenizer(tmp_path / "formatted.json", indent=1)
    assert [choose_tokenizer(checkpoint, spec).eot_id for spec in (None, own.name, formatted.name)] == [257] * 3
    assert [choose_tokenizer(checkpoint, spec, "<|endoftext|>").eot_id for spec in (None, own.name)] == [256] * 2


def test_a_run_without_a_copy_finds_its_tokenizer_by_name(own: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", write_data(tmp_path / "data", own, copy=False), None)
    assert choose_tokenizer(checkpoint).fingerprint == own.fingerprint
    with pytest.raises(ConfigError, match="not the same file"):
        choose_tokenizer(checkpoint, other.name)
    moved = Path(own.name).rename(tmp_path / "moved.json")
    with pytest.raises(ConfigError, match=r"was not found .*pass that tokenizer with --tokenizer"):
        choose_tokenizer(checkpoint)
    assert choose_tokenizer(checkpoint, str(moved)).fingerprint == own.fingerprint
    shutil.copy(other.name, own.name)
    with pytest.raises(ConfigError, match=f"has the fingerprint {other.fingerprint[:12]}"):
        choose_tokenizer(checkpoint)


def test_a_damaged_copy_of_a_run_is_an_error(own: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", write_data(tmp_path / "data", own), other)
    with pytest.raises(ConfigError, match=f"{tmp_path}/run/tokenizer: its fingerprint is {other.fingerprint[:12]}"):
        choose_tokenizer(checkpoint)
    (tmp_path / "run/tokenizer/tokenizer.json").write_text("{")
    advice = "not a tokenizer.json .*; restore it, or remove it and pass --tokenizer"
    with pytest.raises(ConfigError, match=f"{tmp_path}/run/tokenizer: the copy of the run's .*{advice}"):
        choose_tokenizer(checkpoint)


def test_a_run_of_several_tokenizers_asks_for_one_of_them(own: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    manifests = [write_data(tmp_path / "a", own), write_data(tmp_path / "b", other)]
    checkpoint = write_run(tmp_path / "run", manifests[0], None)
    (tmp_path / "run/data.json").write_text(json.dumps(describe(find_sources(DataConfig(dataset_manifest=manifests)))))
    with pytest.raises(ConfigError, match=f"{other.fingerprint[:12]}….*pass one of them with --tokenizer"):
        choose_tokenizer(checkpoint)
    assert choose_tokenizer(checkpoint, other.name).fingerprint == other.fingerprint


def test_a_run_without_a_record_accepts_any_tokenizer(other: Tokenizer, shared_dir: Path, tmp_path: Path) -> None:
    manifest = write_source(tmp_path / "data", [3])
    recent = write_run(tmp_path / "run", manifest, None)
    golden = str(shared_dir / "compat/run/logs/upstream")
    for checkpoint in (recent, golden, f"{golden}/checkpoints/epoch_2.pt", str(tmp_path / "weights.pt")):
        assert find_run_tokenizer(checkpoint) is None
        assert choose_tokenizer(checkpoint, other.name).fingerprint == other.fingerprint


@pytest.mark.processes
def test_a_run_on_s3(own: Tokenizer, other: Tokenizer, tmp_path: Path, s3_bucket: str) -> None:
    write_run(tmp_path / "run", write_data(tmp_path / "data", own), own)
    for path in (tmp_path / "run").rglob("*.json"):
        storage.upload(path, f"s3://{s3_bucket}/runs/run/{path.relative_to(tmp_path / 'run')}")
    for place in ("run", "run/checkpoints/epoch_1.pt", "run/checkpoints/step_00000001/"):
        url = f"s3://{s3_bucket}/runs/{place}"
        assert choose_tokenizer(url).fingerprint == own.fingerprint
        with pytest.raises(ConfigError, match=f"s3://{s3_bucket}/runs/run was trained with"):
            choose_tokenizer(url, other.name)
    assert find_run_tokenizer(f"s3://{s3_bucket}/weights.pt") is None


# --- programs --------------------------------------------------------------------------------------------------------
@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs scripts/generate.py and returns its output."""
    main = runpy.run_path(str(ROOT / "scripts" / "generate.py"))["main"]

    def run(*args: object) -> str:
        capsys.readouterr()
        main(["--prompt", "ab", "--max-new-tokens", "4", *map(str, args)])
        return capsys.readouterr().out

    return run


def test_generation_refuses_another_tokenizer_than_the_run_was_trained_with(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path, generate: Callable[..., str]
) -> None:
    train(flags, write_data(tmp_path / "data", own), 1)
    run = tmp_path / "runs/run"
    places = (run, run / "checkpoints/epoch_1.pt", run / "checkpoints/step_00000001")
    texts = {generate("--checkpoint", place, *more) for place in places for more in ((), ("--tokenizer", own.name))}
    assert len(texts) == 1
    with pytest.raises(ConfigError, match="gives other ids"):
        generate("--checkpoint", run, "--tokenizer", other.name)
    assert generate("--checkpoint", run, "--tokenizer", other.name, "--allow-other-tokenizer") not in texts


def test_an_in_context_evaluation_refuses_another_tokenizer_than_the_run_was_trained_with(
    own: Tokenizer, other: Tokenizer, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(flags, write_data(tmp_path / "data", own), 1)
    from open_lm.evaluate import command

    checkpoint = str(tmp_path / "runs/run/checkpoints/epoch_1.pt")

    def load(*more: str) -> Any:
        words = ["--checkpoint", checkpoint, "--model", str(tmp_path / "model.json"), "--eval-yaml", "x.yaml", *more]
        args = command.build_parser("llm-foundry").parse_args(words)
        command.check_arguments(args)
        return command.load_tokenizer_and_model(args, EvalSettings([]))[0]

    assert load()(TEXT)["input_ids"] == load("--tokenizer", own.name)(TEXT)["input_ids"] == own.encode(TEXT)
    with pytest.raises(ConfigError, match="gives other ids"):
        load("--tokenizer", other.name)
    assert load("--tokenizer", other.name, "--allow-other-tokenizer")(TEXT)["input_ids"] == other.encode(TEXT)
    assert len(TEXT) > SEQ_LEN, "ids of any length are compared"
