"""Test `open-lm doctor`: findings, known-bad pairs, and checks that crash or hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from open_lm.cli import doctor
from open_lm.cli.doctor_checks import check_network
from open_lm.cli.doctor_findings import ERROR, NOTE, OK, WARNING, Finding
from open_lm.cli.doctor_packages import BAD_PAIRS, bad_pairs, check_packages, installed_version
from open_lm.cli.doctor_packages import tested_versions as pinned_versions
from open_lm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_findings_of_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "IMPORTS", ("yaml",))  # the real ones take long
    doctor.main(["--offline", "--json", "--timeout", "400"])
    output = capsys.readouterr().out
    findings = [Finding(**values) for values in json.loads(output)["findings"]]
    assert {finding.check for finding in findings} == set(doctor.CHECKS) - {"network"}
    by_name = {finding.name: finding for finding in findings}
    assert by_name["torch.distributed"].text.startswith("gloo")
    assert by_name["numpy"].status in (OK, NOTE) and str(installed_version("numpy")) in by_name["numpy"].text
    assert by_name["attention"].text.startswith("--attn-name auto uses the kernels of")
    text = doctor.format_findings(findings)
    assert text.endswith(" warnings (??)") and "\n  ok  Python " in text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import os; os.abort()", "the check ended with signal 6"),
        ("raise OSError('undefined symbol: x')", "the import fails (OSError: undefined symbol: x)"),
        ("import signal; signal.pause()", "the check has not finished after 3 s"),
    ],
)
def test_a_broken_package_is_a_finding(code: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.run_check(("imports", "broken"), 3.0)
    assert (finding.check, finding.name, finding.status) == ("imports", "broken", WARNING)
    assert text in finding.text


def test_something_needed_that_is_broken_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_check", lambda words, _: [Finding(words[0], words[-1], ERROR, "broken", "repair")])
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 1
    assert "  !!  torch" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--timeout: found 0"):
        doctor.main(["--timeout", "0"])


@pytest.mark.parametrize(
    ("versions", "status", "words"),
    [
        ({"torch": "2.2.1", "numpy": "2.1.0"}, ERROR, "compiled for NumPy 1"),
        ({"torch": "2.7.0+cu126", "torchao": "0.14.1"}, WARNING, "torchao 0.14.1"),
        ({"torch": "2.9.1", "torchao": "0.13.0"}, WARNING, "its import may abort"),
        ({"setuptools": "82.0", "llm-foundry": "0.22.0"}, ERROR, "pkg_resources"),
        ({"python": "3.11.7", "torch": "2.13.0"}, NOTE, "--logs as ambiguous"),
    ],
)
def test_known_bad_pairs(versions: dict[str, str], status: str, words: str) -> None:
    findings = [item for item in bad_pairs(versions.get) if words in item.text]
    assert [item.status for item in findings] == [status]


def test_good_pairs_are_no_finding() -> None:
    good = {"python": "3.12.8", "torch": "2.13.0", "numpy": "2.4.6", "setuptools": "80.1", "llm-foundry": "0.22.0"}
    assert not list(bad_pairs(good.get))
    assert not list(bad_pairs({"torch": "2.9.1", "torchao": "0.15.0", "python": "3.13.1"}.get))
    assert all(pair.source and pair.advice for pair in BAD_PAIRS)


def test_requirements_that_are_not_met() -> None:
    """aiobotocore accepts three releases of botocore; a package of the core that is missing is an error."""
    other = {"botocore": "1.30.0", "numpy": None, "torch": "1.13.0"}

    def version_of(name: str) -> str | None:
        return other[name] if name in other else installed_version(name)

    def findings() -> Iterator[Finding]:
        yield from check_packages(version_of)

    by_name = {finding.name: finding for finding in findings() if finding.name != "conflict"}
    assert by_name["numpy"].status == ERROR and by_name["numpy"].text == "not installed"
    assert by_name["torch"].status == WARNING and "1.13.0, expected >=2.7" in by_name["torch"].text
    conflicts = [finding.text for finding in findings() if finding.name == "conflict"]
    if installed_version("aiobotocore"):
        assert any(text.startswith("aiobotocore") and "found 1.30.0" in text for text in conflicts)


def test_tested_versions_are_those_of_the_lock_file() -> None:
    pinned = (ROOT / "requirements" / "dev.txt").read_text()
    versions = pinned_versions()
    assert len(versions) > 50 and f"torch=={versions['torch']}" in pinned


def test_credentials_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "very-secret", "HF_TOKEN": "hf_verysecret",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    findings = {finding.name: finding for finding in check_network()}
    assert findings["S3"].status == WARNING and "http://127.0.0.1:9 does not answer" in findings["S3"].text
    assert findings["S3 credentials"].text == findings["hub token"].text == "present"
    assert not any(word in repr(findings) for word in ("AKIA", "secret"))
