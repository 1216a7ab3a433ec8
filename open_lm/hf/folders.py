"""Find a model that a user names, and read and write its JSON files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError

CONFIG, GENERATION_CONFIG, MODEL = "config.json", "generation_config.json", "model.json"
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "*training_args.bin", "optimizer*", "consolidated*"]
_REPORT_S = 10.0


def find_source(name: str) -> str:
    """Return the folder or URL of a model in the format of transformers: `name` itself, or a download from the hub.

    The hub's local cache is used if the hub cannot be reached.

    Raises:
        ConfigError: neither a folder nor a name on the hub.
    """
    if storage.is_remote(name) or os.path.isdir(storage.local_path(name)):
        return name
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or os.path.exists(name):
        raise ConfigError(f"{name}: expected a folder with {CONFIG}, a URL, or a name on the hub such as org/model")
    return download_model(name)


def download_model(name: str, folder: str | None = None, token: str | None = None) -> str:
    """Download a model from the hub, and return its folder: `folder`, or one in the hub's cache.

    Complete files of an earlier download are kept. `token` is by default that of the environment.

    Raises:
        ConfigError: the download failed, or the cache is incomplete without a network.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, local_dir=folder, token=token, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:
        # The hub's client raises many types of errors: no network, unknown name, no permission.
        reason = str(error).strip().partition("\n")[0]
        if token:
            reason = reason.replace(token, "…")
        raise ConfigError(
            f"{name}: no such folder, and the download from the hub failed ({type(error).__name__}: {reason}); check "
            "the name and the network, and set HF_TOKEN for models that need permission"
        ) from None
    return str(found)


def read_json(url: str) -> dict[str, Any]:
    """Return the object of a JSON file. Raise ConfigError if there is none."""
    if storage.info(url) is None:
        raise ConfigError(f"{url}: no such file")
    try:
        content = json.loads(storage.read_text(url))
    except ValueError as error:
        raise ConfigError(f"{url}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{url}: expected a JSON object, found a {type(content).__name__}")
    return content


def write_json(url: str, content: dict[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    storage.write_text(url, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def local_copy(folder: str) -> Iterator[str]:
    """Yield a local folder with the files of a local or remote one."""
    if not storage.is_remote(folder):
        yield storage.local_path(folder)
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="open_lm-convert-") as copy:
        for info in storage.list_infos(folder):
            storage.download(info.url, os.path.join(copy, info.url.rpartition("/")[2]))
        yield copy


class ProgressReport:
    """Lines about the share of bytes that a conversion has written, with the remaining time, every few seconds."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total = label, max(total_bytes, 1)
        self._done = 0
        self._start_s = self._last_s = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes."""
        self._done += num_bytes
        now_s = time.monotonic()
        if now_s - self._last_s >= _REPORT_S or self._done >= self._total > self._done - num_bytes:
            self._last_s = now_s
            self._print(max(now_s - self._start_s, 1e-9))

    def _print(self, seconds: float) -> None:
        share, speed = self._done / self._total, self._done / seconds
        left_s = (self._total - self._done) / speed
        print(
            f"{self._label}: {share:4.0%} of {self._total / 1e9:.2f} GB, {speed / 1e6:.0f} MB/s, {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
