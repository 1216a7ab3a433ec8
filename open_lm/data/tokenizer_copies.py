"""Records and copies of tokenizers next to shards and in run folders.

dataset.json and data.json record the name and the fingerprint of a tokenizer; the folder `tokenizer/` has its files.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.data import provenance
from open_lm.errors import ConfigError, StorageError
from open_lm.tokenizer import COPY_FOLDER, FILE_NAMES, NO_TOKENIZER, OPTIONAL_NAMES, Tokenizer, tokenizer_from_files

_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class TokenizerRecord:
    """What dataset.json says about a tokenizer.

    Attributes:
        fingerprint: sha256 (hex) of its file.
        name: what it was loaded from: a path or a hub name; "" if unknown.
        eot_id: the id that ends a document; None if unknown.
    """

    fingerprint: str
    name: str = ""
    eot_id: int | None = None

    def __str__(self) -> str:
        return f"{self.name or 'a tokenizer of unknown name'} (fingerprint {short(self.fingerprint)})"


def records_of(datasets: Iterable[Mapping[str, Any]]) -> list[TokenizerRecord]:
    """Return the different tokenizers of data sets (see provenance.read_dataset), by fingerprint."""
    records: dict[str, TokenizerRecord] = {}
    for dataset in datasets:
        settings = dataset["settings"]
        fingerprint, eot_id = settings.get("tokenizer_fingerprint"), settings.get("eot_id")
        if isinstance(fingerprint, str) and fingerprint not in ("", NO_TOKENIZER):
            record = TokenizerRecord(
                fingerprint, str(dataset.get("tokenizer") or ""), eot_id if isinstance(eot_id, int) else None
            )
            records.setdefault(fingerprint, record)
    return list(records.values())


def short(fingerprint: str) -> str:
    return f"{fingerprint[:_SHOWN_DIGITS]}…"


def read_files(folder: str) -> dict[str, bytes]:
    """Return the files of the tokenizer in a folder, by name; empty if there is no tokenizer."""
    urls = {name: storage.join(folder, name) for name in FILE_NAMES}
    files = {name: storage.read_bytes(url) for name, url in urls.items() if storage.info(url) is not None}
    return {} if set(files) <= {*OPTIONAL_NAMES} else files


def read_copy(folder: str) -> dict[str, bytes]:
    """Return the `read_files` of the copy of the tokenizer in a folder of shards or of a run.

    Only warn if the copy cannot be read: some stores report an error for a file that does not exist.
    """
    try:
        return read_files(storage.join(folder, COPY_FOLDER))
    except StorageError as error:
        logging.warning(f"{folder}: cannot read the copy of the tokenizer, which is not used: {error}")
        return {}


def write_copy(folder: str, files: Mapping[str, bytes]) -> None:
    """Write the files of a tokenizer to the folder of a run; files of another tokenizer there are removed."""
    for name in FILE_NAMES:
        if name in files:
            storage.write_bytes(storage.join(folder, COPY_FOLDER, name), files[name])
        else:
            storage.remove(storage.join(folder, COPY_FOLDER, name))


def fingerprint_of(files: Mapping[str, bytes]) -> str:
    """Return the fingerprint of a tokenizer's files; "" if there are none, or damaged ones."""
    try:
        return tokenizer_from_files(files, COPY_FOLDER).fingerprint if files else ""
    except ConfigError:
        return ""


def find_copies(folders: Iterable[str], fingerprints: Iterable[str]) -> dict[str, Tokenizer]:
    """Return the tokenizers with these fingerprints that have a copy in a folder of shards, by fingerprint.

    A copy that is damaged or has another fingerprint is not used, with a warning.
    """
    missing = set(fingerprints)
    found: dict[str, Tokenizer] = {}
    for folder in folders:
        if not missing:
            break
        files = read_copy(folder)
        if not files:
            continue
        copy = storage.join(folder, COPY_FOLDER)
        try:
            tokenizer = tokenizer_from_files(files, copy)
        except ConfigError as error:
            logging.warning(f"the copy of the tokenizer next to the data is not used: {error}")
            continue
        if tokenizer.fingerprint in missing:
            missing.remove(tokenizer.fingerprint)
            found[tokenizer.fingerprint] = tokenizer
        elif tokenizer.fingerprint not in found:
            logging.warning(
                f"{copy}: not used, because its fingerprint {short(tokenizer.fingerprint)} is not that of "
                f"{provenance.DATASET_NAME}; copy the folder again from the original data set"
            )
    return found


def same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids, as far as a sample of texts shows.

    Equal files do. Others are compared by the number of their ids, and by the ids that they give to the text of each
    token, to texts of several tokens in random order, and to their added tokens. The latter are not compared between
    libraries: sentencepiece, unlike tokenizers, does not look for them in a text.
    """
    if first.fingerprint == second.fingerprint:
        return True
    if first.vocab_size != second.vocab_size:
        return False
    tokens = list(dict.fromkeys(first.decode([i]) for i in range(first.vocab_size)))
    shuffled = random.Random(0).sample(tokens, len(tokens))
    joined = ["".join(shuffled[start : start + 8]) for start in range(0, len(shuffled), 8)]
    texts = [*tokens, *joined]
    if first.library == second.library:
        texts += [*first.added_tokens(), *second.added_tokens()]
    return first.encode_batch(texts) == second.encode_batch(texts)
