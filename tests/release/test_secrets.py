"""The scanner for secrets, private paths and names: formats of tokens, of files, excerpts, redaction."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from open_lm.errors import DataError
from open_lm.release import file_texts, secret_rules
from open_lm.release.secrets_scan import UNREADABLE, Finding, Scanner, require_clean

LETTERS = "Qw3rTy7uIoP5aSd9fGh2JkL4zXc8VbN6mQw1eRt0yU"  # 42 letters and digits, as a generator would draw them
HEX = "0123456789abcdef0123456789abcdef01234567"
HF_TOKEN = "hf_" + LETTERS[:34]
SECRETS = {
    "AWS access key": "AKIA" + "IOSFODNN7ABCDEFG",
    "AWS secret key": f"aws_secret_access_key = {LETTERS[:38]}/+",
    "Hugging Face token": HF_TOKEN,
    "Weights & Biases key": f'WANDB_API_KEY="{HEX}"',
    "GitHub token": "ghp_" + LETTERS[:36],
    "GitLab token": "glpat-" + LETTERS[:20],
    "OpenAI or Anthropic key": "sk-proj-" + LETTERS,
    "Slack token": "xoxb-" + "123456789012-" + LETTERS[:24],
    "Slack webhook": "https://hooks.slack.com/services/" + "T00000000/B00000000/" + LETTERS[:24],
    "Google key": "AIza" + LETTERS[:35],
    "JSON web token": ".".join(["eyJ" + LETTERS[:20], "eyJ" + LETTERS[:30], LETTERS[:30]]),
    "private key": "-----BEGIN EC PRIVATE" + " KEY-----\nMHcCAQEEIIabc/+=\n-----END EC PRIVATE" + " KEY-----",
    "password in a URL": "postgresql://admin:hunter2@db.lab.org/runs",
    "signature in a URL": "https://b.s3.amazonaws.com/k?X-Amz-Signature=" + HEX,
    "authorization header": "Authorization: Bearer " + LETTERS[:24],
    "netrc password": "machine api.example.org\n  login me\n  password " + LETTERS[:12],
    "password": '"smtp_password": "correct-horse"',
    "secret value": f"MY_SERVICE_TOKEN={LETTERS[:24]}",
}
HOMES, ROOT_HOME = "/" + "home", "/" + "root"  # the parent of home folders, and the administrator's
HARMLESS = """
tokenizer_sha256: 3f9c2c5ee9b6de0b8ad8c3e4a5c6f7b8091a2b3c4d5e6f708192a3b4c5d6e7f8
"eos_token": "<|endoftext|>", "pad_token_id": 50256, "max_token": 1024, "tokens": 20971520
commit 0123456789abcdef0123456789abcdef01234567, wandb 0.21.0, report_to wandb
token = tokens[position]; secret = read_secret_from_environment(); password = getpass()
--hub-token TOKEN, HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxx, password=*** https://user:***@host/path
tokenizer_class: GPTNeoXTokenizerFast  api_key=os.environ["OPENAI_API_KEY"]  task-classification-with-long-name-here
https://site.orgHOMES/alice/page.html s3://bucketHOMES/run HOMES/user/data HOMES/$USER /usr/lib/python3.11/json
train.py --data /data/shards/{00000..00015}.tar  <a href="https://github.com/org/repo">  git@github.com:org/repo.git
""".replace("HOMES", HOMES)


@pytest.fixture
def scanner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scanner:
    """Return a scanner on the machine gpu-node-17 of the user ada.lovelace, with a token in the environment."""
    monkeypatch.setattr(secret_rules, "user_name", lambda: "ada.lovelace")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-node-17.lab.example")
    monkeypatch.setenv("HOME", "/people/ada")
    monkeypatch.setenv("SECRET_SERVICE_TOKEN", "swordfish-and-chips")
    return Scanner(secret_rules.machine_rules([tmp_path / "private"]))


def scan_text(scanner: Scanner, folder: Path, text: str, name: str = "notes.txt") -> list[Finding]:
    path = folder / "bundle" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return scanner.scan_file(path, name)


# ------------------------------------------------------------------------------------------------ rules
@pytest.mark.parametrize("rule", SECRETS)
@pytest.mark.parametrize("form", ["plain", "json", "assignment"])
def test_secrets_are_found_and_never_printed(rule: str, form: str, scanner: Scanner, tmp_path: Path) -> None:
    secret = SECRETS[rule]
    text = {"plain": secret, "json": json.dumps({"log": f"started\n{secret}\nend"}), "assignment": f"x={secret} # old"}
    findings = scan_text(scanner, tmp_path, f"first line\n{text[form]}\nlast line\n")
    assert [finding.rule for finding in findings] == [rule]
    (finding,) = findings
    assert (finding.file, finding.line, finding.is_warning) == ("notes.txt", 4 if _third_line(rule, form) else 2, False)
    assert "***" in finding.excerpt
    redacted = scanner.redact(text[form])
    for private in (LETTERS[:10], HEX[:10], "hunter2", "correct-horse", "MHcCAQ", "IOSFODNN"):
        assert private not in str(finding)
        assert private not in redacted
    if form == "json":
        assert json.loads(redacted)["log"].startswith("started\n")


def _third_line(rule: str, form: str) -> bool:
    """Return whether the secret is two lines below the first line of its form: in a file of several lines."""
    return rule == "netrc password" and form != "json"


def test_private_paths_and_names(scanner: Scanner, tmp_path: Path) -> None:
    cases = {
        f"data in {HOMES}/grace/data, log": ("home folder", "data in ~/data, log"),
        '{"path": "file:///Users/grace/x.txt"}': ("home folder", '{"path": "file://~/x.txt"}'),
        r"C:\Users\Grace Hopper\run": ("home folder", r"~\run"),
        f"cd {ROOT_HOME}/.cache": ("home folder", "cd ~/.cache"),
        "/lustre/users/grace/logs": ("home folder", "~/logs"),
        "/people/ada/model.pt": ("folder of this machine", "~/model.pt"),
        f"{tmp_path}/private/epoch_1.pt": ("folder of this machine", "~/epoch_1.pt"),
        "started by ada.lovelace at noon": ("user name", "started by *** at noon"),
        "rank 0 on gpu-node-17: ready": ("host name", "rank 0 on ***: ready"),
        "worker ip-10-0-3-17.ec2.internal": ("host name", "worker ***"),
        "key swordfish-and-chips!": ("value of a secret environment variable", "key ***!"),
    }
    for text, (rule, redacted) in cases.items():
        assert [finding.rule for finding in scan_text(scanner, tmp_path, text)] == [rule], text
        assert scanner.redact(text) == redacted
    (warning,) = scan_text(scanner, tmp_path, "contact: grace@navy.mil\n")
    assert (warning.rule, warning.is_warning, warning.excerpt) == ("e-mail address", True, "contact: grace@navy.mil")
    assert scanner.redact("grace@navy.mil") == "grace@navy.mil"
    assert scan_text(scanner, tmp_path, "\0 grace@navy.mil \0", "model.bin") == []


def test_short_and_common_names_count_only_after_a_label(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secret_rules, "user_name", lambda: "root")
    monkeypatch.setattr("socket.gethostname", lambda: "vm")
    scanner = Scanner(secret_rules.machine_rules())
    assert scan_text(scanner, tmp_path, "the root of a tree, a vm, user: root\n") == []
    findings = scan_text(scanner, tmp_path, "hostname: vm, root@vm\n")
    assert {(finding.rule, finding.excerpt) for finding in findings} == {("host name", "hostname: ***, root@***")}


def test_harmless_text(scanner: Scanner, tmp_path: Path) -> None:
    assert scan_text(scanner, tmp_path, HARMLESS) == []
    assert scanner.redact(HARMLESS) == HARMLESS


def test_own_source_code_has_no_findings(scanner: Scanner) -> None:
    package = Path(secret_rules.__file__).parents[1]
    files = [
        path for folder in ("release", "storage", "finetune", "config") for path in (package / folder).rglob("*.py")
    ]
    assert len(files) > 60
    for path in files:
        assert [str(finding) for finding in scanner.scan_file(path, path.name) if not finding.is_warning] == []


def test_home_folders_in_data_of_third_parties_are_warnings(scanner: Scanner, tmp_path: Path) -> None:
    text = f'{{"text": "see {HOMES}/grace/code and {HF_TOKEN}"}}\n'
    findings = scan_text(scanner, tmp_path, text, "evaluation/data/tasks/qa.jsonl")
    assert [(finding.rule, finding.is_warning) for finding in findings] == [
        ("home folder", True),
        ("Hugging Face token", False),
    ]
    assert all(not finding.is_warning for finding in scan_text(scanner, tmp_path, text, "metadata/out.log"))


def test_names_in_documents_data_and_code_are_warnings(scanner: Scanner, tmp_path: Path) -> None:
    """A producer may sign with the name of his account, and others may have the same name."""
    text = "https://github.com/ada.lovelace\n"
    for path, is_warning in {"README.md": True, "mof.yml": True, "report/technical_report.md": True,
                             "evaluation/data/qa.jsonl": True, "metadata/out.log": False, "samples/a.md": False,
                             "evaluation/results/results.jsonl": False}.items():  # fmt: skip
        (finding,) = scan_text(scanner, tmp_path, text, path)
        assert (finding.rule, finding.is_warning) == ("user name", is_warning), path
    (path,) = scan_text(scanner, tmp_path, "/people/ada/x\n", "README.md")
    assert not path.is_warning


# ------------------------------------------------------------------------------------------------ files
def tar_of(members: dict[str, bytes], mode: str = "w", owner: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.uname = len(content), owner
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pdf_of(text: str) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    pdf = fpdf.FPDF()
    pdf.add_page()
    pdf.set_font("helvetica", size=9)
    pdf.multi_cell(0, 5, text)
    return bytes(pdf.output())


def test_text_is_found_in_files_of_all_formats(scanner: Scanner, tmp_path: Path) -> None:
    line = f"a\nkey {HF_TOKEN}\n".encode()
    nested = tar_of({"logs/a.log": line, "b.zip": zip_of({"c.txt.gz": gzip.compress(line)})}, "w:gz")
    files = {
        "plain.yaml": (line, ["plain.yaml:2"]),
        "windows.txt": (f"a\r\nkey {HF_TOKEN}".encode("utf-16"), ["windows.txt:2"]),
        "latin.txt": ("é\nkey ".encode("latin-1") + HF_TOKEN.encode(), ["latin.txt:2"]),
        "page.html": (b"<p>a</p>\n<b>" + HF_TOKEN.encode() + b"</b>", ["page.html:2"]),
        "long.json": (b'{"a": "' + b"x y " * 600_000 + HF_TOKEN.encode() + b'"}', ["long.json:1"]),
        "code.tar.gz": (nested, ["code.tar.gz!b.zip!c.txt.gz:2", "code.tar.gz!logs/a.log:2"]),
        "text.xz": (lzma.compress(line), ["text.xz:2"]),
        "report.pdf": (pdf_of(f"The key is {HF_TOKEN}"), ["report.pdf"]),
        "image.png": (b"\x89PNG\0\0" + HF_TOKEN.encode() + b"\0", ["image.png"]),
    }
    for name, (content, places) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        found = sorted(str(finding).partition(": ")[0] for finding in scanner.scan_file(path, name))
        assert found == places, name


def test_headers_of_tensors_are_text_and_values_are_not(scanner: Scanner, tmp_path: Path) -> None:
    values = np.frombuffer(HF_TOKEN.encode().ljust(40), np.uint8)
    save_file({"values": values}, tmp_path / "clean.safetensors")
    save_file({"values": values}, tmp_path / "m.safetensors", metadata={"from": f"{HOMES}/grace/run"})
    np.save(tmp_path / "ids.npy", values)
    np.save(tmp_path / "names.npy", np.array([f"at {HOMES}/grace/run".encode()]))
    torch.save({"state": torch.from_numpy(values.copy()), "args": f"{HOMES}/grace/run"}, tmp_path / "epoch_1.pt")
    found = {path.name: [str(finding) for finding in scanner.scan_file(path, path.name)] for path in tmp_path.iterdir()}
    assert found["clean.safetensors"] == found["ids.npy"] == []
    assert len(found["m.safetensors"]) == len(found["names.npy"]) == 1
    assert found["epoch_1.pt"] == [
        "epoch_1.pt!epoch_1/data.pkl: home folder: " + found["epoch_1.pt"][0].split(": ")[-1]
    ]


def test_names_of_files_members_and_owners(scanner: Scanner, tmp_path: Path) -> None:
    archive = tmp_path / "shard.tar"
    archive.write_bytes(tar_of({"home/x.json": b"[1]", "ada.lovelace/y": b"1"}, owner="ada.lovelace"))
    assert {finding.rule for finding in scanner.scan_file(archive, "shard.tar")} == {"user name"}
    assert len(scanner.scan_file(archive, "shard.tar")) == 2  # the name of a member, and the owner
    (finding,) = scan_text(scanner, tmp_path, "text", "logs_ada.lovelace/out.log")
    assert (finding.file, finding.excerpt) == ("name of logs_ada.lovelace/out.log", "logs_***/out.log")


def test_files_that_cannot_be_read_are_findings(scanner: Scanner, tmp_path: Path) -> None:
    bomb = zip_of({"zeros": b"\0" * 10**6})
    damaged = {
        "cut.tar.gz": tar_of({"a": b"1" * 10_000}, "w:gz")[:60],
        "cut.zip": zip_of({"a": b"1" * 100})[:-30],
        "cut.safetensors": (1000).to_bytes(8, "little") + b"{}",
        "huge.safetensors": b"\xff" * 16,
        "deep.gz": gzip.compress(gzip.compress(gzip.compress(gzip.compress(gzip.compress(gzip.compress(bomb)))))),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        (finding,) = scanner.scan_file(tmp_path / name, name)
        assert (finding.rule, finding.is_warning) == (UNREADABLE, False), name
    (tmp_path / "link").symlink_to("/etc/hostname")
    (finding,) = scanner.scan_file(tmp_path / "link", "link")
    assert finding.rule == UNREADABLE


def test_growth_of_all_files_together_is_limited(
    scanner: Scanner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_texts, "_MIN_UNPACKED_BYTES", 100_000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * 10**6))
    many = tmp_path / "many.tar.gz"
    many.write_bytes(tar_of({str(number): b"" for number in range(40)}, "w:gz"))
    stream = zlib.compress(b"(text) Tj " * 20_000)
    (tmp_path / "bomb.pdf").write_bytes(b"%PDF-1.4\nstream\n" + stream + b"\nendstream\n%%EOF\n")
    for name in ("bomb.gz", "bomb.pdf", "many.tar.gz"):
        (finding,) = scanner.scan_file(tmp_path / name, name)
        assert (finding.rule, "unpack to more than" in finding.excerpt) == (UNREADABLE, True), name
        (tmp_path / name).unlink()
    with pytest.raises(file_texts.Unreadable):
        many.write_bytes(tar_of({str(number): b"" for number in range(40)}, "w:gz"))
        file_texts.tar_members(many)
    many.unlink()
    for number in range(3):
        (tmp_path / f"{number}.gz").write_bytes(gzip.compress(b"a" * 40_000))
    (finding,) = scanner.scan(tmp_path)
    assert (finding.file, finding.rule) == ("2.gz", UNREADABLE)


def test_hostile_pdf_is_read_in_linear_time() -> None:
    """Each of these takes hours if a pattern tries all ways to match it."""
    for content in (b"stream\n" * 100_000, b"[" + b"1 " * 100_000, b"(" * 100_000, b"[(" + b"\\a" * 100_000):
        raw = b"%PDF-1.4\n" + content + b"\nstream\n" + content + b"\nendstream"
        assert list(file_texts.pdf_texts(raw, file_texts.Budget(len(raw))))


def test_many_findings_are_counted(scanner: Scanner, tmp_path: Path) -> None:
    lines = "".join(f"{number} {HOMES}/grace/{number}\n" for number in range(100))
    findings = scan_text(scanner, tmp_path, lines)
    assert len(findings) == 20
    assert findings[-1].excerpt == "and 81 more in this file"
    (tmp_path / "bundle" / "mail").write_text("grace@navy.mil")
    everything = scanner.scan(tmp_path / "bundle")
    assert [finding.file for finding in everything if finding.is_warning] == ["mail"]
    require_clean([finding for finding in everything if finding.is_warning], tmp_path)
    with pytest.raises(DataError, match=r"(?s)found 20 secrets or private paths.*notes.txt:1: home folder: 0 ~/0"):
        require_clean(everything, tmp_path)


def test_files_of_a_run_have_no_findings(shared_dir: Path, scanner: Scanner) -> None:
    run = shared_dir / "compat" / "run"
    paths = [path for path in run.rglob("*") if path.is_file()]
    assert len(paths) > 10
    assert [str(finding) for path in paths for finding in scanner.scan_file(path, path.name)] == []
