"""Verify a bundle: its files, signature, components, licenses, rating, and that it has no secrets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_lm.errors import DataError
from open_lm.release.component_checks import Bundle, check_components, check_licenses
from open_lm.release.components import CLASS_NAMES
from open_lm.release.layout import MANIFEST, MOF_FILE, SIGNATURE
from open_lm.release.manifest import compare, hash_files, read_manifest
from open_lm.release.mof_file import Release, read_mof
from open_lm.release.rating import Rating, rate, rating_json
from open_lm.release.secrets_scan import Scanner
from open_lm.release.signing import Identity, SignatureProblem, check_statement, verify_signature

_MAX_WARNINGS = 20  # of one check that are printed
OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"


@dataclass(frozen=True)
class Check:
    """The result of a check: OK, FAILED (then there are problems) or NOT_CHECKED."""

    name: str
    detail: str
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    is_skipped: bool = False

    @property
    def status(self) -> str:
        return FAILED if self.problems else NOT_CHECKED if self.is_skipped else OK


@dataclass(frozen=True)
class Verification:
    """The checks of a bundle, and its class as mof.yml claims it and as the files support it.

    Both are None without mof.yml. `verified` is also None if the files are not those of the manifest or the signature.
    """

    bundle: Path
    checks: Sequence[Check]
    claimed: Rating | None = None
    verified: Rating | None = None

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.status == FAILED]


@dataclass(frozen=True)
class Verdict:
    """The rating of a release as it claims, and of what is in its bundle; problems by component."""

    claimed: Rating
    verified: Rating
    components: Mapping[str, str] = field(default_factory=dict)
    licenses: Mapping[str, str] = field(default_factory=dict)


def judge(bundle: Bundle, release: Release) -> Verdict:
    """Rate a release twice: as mof.yml claims it, and without the components that are not in the bundle.

    A component whose license has no text in the bundle does not count either.
    """
    components, licenses = check_components(bundle, release), check_licenses(bundle, release)
    return Verdict(rate(release), rate(release, {*components, *licenses}), components, licenses)


def verify_bundle(bundle: Path, signer: Path | Identity | None = None) -> Verification:
    """Verify a bundle. All checks are made, also after one has failed.

    Args:
        bundle: local folder.
        signer: who must have signed: the public key's file, or a sigstore identity. None: whoever has.

    Raises:
        ConfigError: the public key cannot be used.
        DataError: the folder does not exist.
        StorageError: a file cannot be read, or sigstore cannot be reached.
    """
    if not bundle.is_dir():
        raise DataError(f"{bundle}: expected the local folder of a bundle; download a remote one first")
    problems: list[str] = []
    files = Bundle(bundle, hash_files(bundle, problems))
    checks = [_check_files(files, problems), _check_signature(files, signer)]
    try:
        release = _read_release(files)
    except DataError as error:
        checks += [Check(MOF_FILE, "not readable", [str(error)]), _check_secrets(bundle)]
        return Verification(bundle, checks)
    verdict = judge(files, release)
    verified = None if any(check.problems for check in checks) else verdict.verified
    checks += [_check_components(release, verdict), _check_licenses(release, verdict), _check_secrets(bundle)]
    return Verification(bundle, checks, verdict.claimed, verified)


def _read_release(bundle: Bundle) -> Release:
    if MOF_FILE not in bundle.files:  # it may be a link to a file outside the bundle
        raise DataError(f"{bundle.folder / MOF_FILE}: missing; expected the description of the release")
    return read_mof(bundle.folder / MOF_FILE)


def _check_files(bundle: Bundle, problems: Sequence[str]) -> Check:
    num_bytes = sum(record.num_bytes for record in bundle.files.values())
    try:
        problems = [*problems, *compare(read_manifest(bundle.folder), bundle.files)]
    except DataError as error:
        problems = [*problems, str(error)]
    return Check("files", f"{len(bundle.files):,} files, {num_bytes:,} bytes, by {MANIFEST}", problems)


def _check_signature(files: Bundle, signer: Path | Identity | None) -> Check:
    """Check the signature; without a signer, only that it lists the current files."""
    if signer is None and not os.path.lexists(files.folder / SIGNATURE):
        return Check("signature", "the bundle is not signed", is_skipped=True)
    name = "an unknown key" if signer is None else signer.name if isinstance(signer, Identity) else str(signer)
    try:
        if signer is None:
            check_statement(files.folder, _signed_files(files))
        else:
            verify_signature(files.folder, signer)
    except SignatureProblem as error:
        return Check("signature", f"by {name}", [str(error)])
    if signer is None:
        return Check("signature", "by an unknown key; pass --public-key, that of the producer", is_skipped=True)
    return Check("signature", f"by {name}, over all files")


def _signed_files(bundle: Bundle) -> dict[str, str]:
    """Return the sha256 of all files that a signature covers."""
    digests = {path: record.sha256 for path, record in bundle.files.items()}
    manifest = bundle.folder / MANIFEST
    if manifest.is_file() and not manifest.is_symlink():
        digests[MANIFEST] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return digests


def _check_components(release: Release, verdict: Verdict) -> Check:
    problems = [f"{name}: {problem}" for name, problem in verdict.components.items()]
    detail = f"{len(release.entries) - len(problems)} of {len(release.entries)} claimed components are in the bundle"
    return Check("components", detail, problems)


def _check_licenses(release: Release, verdict: Verdict) -> Check:
    problems = [f"{name}: {problem}" for name, problem in verdict.licenses.items()]
    ids = {rated.license for rated in verdict.claimed.components if rated.license is not None}
    return Check("licenses", ", ".join(sorted(ids)) or "none", problems, verdict.claimed.warnings)


def _check_secrets(bundle: Path) -> Check:
    findings = Scanner().scan(bundle)
    problems = [str(finding) for finding in findings if not finding.is_warning]
    warnings = [str(finding) for finding in findings if finding.is_warning]
    return Check("secrets", "no secrets and private paths" if not problems else "private text", problems, warnings)


# ------------------------------------------------------------------------------------------------ print
def verdict_lines(claimed: Rating, verified: Rating | None) -> list[str]:
    """Return both classes as lines, and the components that make the difference."""
    lines = [f"claimed   {CLASS_NAMES[claimed.level]}"]
    if verified is None:
        return [*lines, "verified  no class: the files are not those of the manifest or the signature"]
    lines.append(f"verified  {CLASS_NAMES[verified.level]}")
    lost = {name for names in verified.missing.values() for name in names}
    lost -= {name for names in claimed.missing.values() for name in names}
    return lines + ([f"          without {', '.join(sorted(lost))}"] if lost else [])


def verification_lines(verification: Verification) -> list[str]:
    """Return the table of checks, their problems and warnings, and both classes."""
    lines = [f"{check.name:<12}{check.status:<13}{check.detail}" for check in verification.checks]
    for check in verification.checks:
        lines += [f"error: {check.name}: {problem}" for problem in check.problems]
        lines += [f"warning: {check.name}: {warning}" for warning in check.warnings[:_MAX_WARNINGS]]
        if len(check.warnings) > _MAX_WARNINGS:
            lines.append(f"warning: {check.name}: and {len(check.warnings) - _MAX_WARNINGS:,} more (--json has all)")
    if verification.claimed is not None:
        lines += verdict_lines(verification.claimed, verification.verified)
    return lines


def verification_json(verification: Verification) -> dict[str, Any]:
    """Return a verification as JSON: is_verified, checks, and both ratings as `rating_json` has them."""
    return {
        "is_verified": not verification.failed,
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "detail": check.detail,
                "problems": list(check.problems),
                "warnings": list(check.warnings),
            }
            for check in verification.checks
        ],
        "claimed": None if verification.claimed is None else rating_json(verification.claimed),
        "verified": None if verification.verified is None else rating_json(verification.verified),
    }
