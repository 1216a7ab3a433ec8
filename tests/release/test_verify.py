"""Verification of bundles: tampering, claims without files, hostile names, signatures."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.release import file_texts, secret_rules
from open_lm.release.command import main
from open_lm.release.component_checks import Bundle
from open_lm.release.components import COMPONENTS, RESEARCH_PAPER, TECHNICAL_REPORT
from open_lm.release.documents import MIN_PAPER_WORDS, document_problem
from open_lm.release.layout import LICENSES, MANIFEST, MOF_FILE, SIGNATURE
from open_lm.release.manifest import hash_files, is_inside, read_manifest, write_manifest
from open_lm.release.mof_file import Entry, GlobalLicense, Release, read_mof, write_mof
from open_lm.release.signing import Identity, check_private_key, sign_bundle, verify_signature
from open_lm.release.verify import NOT_CHECKED, OK, Verification, judge, verify_bundle

pytest.importorskip("model_signing")
SENTENCE = "The model is a small transformer that was trained on tokens of public text for two steps. "
LICENSE_TEXTS = {
    "MIT": "MIT License. Permission is hereby granted, free of charge, to any person obtaining a copy. " * 3,
    "CC-BY-4.0": "Creative Commons Attribution 4.0 International Public License. You may share the material. " * 3,
}


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def code_archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"open_lm-1/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_weights(path: Path, value: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"output.weight": np.full((4, 4), value, np.float32)}, path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the key pairs own.pem, own.pub and other.pem, other.pub, and further keys."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    folder = tmp_path_factory.mktemp("keys")
    private = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("own", "other")}
    for name, key in {**private, "rsa": rsa.generate_private_key(65537, 1024), "k1": _odd_curve()}.items():
        write(folder / f"{name}.pem", _pem(key, serialization.NoEncryption()))
        public = key.public_key()
        write(
            folder / f"{name}.pub",
            public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        )
    write(folder / "encrypted.pem", _pem(private["own"], serialization.BestAvailableEncryption(b"open sesame")))
    return folder


def _odd_curve() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256K1())


def _pem(key: Any, encryption: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """Return a signed bundle with all components."""
    folder = tmp_path_factory.mktemp("release") / "bundle"
    for document in ("README.md", "DATA_CARD.md", "report/technical_report.md"):
        write(folder / document, f"# Document\n\n{SENTENCE * 5}\n")
    write(folder / "paper" / "paper.md", f"# Paper\n\n{SENTENCE * 10}\n")
    write_weights(folder / "weights" / "final" / "model.safetensors", 1.0)
    write_weights(folder / "weights" / "intermediate" / "step_00000001" / "model.safetensors", 2.0)
    places = {"Model architecture": ["model"], "Training code": ["train.py"], "Inference code": ["generate.py"],
              "Evaluation code": ["eval"], "Data preprocessing code": ["datapreprocess"]}  # fmt: skip
    members = {"model/layers.py": b"1", "train.py": b"2", "generate.py": b"3", "eval/tasks.py": b"4",
               "datapreprocess/engine.py": b"5", "model/__init__.py": b""}  # fmt: skip
    write(folder / "code" / "source.tar.gz", code_archive(members))
    write(folder / "code" / "contents.json", json.dumps({"top_folder": "open_lm-1", "components": places}))
    write(folder / "evaluation" / "results" / "results.jsonl", '[{"loss": 4.5}]\n')
    write(folder / "evaluation" / "data" / "qa.jsonl", '{"query": "1 + 1", "gold": 0}\n')
    write(folder / "samples" / "samples.jsonl", '{"prompt": "a", "text": "b"}\n')
    write(folder / "data" / "data.json", '{"sources": [{"tokens": 100}]}\n')
    write(folder / "metadata" / "params.txt", "lr: 0.001\n")
    write(folder / "libraries" / "requirements.txt", "torch==2.13.0\n")
    for name, text in LICENSE_TEXTS.items():
        write(folder / LICENSES / f"{name}.txt", text)
    licenses = {
        scope: GlobalLicense(name, f"{LICENSES}/{name}.txt")
        for scope, name in {"code": "MIT", "data": "CC-BY-4.0", "document": "CC-BY-4.0"}.items()
    }
    entries = [Entry(name, component_path=item.path) for name, item in COMPONENTS.items()]
    write_mof(folder / MOF_FILE, Release("tiny", "lab", entries, licenses))
    write_manifest(folder)
    sign_bundle(folder, keys / "own.pem")
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def check(verification: Verification, name: str) -> list[str]:
    """Return the problems of a check."""
    return list(next(item.problems for item in verification.checks if item.name == name))


def update(bundle: Path) -> None:
    """Write the manifest of a changed bundle, and remove its signature, which no longer fits."""
    write_manifest(bundle)
    (bundle / SIGNATURE).unlink(missing_ok=True)


def rebuild(bundle: Path, change: Callable[[Release], Release]) -> Verification:
    """Change mof.yml, write the manifest again, and verify."""
    write_mof(bundle / MOF_FILE, change(read_mof(bundle / MOF_FILE)))
    update(bundle)
    return verify_bundle(bundle)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ whole bundles
def test_unchanged_bundle_is_verified(bundle: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--verify", str(bundle), "--public-key", str(keys / "own.pub")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        [name, OK] for name in ("files", "signature", "components", "licenses", "secrets")
    ]
    assert lines[-2:] == ["claimed   Class I (Open Science Model)", "verified  Class I (Open Science Model)"]


def test_without_a_key_the_signature_is_not_checked(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--verify", str(bundle), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["is_verified"] is True
    assert {item["name"]: item["status"] for item in printed["checks"]}["signature"] == NOT_CHECKED
    assert printed["claimed"]["class"] == printed["verified"]["class"] == 1
    (bundle / SIGNATURE).unlink()
    main(["--verify", str(bundle)])
    assert "the bundle is not signed" in capsys.readouterr().out


def test_moved_bundle_and_files_of_the_hub(bundle: Path, keys: Path) -> None:
    """A copy under another name, with files that the hub and version control add, is the same bundle."""
    write(bundle / ".gitattributes", "*.safetensors filter=lfs\n")
    write(bundle / ".git" / "config", "[core]\n")
    write(bundle / ".cache" / "huggingface" / "x", "y")
    moved = bundle.rename(bundle.with_name("other name"))
    assert verify_bundle(moved, keys / "own.pub").failed == []


def test_model_signing_accepts_the_signature(bundle: Path, keys: Path) -> None:
    """With its defaults, as its command does."""
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys / "own.pub")
    config.verify(bundle, bundle / SIGNATURE)
    flip_bit(bundle / "README.md")
    with pytest.raises(ValueError, match=r"README\.md"):
        config.verify(bundle, bundle / SIGNATURE)


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in the weights": (
        lambda bundle: flip_bit(bundle / "weights/final/model.safetensors"),
        "weights/final/model.safetensors",
    ),
    "flipped bit in a card": (lambda bundle: flip_bit(bundle / "DATA_CARD.md"), "DATA_CARD.md"),
    "flipped bit in a license": (lambda bundle: flip_bit(bundle / "LICENSES/MIT.txt"), "LICENSES/MIT.txt"),
    "added file": (lambda bundle: write(bundle / "weights/final/extra.py", "import os"), "weights/final/extra.py"),
    "added hidden file": (lambda bundle: write(bundle / ".gitignore", "*"), ".gitignore"),
    "removed file": (lambda bundle: (bundle / "metadata/params.txt").unlink(), "metadata/params.txt"),
    "emptied file": (lambda bundle: write(bundle / "samples/samples.jsonl", ""), "samples/samples.jsonl"),
    "renamed file": (lambda bundle: (bundle / "README.md").rename(bundle / "READ.md"), "READ.md"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_fails_with_the_name_of_the_file(
    kind: str, bundle: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, name = TAMPERING[kind]
    change(bundle)
    with pytest.raises(DataError, match="the verification failed: files, signature"):
        main(["--verify", str(bundle), "--public-key", str(keys / "own.pub")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"error: files: {name}: ") for line in lines)
    assert any(line.startswith("error: signature: the files differ") and name in line for line in lines)
    assert lines[-1] == "verified  no class: the files are not those of the manifest or the signature"


def test_changed_manifest(bundle: Path, keys: Path) -> None:
    """Changing a file together with its checksum is found by the signature."""
    write(bundle / "README.md", SENTENCE * 6)
    write_manifest(bundle)
    without_key, with_key = verify_bundle(bundle), verify_bundle(bundle, keys / "own.pub")
    for verification in (without_key, with_key):
        assert verification.failed == ["signature"]
        (problem,) = check(verification, "signature")
        assert "README.md" in problem
        assert MANIFEST in problem
    (bundle / MANIFEST).unlink()
    assert verify_bundle(bundle).failed == ["files", "signature"]


def test_without_a_key_an_exchanged_signature_is_found_and_a_forged_one_is_not(bundle: Path, keys: Path) -> None:
    write(bundle / "README.md", SENTENCE * 6)
    write_manifest(bundle)
    sign_bundle(bundle, keys / "other.pem")
    assert verify_bundle(bundle).failed == []
    assert verify_bundle(bundle, keys / "own.pub").failed == ["signature"]
    write(bundle / SIGNATURE, "{}")
    assert verify_bundle(bundle).failed == ["signature"]


def test_replaced_signature(bundle: Path, keys: Path) -> None:
    def problem() -> str:
        (found,) = check(verify_bundle(bundle, keys / "own.pub"), "signature")
        return found

    signed = (bundle / SIGNATURE).read_bytes()
    sign_bundle(bundle, keys / "other.pem")
    assert problem() == f"{SIGNATURE} was made with another key than that of the given public key"
    forged = json.loads((bundle / SIGNATURE).read_bytes())
    forged["verificationMaterial"] = json.loads(signed)["verificationMaterial"]
    (bundle / SIGNATURE).write_text(json.dumps(forged))
    assert "not made with the private key of this public key" in problem()
    for content in (b"", b"{}", b"[]", b'{"dsseEnvelope": {"payload": "e30="}}', b"\xff", b"[" * 100_000):
        (bundle / SIGNATURE).write_bytes(content)
        assert "is not a signature of model-signing" in problem()
    (bundle / SIGNATURE).unlink()
    assert problem() == f"{SIGNATURE} is missing: the bundle is not signed"
    (bundle / SIGNATURE).symlink_to("/etc/hostname")
    assert "signature" in verify_bundle(bundle).failed
    assert problem() == f"{SIGNATURE} is missing: the bundle is not signed"


def test_signature_that_covers_only_some_files(bundle: Path, keys: Path) -> None:
    from model_signing import hashing, signing

    partial = hashing.Config().set_ignored_paths(paths=[SIGNATURE, "weights"], ignore_git_paths=False)
    config = signing.Config().set_hashing_config(partial)
    config.use_elliptic_key_signer(private_key=keys / "own.pem").sign(bundle, bundle / SIGNATURE)
    (problem,) = check(verify_bundle(bundle, keys / "own.pub"), "signature")
    assert problem == f"{SIGNATURE} does not cover weights"


def test_secret_in_a_verified_file(bundle: Path) -> None:
    write(bundle / "metadata" / "out.log", "token hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gH3j\n")
    update(bundle)
    verification = verify_bundle(bundle)
    assert verification.failed == ["secrets"]
    assert check(verification, "secrets") == ["metadata/out.log:1: Hugging Face token: token ***"]


# ------------------------------------------------------------------------------------------------ claims
def empty_folder(bundle: Path) -> None:
    shutil.rmtree(bundle / "weights" / "intermediate")
    write(bundle / "weights" / "intermediate" / ".gitkeep", "")


def cut_weights(bundle: Path) -> None:
    path = bundle / "weights" / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def copied_weights(bundle: Path) -> None:
    target = bundle / "weights" / "intermediate" / "step_00000001" / "model.safetensors"
    shutil.copy(bundle / "weights" / "final" / "model.safetensors", target)


CLAIMS: dict[str, tuple[str, Callable[[Path], object], str, int]] = {
    "missing weights": (
        "Model parameters (Final)", lambda bundle: shutil.rmtree(bundle / "weights/final"), "missing: weights/final", 0,
    ),
    "cut weights": ("Model parameters (Final)", cut_weights, "is cut or damaged", 0),
    "weights in another format": (
        "Model parameters (Final)",
        lambda bundle: (bundle / "weights/final/model.safetensors").rename(bundle / "weights/final/model.bin"),
        "found no safetensors file", 0,
    ),
    "missing part of the weights": (
        "Model parameters (Final)",
        lambda bundle: write(
            bundle / "weights/final/model.safetensors.index.json", '{"weight_map": {"a": "model-00002.safetensors"}}'
        ),
        "names model-00002.safetensors, which is missing", 0,
    ),
    "empty folder": ("Model parameters (Intermediate)", empty_folder, "weights/intermediate is empty", 2),
    "final weights as intermediate ones": (
        "Model parameters (Intermediate)", copied_weights, "has the final weights only", 2,
    ),
    "empty card": ("Data card", lambda bundle: write(bundle / "DATA_CARD.md", " \n"), "DATA_CARD.md is empty", 0),
    "placeholder card": (
        "Model card",
        lambda bundle: write(bundle / "README.md", "# Model card\n\nTODO: describe the model.\n\n" * 20),
        "is a placeholder", 0,
    ),
    "results without numbers": (
        "Evaluation results", lambda bundle: write(bundle / "evaluation/results/results.jsonl", '{"loss": "?"}\n'),
        "has no results", 0,
    ),
    "empty results": (
        "Evaluation results", lambda bundle: write(bundle / "evaluation/results/results.jsonl", "[]\n"), "is empty", 0,
    ),
    "archive without the code": (
        "Data preprocessing code",
        lambda bundle: write(bundle / "code/source.tar.gz", code_archive(
            {"model/a.py": b"1", "train.py": b"2", "generate.py": b"3", "eval/a.py": b"4", "datapreprocess/a.py": b""}
        )),
        "code/source.tar.gz has no source code at open_lm-1/datapreprocess", 2,
    ),
    "samples to come": (
        "Sample model outputs",
        lambda bundle: (shutil.rmtree(bundle / "samples"), write(bundle / "samples/README.md", "Coming soon")),
        "is a placeholder", 1,
    ),
    "placeholder paper": (
        RESEARCH_PAPER, lambda bundle: write(bundle / "paper/paper.md", "# Paper\n\nThe paper goes here.\n"),
        "is a placeholder", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_claim_without_content_is_an_error(kind: str, bundle: Path) -> None:
    name, change, message, level = CLAIMS[kind]
    change(bundle)
    update(bundle)
    verification = verify_bundle(bundle)
    assert verification.failed == ["components"]
    (problem,) = check(verification, "components")
    assert problem.startswith(f"{name}: ")
    assert message in problem
    assert verification.claimed is not None
    assert verification.verified is not None
    assert (verification.claimed.level, verification.verified.level) == (1, level)


def test_verdict_names_what_is_missing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(bundle / "paper")
    update(bundle)
    with pytest.raises(DataError, match="the verification failed: components"):
        main(["--verify", str(bundle)])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "claimed   Class I (Open Science Model)",
        "verified  Class II (Open Tooling Model)",
        "          without Research paper",
    ]


def test_paper_serves_as_report_only_if_it_is_there(bundle: Path) -> None:
    def without_report(release: Release) -> Release:
        return replace(release, entries=[entry for entry in release.entries if entry.name != TECHNICAL_REPORT])

    complete = rebuild(bundle, without_report)
    assert complete.failed == []
    assert complete.verified is not None
    assert complete.verified.level == 1
    write(bundle / "paper" / "paper.md", "% to be written\n")
    placeholder = rebuild(bundle, without_report)
    assert placeholder.verified is not None
    assert placeholder.verified.level == 0


def with_path(name: str, path: str | None) -> Callable[[Release], Release]:
    def change(release: Release) -> Release:
        entries = [replace(entry, component_path=path) if entry.name == name else entry for entry in release.entries]
        return replace(release, entries=entries)

    return change


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../copy/data", "is outside the bundle"),
        ("/etc", "is outside the bundle"),
        ("data/../../x", "is outside the bundle"),
        ("https://example.com/data", "is only linked, at https://example.com/data"),
        ("nothing", "missing: nothing"),
        (None, "mof.yml gives no component_path"),
    ],
)
def test_paths_of_components(path: str | None, message: str, bundle: Path) -> None:
    verification = rebuild(bundle, with_path("Datasets", path))
    (problem,) = check(verification, "components")
    assert problem.startswith("Datasets: ")
    assert message in problem


def test_texts_of_licenses(bundle: Path) -> None:
    (bundle / LICENSES / "MIT.txt").unlink()
    write(bundle / LICENSES / "CC-BY-4.0.txt", LICENSE_TEXTS["MIT"])
    update(bundle)
    verification = verify_bundle(bundle)
    problems = check(verification, "licenses")
    assert len(problems) == 17
    assert "Training code: the text of MIT is missing: LICENSES/MIT.txt" in problems
    assert "Datasets: LICENSES/CC-BY-4.0.txt does not hold the text of CC-BY-4.0" in problems
    assert verification.verified is not None
    assert verification.verified.level == 0
    outside = GlobalLicense("MIT", "../MIT.txt")
    changed = rebuild(bundle, lambda release: replace(release, licenses={"distribution": outside}))
    assert "the text of MIT at '../MIT.txt' is outside the bundle" in check(changed, "licenses")[0]


def test_missing_description_fails(bundle: Path) -> None:
    write(bundle / MOF_FILE, "release: {}\n")
    update(bundle)
    verification = verify_bundle(bundle)
    assert verification.failed == [MOF_FILE]
    assert verification.verified is None
    shutil.move(bundle / MOF_FILE, bundle.parent / MOF_FILE)
    (bundle / MOF_FILE).symlink_to(bundle.parent / MOF_FILE)
    assert check(verify_bundle(bundle), MOF_FILE)[0].endswith("missing; expected the description of the release")
    with pytest.raises(DataError, match="expected the local folder of a bundle"):
        verify_bundle(bundle / "nothing")


# ------------------------------------------------------------------------------------------------ names and links
def test_links_and_special_files(bundle: Path, keys: Path) -> None:
    (bundle / "samples" / "host").symlink_to("/etc/hostname")
    (bundle / "more").symlink_to(bundle / "data")
    os.mkfifo(bundle / "pipe")
    verification = verify_bundle(bundle, keys / "own.pub")
    problems = check(verification, "files")
    assert [problem.split(": ")[0] for problem in problems] == ["'more'", "'pipe'", "'samples/host'"]
    assert "is a symbolic link" in problems[0]
    assert "is no regular file" in problems[1]
    assert "signature" in verification.failed
    with pytest.raises(DataError, match=r"cannot be released \(3\)"):
        write_manifest(bundle)
    with pytest.raises(DataError, match="cannot be signed"):
        sign_bundle(bundle, keys / "own.pem")


def test_component_behind_a_link_does_not_count(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "data", tmp_path / "data")
    (bundle / "data").symlink_to(tmp_path / "data")
    verdict = judge(Bundle(bundle, hash_files(bundle, [])), read_mof(bundle / MOF_FILE))
    assert verdict.components == {"Datasets": "missing: data"}


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"a\nb.txt", b"a\\b.txt"])
def test_names_that_copies_would_change(name: bytes, bundle: Path) -> None:
    write(bundle / os.fsdecode(name), "text")
    (problem,) = [line for line in check(verify_bundle(bundle), "files") if "rename it" in line]
    problem.encode()  # the name is printable
    with pytest.raises(DataError, match="rename it"):
        write_manifest(bundle)


def test_names_in_utf_8(bundle: Path, keys: Path) -> None:
    write(bundle / "samples" / "größe 模型.txt", "text")
    write_manifest(bundle)
    sign_bundle(bundle, keys / "own.pem")
    assert verify_bundle(bundle, keys / "own.pub").failed == []
    flip_bit(bundle / "samples" / "größe 模型.txt")
    assert any("größe 模型.txt" in problem for problem in check(verify_bundle(bundle), "files"))


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "", "C:/x", "a\\b", "a\nb", MANIFEST, SIGNATURE, "a/", 5]
)
def test_manifest_with_paths_outside_the_bundle(path: Any, bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    content["files"][0]["path"] = path
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"entry 1: .* is not the path of a file inside the bundle"):
        read_manifest(bundle)
    assert check(verify_bundle(bundle), "files")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a manifest with the schema"),
        ('{"schema": "open_lm.bundle_manifest/1"}', "expected a manifest with the schema"),
        ('{"schema": "open_lm.bundle_manifest/1", "files": [5]}', "entry 1: None is not the path"),
        ('{"schema": "open_lm.bundle_manifest/1", "files": [{"path": "a", "bytes": -1, "sha256": "00"}]}', "no valid"),
        ('{"schema": "open_lm.bundle_manifest/1", "files": [{"path": "a", "bytes": 1, "sha256": "XY"}]}', "64 hexa"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_manifest(content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / MANIFEST, content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)


def test_manifest_lists_all_files(original: Path) -> None:
    content = json.loads((original / MANIFEST).read_text())
    paths = [item["path"] for item in content["files"]]
    on_disk = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    assert set(paths) == on_disk - {MANIFEST, SIGNATURE}
    assert paths == sorted(paths)
    assert (content["num_files"], content["num_bytes"]) == (len(paths), sum(item["bytes"] for item in content["files"]))
    assert is_inside("a/b.txt")


# ------------------------------------------------------------------------------------------------ keys
def test_keys(keys: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in {
        "rsa.pem": "kind RSAPrivateKey, expected the elliptic curve secp256r1",
        "k1.pem": "kind secp256k1, expected the elliptic curve",
        "own.pub": "is not a readable PEM private key",
        "none.pem": "cannot read",
        "encrypted.pem": "is encrypted; set OPEN_LM_SIGNING_PASSWORD",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_private_key(keys / name)
    for name, message in {"rsa.pub": "kind _?RSAPublicKey", "own.pem": "not a readable PEM public key"}.items():
        with pytest.raises(ConfigError, match=message):
            verify_bundle(bundle, keys / name)
    monkeypatch.setenv("OPEN_LM_SIGNING_PASSWORD", "open sesame")
    for name in ("encrypted.pem", "own.pem"):  # the password is only used for an encrypted key
        sign_bundle(bundle, keys / name)
        verify_signature(bundle, keys / "own.pub")
    monkeypatch.setenv("OPEN_LM_SIGNING_PASSWORD", "wrong")
    with pytest.raises(ConfigError, match="is not a readable PEM private key"):
        check_private_key(keys / "encrypted.pem")


def test_sigstore_states_that_it_needs_the_network(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HOME", str(bundle.parent))  # without a cache of sigstore's keys
    signature = (bundle / SIGNATURE).read_bytes()
    with pytest.raises(StorageError, match=r"--sigstore: sigstore failed .* needs the network"):
        sign_bundle(bundle, None)
    assert (bundle / SIGNATURE).read_bytes() == signature
    with pytest.raises(StorageError, match=r"--identity: sigstore failed .* needs the network"):
        verify_bundle(bundle, Identity("ada@example.com", "https://accounts.example.com"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify", "b", "--identity", "a@b.c"], "together with --oidc-issuer"),
        (
            ["--verify", "b", "--identity", "a", "--oidc-issuer", "u", "--public-key", "k"],
            "expected --public-key FILE, or",
        ),
        (["--verify", "b", "--rate", "f"], "found --rate and --verify"),
        (["--verify", "b", "--redact"], "--verify: --redact has no effect here"),
        (["--rate", "f", "--public-key", "k"], "--rate: --public-key has no effect here"),
    ],
)
def test_flags_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(words)


# ------------------------------------------------------------------------------------------------ strangers
def test_verdict_does_not_depend_on_the_machine(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of a bundle may be the name of the user or host who verifies it, or a value of his environment."""
    copy = tmp_path / "a copy"
    shutil.copytree(original, copy)
    monkeypatch.setattr(secret_rules, "user_name", lambda: "lr")
    monkeypatch.setattr("socket.gethostname", lambda: "tokens")
    monkeypatch.setenv("SECRET_TOKEN", '"tokens": 100')
    monkeypatch.chdir(copy)
    assert verify_bundle(Path()).failed == []


