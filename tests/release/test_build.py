"""Bundles of a real run: contents, ratings, resumption, privacy, upload and reproduction."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from release_helpers import SEQ_LEN, make_run, private_text, write_paper

from open_lm import storage
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.release import build, code_archive, components, layout
from open_lm.release.build import Outcome, build_bundle
from open_lm.release.documents import document_problem
from open_lm.release.manifest import write_manifest
from open_lm.release.mof_file import read_mof
from open_lm.release.settings import BundleSettings
from open_lm.release.upload import upload_bundle
from open_lm.release.verify import verify_bundle
from open_lm.release.weights import sha256_of

LICENSES = {"distribution": "Apache-2.0", "data": "CC0-1.0", "document": "CC-BY-4.0"}


def settings(run: Path, out: Path, **more: object) -> BundleSettings:
    values = {"licenses": LICENSES, "producer": "ACME Lab", "redact": True, **more}
    return BundleSettings(run=str(run), out=out, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def built(run: Path) -> tuple[Path, Outcome]:
    """Build a bundle with a paper."""
    out = run.parents[1] / "bundle"
    return out, build_bundle(settings(run, out, paper=write_paper(run.parents[1] / "paper.md")))


@pytest.fixture
def bundle(built: tuple[Path, Outcome]) -> Path:
    return built[0]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ contents
def test_bundle_claims_all_components_and_each_has_files(built: tuple[Path, Outcome]) -> None:
    bundle, outcome = built
    release = read_mof(bundle / layout.MOF_FILE)
    assert {entry.name for entry in release.entries} == set(components.COMPONENTS)
    assert outcome.missing == {}
    for entry in release.entries:
        place = bundle / str(entry.component_path)
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        assert files and all(path.stat().st_size for path in files), entry.name
        assert entry.license_path is None or (bundle / entry.license_path).stat().st_size
    verification = verify_bundle(bundle)
    assert verification.failed == []
    assert verification.claimed is not None and verification.verified is not None
    assert verification.claimed.level == verification.verified.level == 1


def test_flipped_bit_fails_the_verification(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    weights = copy / "weights/final/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert verify_bundle(copy).failed == ["files"]


def test_weights_of_all_checkpoints_load_with_transformers(bundle: Path, run: Path) -> None:
    from safetensors.torch import load_file

    from open_lm.checkpoint.files import read_model_state

    places = {"weights/final": "epoch_2.pt", "weights/intermediate/step_00000003": "epoch_1.pt"}
    for place, checkpoint in places.items():
        exported = load_file(bundle / place / "model.safetensors")
        native = read_model_state(str(run / "checkpoints" / checkpoint))[0]
        expected = native["tok_embeddings.weight"]
        assert any(tensor.shape == expected.shape and tensor.equal(expected) for tensor in exported.values()), place
    assert sorted(path.name for path in (bundle / "weights/intermediate").iterdir()) == ["step_00000003"]
    moments = load_file(bundle / "metadata/optimizer/optimizer.safetensors")
    assert moments["tok_embeddings.weight/exp_avg"].abs().sum() > 0
    assert moments["tok_embeddings.weight/step"].item() == 6


def test_archive_has_the_code_of_every_component_with_its_license(bundle: Path) -> None:
    contents = json.loads((bundle / layout.ARCHIVE_CONTENTS).read_text())
    assert contents["sha256"] == sha256_of(bundle / layout.ARCHIVE)
    with tarfile.open(bundle / layout.ARCHIVE) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert {member.mtime for member in archive.getmembers()} == {0}
        license_text = archive.extractfile(f"{contents['top_folder']}/LICENSE").read()  # type: ignore[union-attr]
    assert license_text == (bundle / "code/LICENSE").read_bytes()
    assert {"open_lm/main.py", "open_lm/model/transformer.py", "open_lm/datapreprocess/make_2048.py"} <= names
    for places in contents["components"].values():
        assert all(any(name.startswith(place) for name in names) for place in places)


def test_code_of_a_checkout_has_its_commit_and_no_tests(tmp_path: Path) -> None:
    source = code_archive.find_source(tmp_path)
    if source.commit is None:
        pytest.skip("the package does not run from a checkout under version control")
    assert re.fullmatch("[0-9a-f]{40}", source.commit)
    assert {"open_lm/main.py", "datapreprocess/make_2048.py", "model_configs/open_lm_11m.json"} <= set(source.files)
    assert not any(name.startswith("tests/") for name in source.files)


def test_installed_package_is_archived_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "open_lm"
    for places in code_archive.MEMBERS.values():
        place = next(place for place in places if place.startswith("open_lm/"))
        file = package.parent / place if place.endswith(".py") else package.parent / place / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (package / "model" / "__pycache__").mkdir()
    (package / "model" / "__pycache__" / "x.pyc").write_bytes(b"x")
    monkeypatch.setattr(code_archive, "PACKAGE", package)
    monkeypatch.setattr(code_archive, "_license_file", lambda: Path(__file__))  # of the installed distribution
    source = code_archive.find_source(tmp_path / "run")
    assert source.commit is None and source.root == package.parent
    first = code_archive.write_archive(source, tmp_path / "a")
    assert first["sha256"] == code_archive.write_archive(source, tmp_path / "b")["sha256"]
    with tarfile.open(tmp_path / "a" / layout.ARCHIVE) as archive:
        assert not any("__pycache__" in name for name in archive.getnames())
    shutil.rmtree(package / "generate")
    shutil.rmtree(package / "hf", ignore_errors=True)
    with pytest.raises(ConfigError, match="Inference code: none of open_lm/generate, open_lm/hf"):
        code_archive.write_archive(code_archive.find_source(tmp_path / "run"), tmp_path / "c")


def test_model_card_has_metadata_that_the_hub_reads(bundle: Path, run: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(bundle / layout.MODEL_CARD)
    results = {(item.dataset_name, item.metric_type): item.metric_value for item in card.data.eval_results}
    validation = json.loads((run / "checkpoints/results.jsonl").read_text().splitlines()[-1])[0]
    assert validation["loss"] in results.values()
    assert any(name == "lists" for name, _ in results)
    assert card.data.license == "cc0-1.0" and card.data.pipeline_tag == "text-generation"
    for title in ("Intended use", "Limits", "Environmental figures", "Training", "Evaluation"):
        assert f"## {title}\n" in card.text
    assert "kWh" in card.text


def test_report_is_markdown_with_charts_and_a_pdf(bundle: Path) -> None:
    report = (bundle / layout.REPORT_MARKDOWN).read_text()
    for name in ("loss", "validation_loss", "learning_rate"):
        assert f"({name}.svg)" in report
        svg = (bundle / layout.REPORT / f"{name}.svg").read_text()
        assert svg.startswith("<svg") and "<polyline" in svg
    assert document_problem(bundle / layout.REPORT_PDF, min_words=100) is None


def test_bill_of_materials_has_packages_model_and_data(bundle: Path) -> None:
    bill = json.loads((bundle / layout.BILL).read_text())
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"][0]["content"] == sha256_of(bundle / "weights/final/model.safetensors")
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "data/01"}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {item["type"] for item in metrics} > {"loss"}
    by_name = {item["name"]: item for item in bill["components"]}
    import torch

    assert by_name["torch"]["version"] == torch.__version__ and by_name["torch"]["purl"].startswith("pkg:pypi/torch@")
    assert f"torch=={torch.__version__}\n" in (bundle / layout.REQUIREMENTS).read_text()


def test_croissant_yields_the_shards_with_their_checksums(bundle: Path) -> None:
    import mlcroissant

    data = mlcroissant.Dataset(jsonld=str(bundle / layout.CROISSANT))
    records = list(data.records("shards-01"))
    lines = [json.loads(line) for line in (bundle / "data/01/manifest.jsonl").read_text().splitlines()]
    assert [record["shards-01/sha256"].decode() for record in records] == [line["sha256"] for line in lines]
    assert sum(record["shards-01/num_sequences"] for record in records) == sum(line["num_sequences"] for line in lines)


def test_private_paths_are_nowhere_in_the_bundle(bundle: Path, run: Path) -> None:
    private = str(run.parents[1]).encode()
    assert private in (run / "params.txt").read_bytes()
    for path in bundle.rglob("*"):
        assert path.is_dir() or private not in path.read_bytes(), path
    assert "RUN/checkpoints" in (bundle / "metadata/params.txt").read_text()


# ----------------------------------------------------------------------------------------------- building, interrupted
def test_interrupted_build_continues_and_gives_the_same_bytes(
    run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.parents[1] / "again"
    request = settings(run, out, paper=run.parents[1] / "paper.md")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(build, "_write_metadata", stop)  # the weights are written before
        build_bundle(request)
    assert not out.exists()
    weights = Path(f"{out}.incomplete/bundle/weights/final/model.safetensors")
    (weights.parents[2] / "rest.txt").write_text("of an earlier attempt")
    before = weights.stat().st_ino
    build_bundle(request)
    assert (out / "weights/final/model.safetensors").stat().st_ino == before
    assert digests(out) == digests(bundle)
    with pytest.raises(ConfigError, match="exists already"):
        build_bundle(request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licenses": {"code": "MIT"}}, "would have no license; add --license ID"),
        ({"paper": "TODO.md"}, "placeholder"),
        ({"paper": "paper.docx"}, r"found \.docx, expected a file of the kinds"),
        ({"upload": "/somewhere"}, "expected hf://"),
        (
            {"licenses": {"distribution": "ODC-By-1.0"}},
            r"the text of ODC-By-1.0 is missing: pass it with --license-text",
        ),
        ({"licenses": {"distribution": "MIT"}, "producer": None}, "--producer is missing"),
        ({"run": "nowhere"}, "expected the folder of a run"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    if "paper" in change:
        change["paper"] = tmp_path / str(change["paper"])
        Path(str(change["paper"])).write_text("# Title\n\nThe paper is coming soon.\n")
    values = {"run": run, "out": tmp_path / "bundle", **change}
    with pytest.raises(ConfigError, match=message):
        build_bundle(settings(values.pop("run"), values.pop("out"), **values))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("bundle*"))


def test_unfinished_run_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "logs" / "tiny"
    shutil.copytree(run, copy)
    for name in ("epoch_2.pt", "optimizer_2.pt", "stats_2.pt"):
        (copy / "checkpoints" / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    with pytest.raises(ConfigError, match="has not finished: its newest checkpoint, step_00000003"):
        build_bundle(settings(copy, tmp_path / "bundle"))


# -------------------------------------------------------------------------------- a run with less, and with a secret
@pytest.fixture(scope="module")
def poor_run(run: Path) -> Path:
    """Copy the run without results, samples, its first checkpoint and the record of its data."""
    copy = run.parents[1] / "poor" / "tiny"
    shutil.copytree(run, copy)
    for name in ("samples.jsonl", "icl.jsonl", "checkpoints/results.jsonl", "data.json"):
        (copy / name).unlink()
    for path in (copy / "checkpoints").glob("*_1.pt"):
        path.unlink()
    shutil.rmtree(copy / "checkpoints" / "step_00000003")
    params = (copy / "params.txt").read_text().splitlines()
    empty = ("val_data:", "icl_yaml:")
    lines = [f"{line.partition(':')[0]}: None" if line.startswith(empty) else line for line in params]
    (copy / "params.txt").write_text("\n".join(lines) + "\n")
    shutil.rmtree(copy / "code")  # a small copy of the code, which is archived and scanned faster
    for places in code_archive.MEMBERS.values():
        place = copy / "code" / next(place for place in places if place.startswith("open_lm/"))
        file = place if place.suffix else place / "code.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("pass\n")
    return copy


def test_secrets_are_refused_or_redacted_and_what_a_run_lacks_is_not_claimed(
    poor_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    token = "hf_" + "AbCdEfGh0123456789"[::-1] * 2
    with open(poor_run / "out.log", "a") as log:
        log.write(f"login with {token}, keys in {private_text()}\n")
    with monkeypatch.context() as patches, pytest.raises(DataError, match=r"metadata/out\.log") as error:
        patches.setattr(build, "write_libraries", lambda context: None)  # to save time
        build_bundle(settings(poor_run, bundle, redact=False))
    assert token not in str(error.value) and not bundle.exists()
    outcome = build_bundle(settings(poor_run, bundle))
    log_text = (bundle / "metadata/out.log").read_text()
    assert "login with" in log_text and token not in log_text and private_text() not in log_text
    lacking = {
        components.SAMPLE_OUTPUTS, components.EVALUATION_RESULTS, components.EVALUATION_DATA, components.DATASETS,
        components.INTERMEDIATE_PARAMETERS, components.RESEARCH_PAPER,
    }  # fmt: skip
    assert set(outcome.missing) == lacking
    release = read_mof(bundle / layout.MOF_FILE)
    assert {entry.name for entry in release.entries} == set(components.COMPONENTS) - lacking
    assert any(layout.REPRODUCE in note and "data.json" in note for note in outcome.notes)
    assert not (bundle / layout.REPRODUCE).exists()
    card = (bundle / layout.MODEL_CARD).read_text()
    assert all(f"- {name}: " in card for name in lacking)
    assert "model-index" not in yaml.safe_load(card.split("---\n")[1])


# -------------------------------------------------------------------------------------------------------------- upload
@pytest.fixture(scope="module")
def small_bundle(built: tuple[Path, Outcome]) -> Path:
    """Return a folder with some files of the bundle, and their manifest."""
    folder = built[0].with_name("small")
    for name in ("README.md", "mof.yml", "weights/final/model.safetensors", "LICENSES/CC0-1.0.txt", "code/LICENSE",
                 "data/data.json", "metadata/params.txt"):  # fmt: skip
        storage.copy(built[0] / name, folder / name)
    write_manifest(folder)
    return folder


def test_upload_to_a_bucket_is_complete_and_resumes(
    small_bundle: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3_bucket}/release"
    copy, sent = storage.copy, []

    def fail_late(source: object, target: object) -> None:
        sent.append(str(target))
        if len(sent) == 5:
            raise StorageError("the connection is gone")
        copy(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "copy", fail_late)
    with pytest.raises(StorageError, match="the connection is gone"):
        upload_bundle(small_bundle, url)
    assert storage.info(f"{url}/{layout.MANIFEST}") is None
    upload_bundle(small_bundle, url)
    assert len(sent) == len(set(sent)) + 1  # only the failed file was sent twice
    files = {name.removeprefix(f"{url}/") for name in storage.list_files(url, recursive=True)}
    assert files == set(digests(small_bundle))
    assert storage.read_bytes(f"{url}/mof.yml") == (small_bundle / "mof.yml").read_bytes()
    storage.write_text(f"{url}/{layout.MANIFEST}", "{}")
    with pytest.raises(ConfigError, match="has another bundle"):
        upload_bundle(small_bundle, url)


def test_upload_to_the_hub_creates_a_repository_with_all_files(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(token="a-token") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        upload_bundle(small_bundle, "hf://acme/tiny")
        expected = {name: (small_bundle / name).read_bytes() for name in digests(small_bundle)}
        assert hub.files == {"acme/tiny": expected}
        monkeypatch.setenv("HF_TOKEN", "another-token")
        with pytest.raises(StorageError, match="refused the upload or cannot be reached") as error:
            upload_bundle(small_bundle, "hf://acme/tiny")
        assert "another-token" not in str(error.value)


@pytest.mark.parametrize("url", ["hf://name", "hf://a/b/c", "hf://a/b@", "file:///x", "bundle"])
def test_upload_refuses_other_targets(small_bundle: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--upload"):
        upload_bundle(small_bundle, url)


# -------------------------------------------------------------------------------------------------------- reproduction
@pytest.fixture
def reproduction(bundle: Path, run: Path) -> Iterator[list[str]]:
    work = run.parents[1] / "my reproduction"
    yield ["bash", str(bundle / layout.REPRODUCE), "--work", str(work), "--python", os.path.relpath(sys.executable)]
    shutil.rmtree(work, ignore_errors=True)


@pytest.mark.processes
def test_reproduce_gives_the_same_weights_from_raw_text(reproduction: list[str], run: Path) -> None:
    command = [*reproduction, "--raw", str(run.parents[1] / "raw")]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "reproduced: the weights are those of the bundle, bit by bit" in result.stdout
    work = Path(command[3])
    assert json.loads((work / "weights/config.json").read_text())["seq_len"] == SEQ_LEN


@pytest.mark.processes
def test_reproduce_refuses_other_raw_text(reproduction: list[str], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parents[1] / "raw", tmp_path, dirs_exist_ok=True)
    shutil.copy(run.parents[1] / "valid" / "text.jsonl", tmp_path / "web" / "text.jsonl")
    result = subprocess.run([*reproduction, "--raw", str(tmp_path)], check=False, capture_output=True, text=True)
    assert result.returncode != 0 and "web/text.jsonl: FAILED" in result.stderr
    assert "my books/data.arrow: OK" in result.stderr
    for flags, message in (
        ([], "--raw: found no folder"),
        (["--raw", str(tmp_path), "--python", "no/python"], "--python: found no such program"),
        (["--raw"], "--raw: expected a value"),
    ):
        result = subprocess.run([*reproduction, *flags], check=False, capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr
