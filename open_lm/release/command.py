"""Build an open release of a finished run, rate its openness, and verify it.

    python -m open_lm.release logs/NAME --out bundle --license Apache-2.0 --license data=CC-BY-4.0 --producer "ACME Lab"
    python -m open_lm.release --rate bundle/mof.yml
    python -m open_lm.release --verify bundle --public-key acme.pub

The first form builds a bundle: a folder with weights, code, cards, report, data and mof.yml, the description of the
release in the schema of the Model Openness Tool. --rate prints the class of such a description by the tool's rules.
--verify checks checksums, signature, components, licenses and secrets of a bundle; its exit code is 0 if all is well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, DataError, join_problems
from open_lm.release.components import COMPONENTS
from open_lm.release.licenses import is_open, suggestion
from open_lm.release.mof_file import DISTRIBUTION, LICENSE_SCOPES
from open_lm.release.settings import BundleSettings
from open_lm.system.names import source_pattern, user_file, user_path

_BUILD_ONLY = ("out", "license", "license_text", "name", "version", "producer", "contact", "origin", "paper",
               "include_data", "redact", "sign_key", "sigstore", "upload")  # fmt: skip
_VERIFY_ONLY = ("public_key", "identity", "oidc_issuer")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = FlagParser.of_program("open_lm.release", __doc__, allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=user_path, metavar="RUN", help="run folder to release")
    _add_build_flags(parser)
    checks = parser.add_argument_group("checks")
    checks.add_argument("--rate", type=user_file, metavar="FILE", help="rate a release file such as mof.yml")
    checks.add_argument("--verify", type=user_file, metavar="BUNDLE", help="verify a bundle, a local folder")
    checks.add_argument(
        "--public-key", type=user_file, metavar="FILE", help="with --verify: key (PEM) of the producer's signature"
    )
    checks.add_argument(
        "--identity",
        metavar="NAME",
        help="with --verify: sigstore identity, such as an e-mail address, of the producer; needs the network",
    )
    checks.add_argument("--oidc-issuer", metavar="URL", help="with --identity: who vouches for the identity")
    checks.add_argument("--json", action="store_true", help="with --rate and --verify: print JSON")
    return parser


def _add_build_flags(parser: argparse.ArgumentParser) -> None:
    build = parser.add_argument_group("bundle")
    build.add_argument("--out", type=user_file, metavar="FOLDER", help="bundle to write, which must not exist")
    build.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="[SCOPE=]ID",
        help="SPDX id of an open license; SCOPE is code, data, document or the name of a component, such as "
        "'Datasets' (default: everything without a license of its own); may be repeated",
    )
    build.add_argument(
        "--license-text",
        type=source_pattern,
        action="append",
        default=[],
        metavar="ID=FILE",
        help="file with the text of a license that this package does not have; may be repeated",
    )
    build.add_argument("--name", help="name of the release (default: that of the run)")
    build.add_argument("--version", help="version of the release")
    build.add_argument("--producer", help="person or organization that releases the model")
    build.add_argument("--contact", help="how to reach the producer")
    build.add_argument("--origin", help="model from which this one derives")
    build.add_argument("--paper", type=user_file, metavar="FILE", help="research paper (PDF, Markdown or LaTeX)")
    build.add_argument(
        "--include-data",
        action="store_true",
        help="put the shards of the training data into the bundle, in addition to the records from which they can be "
        "made again",
    )
    build.add_argument(
        "--redact",
        action="store_true",
        help="replace secrets and private paths in logs and settings, instead of refusing to build",
    )
    build.add_argument(
        "--sign-key", type=user_file, metavar="FILE", help="sign with this private key (PEM, elliptic curve), offline"
    )
    build.add_argument(
        "--sigstore", action="store_true", help="sign with the identity of a sigstore login; needs the network"
    )
    build.add_argument("--upload", type=user_path, metavar="URL", help="copy the bundle to hf://… or s3://…")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UserError: wrong flags, a bundle that cannot be built, or one that fails the verification.
    """
    args = build_parser().parse_args(argv)
    _check_mode(args)
    if args.rate is not None:
        _rate(args.rate, args.json)
    elif args.verify is not None:
        _verify(args)
    else:
        _build(args)


def _check_mode(args: argparse.Namespace) -> None:
    """Raise ConfigError unless the flags select one of building, rating and verifying, and all belong to it."""
    modes = {"RUN": args.run, "--rate": args.rate, "--verify": args.verify}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ConfigError(f"expected a RUN to release, --rate FILE or --verify BUNDLE, found {found}")
    flags_of = {"RUN": _BUILD_ONLY, "--rate": ("json",), "--verify": (*_VERIFY_ONLY, "json")}
    others = {name for names in flags_of.values() for name in names} - set(flags_of[given[0]])
    useless = sorted(f"--{name.replace('_', '-')}" for name in others if getattr(args, name))
    if useless:
        raise ConfigError(f"{given[0]}: {', '.join(useless)} has no effect here; remove it")


