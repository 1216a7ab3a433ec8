"""Build a bundle from a finished run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint.folders import step_number
from open_lm.errors import ConfigError
from open_lm.release import code_archive, components, layout
from open_lm.release.bill_of_materials import write_libraries
from open_lm.release.component_checks import MIN_PAPER_WORDS
from open_lm.release.components import COMPONENTS
from open_lm.release.context import Context
from open_lm.release.croissant import write_croissant
from open_lm.release.data_card import write_data_card, write_instructions
from open_lm.release.datasets import find_folders, write_evaluation_data, write_training_data
from open_lm.release.documents import DOCUMENT_SUFFIXES, document_problem
from open_lm.release.licenses import read_texts, write_texts
from open_lm.release.manifest import write_manifest
from open_lm.release.model_card import write_model_card
from open_lm.release.mof_file import LICENSE_SCOPES, Entry, GlobalLicense, Release, write_mof
from open_lm.release.privacy import Redactor
from open_lm.release.reproduce import write_reproduce
from open_lm.release.run_facts import RunFacts, read_run
from open_lm.release.sample_outputs import write_samples
from open_lm.release.secret_rules import machine_rules
from open_lm.release.secrets_scan import Scanner, require_clean
from open_lm.release.settings import BundleSettings
from open_lm.release.staging import staged_folder
from open_lm.release.technical_report import has_measurements, write_report
from open_lm.release.upload import check_target, upload_bundle
from open_lm.release.weights import export_weights, write_optimizer_state

_OPTIMIZER = f"{layout.METADATA}/optimizer"
_KEPT = (layout.FINAL_WEIGHTS, layout.INTERMEDIATE_WEIGHTS, _OPTIMIZER)  # of an interrupted build
_METADATA_FILES = ("params.txt", "model.json", "data.json", "environment.json", "metrics.jsonl", "out.log")
_RESULT_FILES = ("checkpoints/results.jsonl", "icl.jsonl")
_CODE_LICENSE = f"{layout.CODE}/LICENSE"


@dataclass
class Outcome:
    """What a build has written.

    Attributes:
        missing: the components that the bundle does not have, with the reason of each.
        notes: further sentences for the user.
    """

    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_bundle(settings: BundleSettings) -> Outcome:
    """Build a bundle: it appears completely or not at all. The same run and settings give the same bytes.

    Raises:
        ConfigError: settings that do not fit, a run that has not finished, or a target that exists.
        CheckpointError: weights that cannot be exported.
        DataError: files of the run that cannot be read, or secrets and private paths in them.
        StorageError: the upload failed; the bundle is complete.
    """
    facts = read_run(settings.run)
    texts = _check(settings)
    with staged_folder(settings.out, _state(facts), _KEPT) as folder:
        outcome = _write(_context(settings, facts, folder), texts)
        require_clean(Scanner(machine_rules([facts.folder])).scan(folder), settings.out)
        write_manifest(folder)
        _sign(settings, folder)
    if settings.upload is not None:
        upload_bundle(settings.out, settings.upload)
    return outcome


def _check(settings: BundleSettings) -> dict[str, str]:
    """Return the texts of the licenses. Raise ConfigError for settings that do not fit, before anything is written."""
    from open_lm.release.signing import check_private_key

    if settings.paper is not None:
        _check_paper(settings.paper)
    if settings.sign_key is not None:
        check_private_key(settings.sign_key)
    if settings.upload is not None:
        check_target(settings.upload)
    if "distribution" not in settings.licenses:
        without = [
            name for name, item in COMPONENTS.items() if name not in settings.licenses
            and item.kind not in settings.licenses and name not in code_archive.MEMBERS
        ]  # fmt: skip
        if without:
            raise ConfigError(
                f"--license: {', '.join(without)} would have no license; add --license ID, the one of all components "
                "without their own"
            )
    return read_texts(settings.licenses.values(), settings.license_texts, settings.producer)


def _check_paper(path: Path) -> None:
    if path.suffix.lower() not in DOCUMENT_SUFFIXES:
        suffixes = ", ".join(DOCUMENT_SUFFIXES)
        raise ConfigError(
            f"--paper {path}: found {path.suffix or 'no suffix'}, expected a file of the kinds {suffixes}"
        )
    if problem := document_problem(path, MIN_PAPER_WORDS):
        raise ConfigError(f"--paper {path}: {problem}; pass the paper, or leave the flag out")


def _state(facts: RunFacts) -> list[list[str]]:
    """Return the names, sizes and times of the checkpoints' files, on which `_KEPT` depends."""
    files = []
    for checkpoint in facts.checkpoints:
        infos = storage.list_infos(checkpoint.url) if step_number(checkpoint.url) is not None else []
        files += infos or [info for info in [storage.info(checkpoint.url)] if info is not None]
    return sorted([file.url, str(file.size), str(file.mtime_s)] for file in files)


