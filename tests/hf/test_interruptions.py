"""Conversions that are killed continue with the same command, and exclude each other."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import signal
from pathlib import Path

import killed_conversion
import pytest
from family_models import hf_model
from killed_conversion import convert

from open_lm import storage
from open_lm.errors import ConfigError, StorageError
from open_lm.hf import checkpoint_files, weight_files
from open_lm.hf import output_folder as output_folder_module
from open_lm.hf.convert import main
from open_lm.hf.output_folder import PROGRESS, OutputFolder, output_folder, whole_folder

KILLS = ((3, True), (6, False), (9, True), (0, False))  # (rename, whether it has happened)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    hf_model("tinyllama").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", killed_conversion.FILE_BYTES)
    monkeypatch.setattr(weight_files, "SHARD_BYTES", killed_conversion.FILE_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identities(folder: Path, suffix: str) -> dict[str, tuple[int, int]]:
    """Return the inode and the time of the weight files, which change if a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob(f"*{suffix}")}


def exit_code(argv: list[str], kill_at: int, after: bool) -> int | None:
    process = multiprocessing.get_context("forkserver").Process(target=convert, args=(argv, kill_at, after))
    process.start()
    process.join()
    return process.exitcode


def recorded(folder: Path) -> set[str]:
    if not (folder / PROGRESS).exists():
        return set()
    return {name.rpartition("/")[2] for name in json.loads((folder / PROGRESS).read_text())["files"]}


@pytest.mark.processes
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_conversion_continues(
    command: str, source: Path, tmp_path: Path, small_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of a conversion that was not killed, and no finished file is written again."""
    caplog.set_level(logging.INFO)
    suffix = ".bin" if command == "import" else ".safetensors"
    if command == "export":
        main(["import", str(source), str(tmp_path / "own")])
        source = tmp_path / "own" / "step_00000000"
    main([command, str(source), str(tmp_path / "whole")])
    target, incomplete = tmp_path / "target", tmp_path / "target.incomplete"
    argv = [command, str(source), str(target)]
    kept = 0
    for kill_at, after in KILLS:
        finished = recorded(incomplete)
        before = {name: value for name, value in identities(incomplete, suffix).items() if name in finished}
        assert exit_code(argv, kill_at, after) == -signal.SIGKILL
        assert not target.exists() and identities(incomplete, suffix).items() >= before.items()
        kept = len(before)
    assert kept >= 2
    (changed, *_) = sorted(recorded(incomplete))
    (path,) = incomplete.rglob(changed)
    path.write_bytes(bytes(reversed(path.read_bytes())))
    main(argv)
    assert f"{changed}: changed since it was written; writing it again" in caplog.text
    assert "continuing with" in caplog.text
    expected, actual = contents(tmp_path / "whole"), contents(target)
    assert actual.keys() == expected.keys() and [name for name in expected if actual[name] != expected[name]] == []
    assert not incomplete.exists()


def test_another_process_cannot_convert_to_the_same_folder(source: Path, tmp_path: Path) -> None:
    with (
        output_folder(str(tmp_path / "own"), "model.json", {}),
        pytest.raises(ConfigError, match=r"own\.incomplete: another process writes to it"),
    ):
        main(["import", str(source), str(tmp_path / "own")])
    assert (tmp_path / "own").exists(), "the process that has the lock"
    shutil.rmtree(tmp_path / "own")
    main(["import", str(source), str(tmp_path / "own")])


def test_other_settings_start_again(
    source: Path, tmp_path: Path, small_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    identity = {"weights": "others"}
    with pytest.raises(KeyboardInterrupt), output_folder(str(tmp_path / "own"), "model.json", identity) as output:
        with output.write("step_00000000/rank_00000_000.bin") as file:
            file.write(b"of another model")
        raise KeyboardInterrupt
    assert (tmp_path / "own.incomplete" / "step_00000000" / "rank_00000_000.bin").exists()
    main(["import", str(source), str(tmp_path / "own"), "--verify"])
    assert "removing the files of another conversion" in caplog.text
    assert PROGRESS not in contents(tmp_path / "own")


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("command", "constant"), [("import", "checkpoint_files.CHUNK_BYTES"), ("export", "weight_files.SHARD_BYTES")]
)
def test_another_layout_of_the_files_starts_again(
    command: str, constant: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade between the two attempts."""
    if command == "export":
        main(["import", str(source), str(tmp_path / "own")])
        source = tmp_path / "own"
    argv = [command, str(source), str(tmp_path / "target")]
    record = OutputFolder.record

    def interrupted(self: OutputFolder) -> None:
        record(self)
        if len(self._files) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(OutputFolder, "record", interrupted)
        main(argv)
    monkeypatch.setattr(f"open_lm.hf.{constant}", 3_000)
    main([command, str(source), str(tmp_path / "whole")])
    main(argv)
    expected, actual = contents(tmp_path / "whole"), contents(tmp_path / "target")
    assert actual.keys() == expected.keys() and [name for name in expected if actual[name] != expected[name]] == []


def test_a_folder_that_cannot_be_written_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/own\.incomplete"):
        main(["import", str(source), str(tmp_path / "file" / "own")])
    lock = Path(output_folder_module.lock_path(str(tmp_path / "own.incomplete")))
    lock.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot be written \(Is a directory\); make its folder writable"):
        main(["import", str(source), str(tmp_path / "own")])


def test_a_bucket_refuses_another_result_that_is_written_at_once(s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/copy"
    with pytest.raises(KeyboardInterrupt), whole_folder(url, "config.json", {"copy": "a"}):
        raise KeyboardInterrupt
    with (
        pytest.raises(ConfigError, match="contains the files of another unfinished"),
        whole_folder(url, "config.json", {"copy": "b"}),
    ):
        pass
    with whole_folder(url, "config.json", {"copy": "a"}):
        pass


def test_interrupted_conversions_to_a_bucket(
    s3_bucket: str, source: Path, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3_bucket}/own"
    reads: list[str] = []
    read = weight_files.WeightFiles.read

    def interrupted(self: weight_files.WeightFiles, name: str) -> object:
        reads.append(name)
        if len(reads) == 20:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(weight_files.WeightFiles, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["import", str(source), url])
    with pytest.raises(ConfigError, match=r"own: contains the files of another unfinished conversion"):
        main(["import", str(source), url, "--dtype", "bfloat16"])
    first = len(reads)
    main(["import", str(source), url, "--verify"])
    assert len(reads) - first < 25 < len(set(reads)), "tensors of finished files are not read again"
    assert storage.info(f"{url}/{PROGRESS}") is None
    with pytest.raises(ConfigError, match=r"own: has a model\.json already"):
        main(["import", str(source), url])
