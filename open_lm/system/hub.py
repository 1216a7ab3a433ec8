"""Download files of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def hub_file(name: str, filename: str) -> Path | None:
    """Return a file of the hub, or of its local cache if the hub is unreachable. None if the file does not exist."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:  # check with one short request first: without a network, a download retries for half a minute
        get_hf_file_metadata(hf_hub_url(name, filename))
    except EntryNotFoundError:
        pass  # the download below fails with the same error and records it in the cache
    except Exception:
        cached = try_to_load_from_cache(name, filename)
        if cached is None:
            raise
        return Path(cached) if isinstance(cached, str) else None  # the cache may record that the file does not exist
    try:
        return Path(hf_hub_download(name, filename))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
