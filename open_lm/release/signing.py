"""Sign bundles and verify their signatures with model-signing (the OpenSSF Model Signing specification).

A signature covers all files of a bundle, manifest.json included, and is stored as model.sig in the sigstore bundle
format; the command `model_signing verify key` reads it as well. With an elliptic-curve key pair, everything is offline.
The sigstore method needs the network: it signs with the identity of a login and records that in a public log.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, DataError, StorageError
from open_lm.release.layout import SIGNATURE
from open_lm.release.manifest import IGNORED, MAX_BYTES, bundle_files

PASSWORD_VARIABLE = "OPEN_LM_SIGNING_PASSWORD"  # environment variable with the password of an encrypted private key
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those of the specification
_NEW_KEY = (
    "create a pair with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)


class SignatureProblem(Exception):
    """A signature that does not belong to the files of the bundle or to the key; the message says why."""


@dataclass(frozen=True)
class Identity:
    """Who must have signed with sigstore: the identity, such as an e-mail address, and the URL of its OIDC issuer."""

    name: str
    oidc_issuer: str


# ------------------------------------------------------------------------------------------------ sign
def check_private_key(path: Path) -> bytes | None:
    """Return the password of a private key, or None if the key has none.

    Raises:
        ConfigError: the file has no elliptic-curve key that model-signing supports, or the password is wrong.
    """
    import model_signing  # noqa: F401 - first, because the error for this package names the extra to install
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    value = os.environ.get(PASSWORD_VARIABLE)
    raw = _read_key(path, "--sign-key")
    password = value.encode() if value and b"ENCRYPTED" in raw else None
    try:
        key = load_pem_private_key(raw, password)
    except TypeError as error:  # encrypted, without a password
        raise ConfigError(f"--sign-key: {path} is encrypted; set {PASSWORD_VARIABLE} to its password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"--sign-key: {path} is not a readable PEM private key ({error}); {_NEW_KEY}") from error
    _check_curve(key, path, "--sign-key")
    return password


def sign_bundle(bundle: Path, private_key: Path | None) -> Path:
    """Write the signature of a bundle atomically, after its manifest, and return its path.

    Args:
        bundle: folder with manifest.json.
        private_key: PEM file with an elliptic-curve key; None to sign with a sigstore login.

    Raises:
        ConfigError: the key cannot be used.
        DataError: the bundle has files that it must not have.
        StorageError: sigstore cannot be reached, or the login failed.
    """
    from model_signing import signing

    config = signing.Config().set_hashing_config(_hashing())
    if private_key is not None:
        password = check_private_key(private_key)
        config.use_elliptic_key_signer(private_key=private_key, password=password)
    problems: list[str] = []
    if not list(bundle_files(bundle, problems)) or problems:
        raise DataError(f"{bundle}: cannot be signed: {'; '.join(problems) or 'it is empty'}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / SIGNATURE
        try:
            if private_key is None:
                config.use_sigstore_signer(use_ambient_credentials=True)
            config.sign(bundle, target)
        except Exception as error:
            if private_key is not None:
                raise
            raise StorageError(_sigstore_problem("--sigstore", error)) from error
        storage.write_bytes(bundle / SIGNATURE, target.read_bytes())
    return bundle / SIGNATURE


def _hashing() -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE, *IGNORED], ignore_git_paths=False)


def _sigstore_problem(flag: str, error: Exception) -> str:
    return (
        f"{flag}: sigstore failed ({type(error).__name__}: {error}). This method needs the network and a login; "
        "offline, use a key pair (--sign-key, --public-key)"
    )


# ------------------------------------------------------------------------------------------------ verify
def verify_signature(bundle: Path, signer: Path | Identity) -> None:
    """Verify that a bundle has a signature of a public key or of a sigstore identity, over its current files.

    Raises:
        ConfigError: the key cannot be used.
        SignatureProblem: there is no signature, or it does not belong to the files or to the signer.
        StorageError: sigstore cannot be reached.
    """
    from model_signing import verifying

    path = bundle / SIGNATURE
    _read_statement(path)
    config = verifying.Config().set_hashing_config(_hashing())
    if isinstance(signer, Identity):
        _use_sigstore(config, signer)
    else:
        _check_public_key(signer)
        config.use_elliptic_key_verifier(public_key=signer)
    try:
        config.verify(bundle, path)
    except Exception as error:  # of several libraries, for whatever the file holds
        raise SignatureProblem(_reason(error)) from error


def _use_sigstore(config: Any, signer: Identity) -> None:
    try:
        config.use_sigstore_verifier(identity=signer.name, oidc_issuer=signer.oidc_issuer)
    except Exception as error:
        raise StorageError(_sigstore_problem("--identity", error)) from error


def check_statement(bundle: Path, sha256: Mapping[str, str]) -> None:
    """Raise SignatureProblem unless the statement in model.sig lists the current files of a bundle.

    That needs no key, and says nothing about who made the statement: a damaged or exchanged signature is found, a
    forged one is not.

    Args:
        sha256: of the files that the statement must list, by path.
    """
    predicate = _read_statement(bundle / SIGNATURE)
    try:
        stated = {item["name"]: item["digest"] for item in predicate["resources"] if item["algorithm"] == "sha256"}
    except (KeyError, TypeError) as error:
        raise SignatureProblem(f"{SIGNATURE} is not a signature of model-signing ({error!r})") from error
    differing = sorted(path for path in {*stated, *sha256} if stated.get(path) != sha256.get(path))
    if differing:
        raise SignatureProblem(f"the files differ from the signed ones: {', '.join(map(str, differing))[:1000]}")


def _read_statement(path: Path) -> dict[str, Any]:
    """Return the predicate of the signed statement. Raise SignatureProblem unless it covers all files of a bundle."""
    if path.is_symlink() or not path.is_file():
        raise SignatureProblem(f"{SIGNATURE} is missing: the bundle is not signed")
    if path.stat().st_size > MAX_BYTES:
        raise SignatureProblem(f"{SIGNATURE} has more than {MAX_BYTES:,} bytes")
    try:
        envelope = json.loads(path.read_bytes())["dsseEnvelope"]
        predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        omitted = set(predicate["serialization"].get("ignore_paths", ())) - {SIGNATURE, *IGNORED}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SignatureProblem(f"{SIGNATURE} is not a signature of model-signing ({reason[:200]})") from error
    if omitted:
        raise SignatureProblem(f"{SIGNATURE} does not cover {', '.join(sorted(map(str, omitted)))}")
    return dict(predicate)


def _reason(error: Exception) -> str:
    """Return why model-signing rejects a signature."""
    from cryptography.exceptions import InvalidSignature

    if isinstance(error, InvalidSignature):
        return f"{SIGNATURE} was not made with the private key of this public key, or was changed"
    text = " ".join(str(error).split())
    if text.startswith("Key mismatch"):
        return f"{SIGNATURE} was made with another key than that of the given public key"
    if text.startswith("Signature mismatch: "):
        differences = str(error).removeprefix("Signature mismatch: ")
        return f"the files differ from the signed ones: {_differing_files(differences)}"
    return f"{SIGNATURE} is not valid ({type(error).__name__}: {text[:300]})"


def _differing_files(differences: str) -> str:
    """Return the files that model-signing lists, without their checksums. `differences` is a list of texts as text."""
    try:
        texts = [str(text) for text in ast.literal_eval(differences)]
    except (ValueError, SyntaxError, TypeError):
        return differences[:1000]
    prefix = "Hash mismatch for '"
    changed = [text.removeprefix(prefix).partition("': Expected")[0] for text in texts if text.startswith(prefix)]
    others = [text for text in texts if not text.startswith(prefix)]
    return "; ".join([*others, *([f"changed: {', '.join(changed)}"] if changed else [])])[:1000]


def _check_public_key(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(path, "--public-key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"--public-key: {path} is not a readable PEM public key ({error})") from error
    _check_curve(key, path, "--public-key")


def _check_curve(key: object, path: Path, flag: str) -> None:
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in _CURVES:
        raise ConfigError(
            f"{flag}: {path} has a key of the kind {curve}, expected the elliptic curve {' or '.join(_CURVES)}; "
            f"{_NEW_KEY}"
        )


def _read_key(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path} ({error.strerror}); expected a PEM file") from error
