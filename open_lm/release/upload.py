"""Copy a bundle to a bucket or to a repository of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, StorageError
from open_lm.release import layout
from open_lm.release.manifest import bundle_files

_MARKER = ".manifest.uploading"  # manifest of the bundle whose upload has started
_HUB = re.compile(r"hf://(?:models/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")


def check_target(url: str) -> None:
    """Raise ConfigError unless the URL is a bucket or a repository of the hub."""
    if url.startswith("hf://"):
        if not _HUB.fullmatch(url):
            raise ConfigError(f"--upload {url}: expected hf://ORGANIZATION/NAME or hf://ORGANIZATION/NAME@BRANCH")
    elif not storage.is_remote(url):
        raise ConfigError(f"--upload {url}: expected hf://ORGANIZATION/NAME or the URL of a bucket such as s3://…")


def upload_bundle(bundle: Path, url: str) -> None:
    """Copy all files of a bundle; the manifest last, so that a copy that has it is complete.

    Repeat the upload after an interruption: a bucket keeps the files that were sent completely.

    Raises:
        ConfigError: the target is no bucket or repository, or it has another bundle.
        StorageError: the target cannot be reached or written.
    """
    check_target(url)
    files = sorted(bundle_files(bundle, []))
    if url.startswith("hf://"):
        _upload_to_hub(bundle, url, files)
    else:
        _upload_to_bucket(bundle, url.rstrip("/"), files)


# ------------------------------------------------------------------------------------------------------------- bucket
def _upload_to_bucket(bundle: Path, url: str, files: list[str]) -> None:
    content = (bundle / layout.MANIFEST).read_bytes()
    manifest, marker = storage.join(url, layout.MANIFEST), storage.join(url, _MARKER)
    _check_same(manifest, content, url)
    sent = _sizes(url) if _check_same(marker, content, url) else {}
    if not sent:
        storage.write_bytes(marker, content)
    files = [name for name in files if name != layout.MANIFEST and sent.get(name) != (bundle / name).stat().st_size]
    total = sum((bundle / name).stat().st_size for name in files)
    logging.info(f"uploading {len(files)} files of {total / 1e6:,.1f} MB to {url}; {len(sent)} are there already")
    for name in files:
        storage.copy(bundle / name, storage.join(url, name))
    storage.write_bytes(manifest, content)
    storage.remove(marker)


def _check_same(manifest: str, content: bytes, url: str) -> bool:
    """Return whether the bucket has this manifest. Raise ConfigError if it has that of another bundle."""
    if storage.info(manifest) is None:
        return False
    if storage.read_bytes(manifest) != content:
        raise ConfigError(f"--upload {url}: has another bundle already; remove it, or choose another URL")
    return True


def _sizes(url: str) -> dict[str, int]:
    """Return the sizes of the files below a URL by their paths relative to it."""
    infos = storage.list_infos(url, recursive=True)
    return {info.url.removeprefix(url).lstrip("/"): info.size for info in infos}


# ---------------------------------------------------------------------------------------------------------------- hub
def _upload_to_hub(bundle: Path, url: str, files: list[str]) -> None:
    """Create the repository if it is missing, and add all files in one commit. The token is that of the environment."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match = _HUB.fullmatch(url)
    assert match is not None
    name, revision = match["name"], match["revision"]
    api: Any = HfApi()
    logging.info(f"uploading {len(files)} files to the repository {name} of the hub")
    try:
        api.create_repo(name, repo_type="model", exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=bundle / path) for path in files]
        message = f"Add the release {bundle.absolute().name}"
        api.create_commit(name, operations, commit_message=message, repo_type="model", revision=revision)
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"--upload {url}: the hub refused the upload or cannot be reached ({_reason(error)}); check the name and "
            "the token (HF_TOKEN), or copy the folder yourself"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