def _context(settings: BundleSettings, facts: RunFacts, folder: Path) -> Context:
    from open_lm.report.collect import collect_run

    run = collect_run(settings.run)
    folders = tuple(find_folders(facts, settings.include_data))
    return Context(settings, facts, run, folders, Redactor(facts.folder), folder)


def _write(context: Context, texts: Mapping[str, str]) -> Outcome:
    """Write all parts. The cards come last, because they say what the bundle has."""
    outcome = Outcome()
    code = code_archive.write_archive(code_archive.find_source(context.facts.folder), context.bundle)
    if code["modified_since_commit"]:
        changed = len(code["modified_since_commit"])
        outcome.notes.append(
            f"{changed} source files differ from commit {code['commit'][:12]}; the archive has the changed files"
        )
    _write_weights(context, outcome)
    _write_metadata(context)
    _write_data(context, outcome)
    problems = _write_evaluations(context, outcome)
    if not write_samples(context):
        outcome.missing[components.SAMPLE_OUTPUTS] = "the run has no samples.jsonl (--sample-prompts)"
    write_libraries(context)
    _write_paper(context, outcome)
    reasons = write_reproduce(context.facts, context.folders, code, context.bundle)
    outcome.notes += [f"no {layout.REPRODUCE}: {reason}" for reason in reasons]
    if has_measurements(context):
        write_report(context)
    else:
        outcome.missing[components.TECHNICAL_REPORT] = "the run has no metrics and no results"
    write_data_card(context, problems)
    write_model_card(context, outcome.missing)
    _write_licenses(context, outcome, texts)
    return outcome


def _write_weights(context: Context, outcome: Outcome) -> None:
    has_copy = (context.facts.folder / "tokenizer").is_dir()
    tokenizer = None if has_copy else context.facts.setting("tokenizer")
    export_weights(context.facts.final.url, context.bundle / layout.FINAL_WEIGHTS, tokenizer)
    for checkpoint in context.facts.intermediate:
        export_weights(checkpoint.url, context.bundle / layout.INTERMEDIATE_WEIGHTS / checkpoint.label, tokenizer)
    if not context.facts.intermediate:
        outcome.missing[components.INTERMEDIATE_PARAMETERS] = "the run kept no checkpoint before its last one"
    if not write_optimizer_state(context.facts.final.url, context.bundle / _OPTIMIZER):
        outcome.notes.append("the final checkpoint has no optimizer state")


def _copier(context: Context) -> Callable[[str | Path, Path], Any]:
    """Return the function that copies a text file of the run into the bundle."""
    if context.settings.redact:
        return context.redactor.copy
    return storage.copy


def _write_metadata(context: Context) -> None:
    copy, target = _copier(context), context.bundle / layout.METADATA
    for name in _METADATA_FILES:
        if (context.facts.folder / name).is_file():
            copy(context.facts.folder / name, target / name)
    for path in sorted((context.facts.folder / "tokenizer").glob("*")):
        storage.copy(path, target / "tokenizer" / path.name)