def _rate(path: Path, as_json: bool) -> None:
    from open_lm.release.mof_file import read_mof
    from open_lm.release.rating import rate, rating_json, rating_lines
    from open_lm.storage.strict_json import to_json

    release = read_mof(path)
    rating = rate(release)
    if as_json:
        print(to_json(rating_json(rating), indent=2))
        return
    _print_lines(f"{release.name} {release.version or ''}".rstrip(), *rating_lines(rating))


def _verify(args: argparse.Namespace) -> None:
    """Print the checks of a bundle. Raise DataError if one has failed."""
    from open_lm.release.signing import Identity
    from open_lm.release.verify import verification_json, verification_lines, verify_bundle
    from open_lm.storage.strict_json import to_json

    if bool(args.identity) != bool(args.oidc_issuer) or (args.identity and args.public_key):
        raise ConfigError("expected --public-key FILE, or --identity NAME together with --oidc-issuer URL")
    signer = Identity(args.identity, args.oidc_issuer) if args.identity else args.public_key
    verification = verify_bundle(args.verify, signer)
    if args.json:
        print(to_json(verification_json(verification), indent=2))
    else:
        _print_lines(*verification_lines(verification))
    if verification.failed:
        raise DataError(f"{args.verify}: the verification failed: {', '.join(verification.failed)}")


def _print_lines(*lines: str) -> None:
    """Print lines with texts of a bundle, whose control characters could change what a terminal shows."""
    for line in lines:
        print("".join(character if character.isprintable() else "?" for character in line))


def _build(args: argparse.Namespace) -> None:
    for flag in ("out", "license"):
        if not getattr(args, flag):
            raise ConfigError(f"--{flag} is missing: a bundle needs --out FOLDER and --license ID")
    if args.sign_key is not None and args.sigstore:
        raise ConfigError("--sign-key and --sigstore exclude each other; a bundle has one signature")
    settings = BundleSettings(
        licenses=parse_licenses(args.license),
        license_texts=dict(map(_named_file, args.license_text)),
        **{name: getattr(args, name) for name in ("run", *_BUILD_ONLY) if not name.startswith("license")},
    )
    from open_lm.release.build import build_bundle

    outcome = build_bundle(settings)
    lines = [f"  without {name}: {reason}" for name, reason in outcome.missing.items()]
    print(f"{settings.out}: built", *lines, *(f"  {note}" for note in outcome.notes), sep="\n")
    _print_verdict(settings.out)


def _print_verdict(folder: Path) -> None:
    """Print the class of a new bundle, as it claims and as its files support it. Raise DataError if they differ."""
    from open_lm.release.component_checks import Bundle
    from open_lm.release.layout import MOF_FILE
    from open_lm.release.manifest import read_manifest
    from open_lm.release.mof_file import read_mof
    from open_lm.release.verify import judge, verdict_lines

    verdict = judge(Bundle(folder, read_manifest(folder)), read_mof(folder / MOF_FILE))
    warnings = [f"warning: {text}" for text in verdict.claimed.warnings]
    print(*warnings, *verdict_lines(verdict.claimed, verdict.verified), sep="\n")
    problems = [f"{name}: {problem}" for name, problem in {**verdict.licenses, **verdict.components}.items()]
    if problems:
        raise DataError(join_problems(problems, f"{folder}: components that {MOF_FILE} claims are missing"))


def _named_file(text: str) -> tuple[str, Path]:
    """Return the id and the file of --license-text. Raise ConfigError for another form."""
    license_id, sign, file = text.partition("=")
    if not (license_id and sign and file):
        raise ConfigError(f"--license-text {text}: expected ID=FILE, such as ODC-By-1.0=odc-by.txt")
    return license_id, Path(file)


def parse_licenses(values: Sequence[str]) -> dict[str, str]:
    """Return the SPDX ids of --license by scope. Raise ConfigError for an unknown scope or a license not open."""
    licenses: dict[str, str] = {}
    for value in values:
        scope, sign, license_id = value.rpartition("=")
        scope = scope if sign else DISTRIBUTION
        if scope not in LICENSE_SCOPES and scope not in COMPONENTS:
            expected = ", ".join([*LICENSE_SCOPES, *COMPONENTS])
            raise ConfigError(f"--license {value}: found the scope {scope!r}, expected one of {expected}")
        if scope in licenses:
            raise ConfigError(f"--license {value}: {scope} has the license {licenses[scope]} already; give it once")
        if not is_open(license_id):
            raise ConfigError(
                f"--license {value}: {license_id!r} is not an open license; expected an SPDX id that OSI or FSF "
                f"approve, an open-data license or OpenMDW-1.0{suggestion(license_id)}"
            )
        licenses[scope] = license_id
    return licenses