def test_archives_of_code_have_limits(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_texts, "_MIN_UNPACKED_BYTES", 10**6)
    write(bundle / "code" / "source.tar.gz", code_archive({"model/layers.py": b" " * 10**7}))
    write_manifest(bundle)
    (problem, *_) = check(verify_bundle(bundle), "components")
    assert "unpack to more than" in problem


def test_hostile_texts_are_printed_without_control_characters(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(bundle / "evaluation" / "results" / "results.jsonl", "[" * 900 + "]" * 900)
    rebuild(bundle, lambda release: replace(release, name="tiny\x1b[2J"))
    with pytest.raises(DataError, match="verification failed"):
        main(["--verify", str(bundle)])
    main(["--rate", str(bundle / MOF_FILE)])
    output = capsys.readouterr().out
    assert "has no results: found no number" in output
    assert "tiny?[2J" in output and "\x1b" not in output


# ------------------------------------------------------------------------------------------------ documents
def pdf(text: str) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    document = fpdf.FPDF()
    document.add_page()
    document.set_font("helvetica", size=9)
    document.multi_cell(0, 5, text)
    return bytes(document.output())


def test_documents_and_placeholders(tmp_path: Path) -> None:
    template = (
        "\\documentclass{article}\n\\title{Your title}\n\\begin{document}\n\\section{Introduction}\n"
        "Lorem ipsum dolor sit amet.\n% " + SENTENCE * 20 + "\n\\end{document}\n"
    )
    cases: dict[str, tuple[str | bytes, str | None]] = {
        "paper.md": (SENTENCE * 10, None),
        "mention.md": (SENTENCE * 10 + "Placeholder tokens are still to be added here.", None),
        "paper.tex": ("\\section{Introduction}\n" + SENTENCE * 10, None),
        "paper.pdf": (pdf(SENTENCE * 10), None),
        "short.md": (SENTENCE, "is a placeholder: found 16 words"),
        "todo.md": ("TODO. " * 200, "is a placeholder: found 0 words, and text such as 'TODO.'"),
        "comment.md": (f"# Paper\n<!-- {SENTENCE * 20} -->", "is a placeholder"),
        "template.tex": (template, "is a placeholder"),
        "short.pdf": (pdf("The paper goes here"), "is a placeholder"),
        "cut.pdf": (pdf(SENTENCE * 10)[:-30], "is not a complete PDF file"),
        "renamed.pdf": (SENTENCE * 10, "is not a complete PDF file"),
        "empty.md": ("\n", "is empty"),
        "binary.md": (b"\xff\xfe\x00", "is not UTF-8 text"),
    }
    for name, (content, expected) in cases.items():
        write(tmp_path / name, content)
        problem = document_problem(tmp_path / name, MIN_PAPER_WORDS)
        assert (problem is None) == (expected is None), (name, problem)
        assert expected is None or expected in str(problem)