def _write_data(context: Context, outcome: Outcome) -> None:
    write_training_data(context.facts, context.folders, context.bundle, context.redactor)
    if not write_instructions(context):
        shutil.rmtree(context.bundle / layout.DATA, ignore_errors=True)
        reason = "the training data are neither in the bundle (--include-data) nor can they be made again from records"
        outcome.missing[components.DATASETS] = reason
    else:
        write_croissant(context)


def _write_evaluations(context: Context, outcome: Outcome) -> list[str]:
    copy, target = _copier(context), context.bundle / layout.RESULTS
    names = [name for name in _RESULT_FILES if (context.facts.folder / name).is_file()]
    evaluations = sorted((context.facts.folder / "checkpoints" / "evals").glob("*.json"))
    for name in names:
        copy(context.facts.folder / name, target / Path(name).name)
    for path in evaluations:
        copy(path, target / "evals" / path.name)
    if not names and not evaluations:
        reason = "the run has no results (--val-data, --icl-yaml, or a separate evaluation)"
        outcome.missing[components.EVALUATION_RESULTS] = reason
    problems = write_evaluation_data(context.facts, evaluations, context.bundle, context.redactor, copy)
    if problems or not (context.bundle / layout.EVALUATION_DATA).is_dir():
        reason = "the run has neither validation sets (--val-data) nor tasks (--icl-yaml)"
        reason = "some are not available: " + "; ".join(problems) if problems else reason
        outcome.missing[components.EVALUATION_DATA] = context.redactor.text(reason)
    return problems


def _write_paper(context: Context, outcome: Outcome) -> None:
    paper = context.settings.paper
    if paper is None:
        outcome.missing[components.RESEARCH_PAPER] = "no paper was given (--paper FILE)"
    else:
        storage.copy(paper, context.bundle / layout.PAPER / f"paper{paper.suffix.lower()}")


# ------------------------------------------------------------------------------------------------ licenses and mof.yml
def _write_licenses(context: Context, outcome: Outcome, texts: Mapping[str, str]) -> None:
    """Write the texts of the licenses, and mof.yml with the components that the bundle has."""
    licenses = dict(context.settings.licenses)
    claimed = [name for name in COMPONENTS if name not in outcome.missing]
    own = {name: licenses[name] for name in claimed if name in licenses}
    scopes = {scope: licenses[scope] for scope in LICENSE_SCOPES if scope in licenses}
    used = {*own.values(), *scopes.values()}
    used_texts = {spdx: text for spdx, text in texts.items() if spdx in used}
    write_texts(context.bundle, used_texts, context.producer, context.end_time.year)
    release = Release(
        name=context.name,
        producer=context.producer,
        entries=[_entry(name, own.get(name)) for name in claimed],
        licenses={scope: GlobalLicense(spdx, _text_path(spdx)) for scope, spdx in scopes.items()},
        version=context.settings.version,
        date=context.date,
        type="language",
        architecture="transformer decoder",
        treatment="pre-trained" if context.is_pretrained else None,
        origin=context.settings.origin,
        contact=context.settings.contact,
    )
    write_mof(context.bundle / layout.MOF_FILE, release)


def _entry(name: str, own: str | None) -> Entry:
    description, path = COMPONENTS[name].description, COMPONENTS[name].path
    if own is not None:
        return Entry(name, description, own, _text_path(own), path)
    if name in code_archive.MEMBERS:  # the source code has the license of its package
        return Entry(name, description, package_license(), _CODE_LICENSE, path)
    return Entry(name, description, component_path=path)


def _text_path(license_id: str) -> str:
    return f"{layout.LICENSES}/{license_id}.txt"


def package_license() -> str:
    """Return the SPDX id of this package's license."""
    fields = metadata.metadata("open_lm")
    return str((fields.get_all("License-Expression") or fields.get_all("License") or ["unknown"])[0])


def _sign(settings: BundleSettings, folder: Path) -> None:
    from open_lm.release.signing import sign_bundle

    if settings.sign_key is not None or settings.sigstore:
        sign_bundle(folder, settings.sign_key)
        logging.info(f"signed the bundle: {layout.SIGNATURE}")
