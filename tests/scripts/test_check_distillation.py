"""The comparison of students with and without a teacher, with a few steps of training."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import check_distillation
import pytest

from open_lm.errors import ConfigError, DataError, UserError


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Write 90 kB of documents; return their folder."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {number} " * 60}) for number in range(100)]
    (folder / "one.jsonl").write_text("\n".join(lines))
    return folder


def test_the_table_has_the_validation_loss_of_each_student(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--folder", str(tmp_path / "out"), "--data", str(documents), "--seeds", "1"]
    with contextlib.suppress(UserError):  # so few steps may not show the effect
        check_distillation.main([*flags, "--teacher-steps", "3", "--steps", "2", "--arms", "cached"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"teacher", "none", "cached"} and 0 < results["cached"][0] < 7
    output = capsys.readouterr().out
    assert f"| none | {results['none'][0]:.4f} |" in output and f"teacher: {results['teacher']:.4f}" in output
    with pytest.raises(ConfigError, match="exists already"):
        check_distillation.main(flags)


def test_too_little_text_is_an_error(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are needed; give more text or fewer steps"):
        check_distillation.main(["--folder", str(tmp_path / "out"), "--data", str(documents), "--steps", "100000"])
    with pytest.raises(DataError, match=r"no \.jsonl\.zst or \.jsonl file"):
        check_distillation.main(["--folder", str(tmp_path / "other"), "--data", str(tmp_path / "out")])
