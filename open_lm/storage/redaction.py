"""Remove passwords, tokens and keys from text and settings before they are logged or saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The values of environment variables with these names are removed from everything that a run writes.
_SECRET_NAME = re.compile(r"secret|token|password|passwd|api_?key|access_?key|credential", re.IGNORECASE)
_MIN_SECRET_LENGTH = 8
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"([a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.IGNORECASE), r"\1***@"),
    (
        re.compile(r"([?&][^=&\s]*(?:token|sig|signature|secret|password|credential|key)=)[^&\s'\"]+", re.IGNORECASE),
        r"\1***",
    ),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*)[^\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\b\w*(?:secret|token|password|api_?key|access_?key\w*)=)[^\s'\"&]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(--?(?:token|password|secret|api-key)[ =])[^\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w\-]{20,})\b"), "***"),
)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return `text` without passwords in URLs, tokens, keys, and values of secret environment variables."""
    return _redact(text, _secret_values(os.environ if environ is None else environ))


def redacted(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `params` with secrets removed from all strings, including those in lists and mappings."""
    secrets = _secret_values(os.environ)  # once: reading the environment takes longer than redacting a short text

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return _redact(value, secrets)
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    return {key: clean(value) for key, value in params.items()}


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    return [v for name, v in environ.items() if len(v) >= _MIN_SECRET_LENGTH and _SECRET_NAME.search(name)]


def _redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
