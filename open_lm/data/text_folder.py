"""The folder of a text index: a data set whose shards are made from raw text when they are opened.

    manifest.jsonl   one line per unit of text: the size and checksum of its shard, and the pieces of files to read
    tails.tar        an ordinary shard: the ids of all units that do not fill a sequence, joined
    dataset.json     settings, inputs and counts, as next to shards; written last
    tokenizer/       the files of the tokenizer
    text.json        what the index is made from: options, tokenizer and the state of the input files
    units.jsonl      the report of each unit; progress.jsonl while they are made

Without --cache-dir, the shards of units are cached in units.cache/, next to the folders of the indexes. The address of
a unit's shard is `text:FOLDER/STEM.tar`. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import IO, Any

import orjson

from open_lm import storage
from open_lm.data.manifest import MANIFEST_NAME, TEXT_PREFIX, ManifestEntry, read_manifest, shard_folder, shard_stem
from open_lm.data.shard_format import DATASET_NAME
from open_lm.data.text_units import Grow, TextOptions, TextUnit, write_unit
from open_lm.data.tokenizer_copies import read_copy
from open_lm.data.verify import Expected
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.errors import DataError
from open_lm.system.names import escaped, unescaped
from open_lm.tokenizer import COPY_FOLDER, tokenizer_from_files

STATE_NAME, UNITS_NAME, JOURNAL_NAME = "text.json", "units.jsonl", "progress.jsonl"
TAILS_STEM, CACHE_NAME = "tails", "units.cache"
INDEX_FOLDER = "text_index"  # in a run folder; contains one index folder per value of --train-text
PIECES_KEY = "text"  # key of the unit in a line of the manifest
_FORMAT = 1


@dataclass(frozen=True)
class TextState:
    """What an index is made from.

    name: the value of --train-text.
    tokenizer: the value of --tokenizer; the fingerprint in `encoder` identifies its content.
    options: the settings of the sequences.
    encoder: facts that determine the ids of a document (DocumentEncoder.settings).
    inputs: the input files with their state.
    """

    name: str
    tokenizer: str
    options: TextOptions
    encoder: dict[str, Any]
    inputs: tuple[InputFile, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return the settings for dataset.json. They identify the data, so they contain no names or paths."""
        return {"raw_text": True, **asdict(self.options), **self.encoder}

    def to_bytes(self) -> bytes:
        record = {"format": _FORMAT, **asdict(self)}
        return orjson.dumps(escaped(record), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


class TextFolder:
    """A text index in a local folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def url(self, name: str) -> str:
        return storage.join(self.path, name)

    @property
    def is_finished(self) -> bool:
        return storage.exists(self.url(DATASET_NAME))

    def state(self) -> TextState | None:
        """Return what the index is made from; None if there is no index, or one of another version."""
        if not storage.exists(self.url(STATE_NAME)):
            return None
        try:
            record = unescaped(orjson.loads(storage.read_bytes(self.url(STATE_NAME))))
            if record.pop("format") != _FORMAT:
                return None
            record["options"] = TextOptions(**record["options"])
            record["inputs"] = tuple(InputFile(**item) for item in record["inputs"])
            return TextState(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.url(STATE_NAME)}: damaged ({error!r}); remove the folder {self.path} to make the index again"
            ) from error

    def shards(self) -> list[tuple[str, ManifestEntry | None]]:
        """Return the address and the manifest's line of each shard."""
        return [
            (f"{'' if entry.shard == TAILS_STEM else TEXT_PREFIX}{self.url(entry.shard)}.tar", entry)
            for entry in read_manifest(self.url(MANIFEST_NAME))
        ]

    @cached_property
    def units(self) -> dict[str, TextUnit]:
        """The units by the stem of their shard."""
        entries = read_manifest(self.url(MANIFEST_NAME))
        return {e.shard: TextUnit.from_json(unescaped(e.extra[PIECES_KEY])) for e in entries if PIECES_KEY in e.extra}

    @cached_property
    def encoding(self) -> tuple[TextOptions, DocumentEncoder]:
        """The options and the encoder, which uses the reference tokenizer if the fast one fails its check."""
        state = self.state()
        if state is None:
            raise DataError(f"{self.path}: found no text index of this version; open-lm train --train-text makes it")
        files, copy = read_copy(self.path), self.url(COPY_FOLDER)
        tokenizer = tokenizer_from_files(files, copy) if files else None
        if tokenizer is None or tokenizer.fingerprint != state.encoder["tokenizer_fingerprint"]:
            raise DataError(
                f"{copy}: found {'no' if tokenizer is None else 'another'} tokenizer, expected the one that the text "
                f"index was made with; remove the folder {self.path} to make the index again"
            )
        tokenizer.eot_id = state.encoder["eot_id"]
        encoder = DocumentEncoder(tokenizer, add_bos=state.options.add_bos)
        return state.options, encoder.reference() if encoder.self_check() else encoder

    def write_unit(self, unit: TextUnit, expected: Expected, file: IO[bytes], grow: Grow) -> str:
        """Tokenize a unit, write its shard to a file of a cache and return its SHA-256.

        Raises:
            DataError: the text or the tokenizer's library changed; see `text_units.write_unit`.
        """
        options, encoder = self.encoding
        return write_unit(unit, expected, options, encoder, file, grow)


def unit_of(url: str) -> tuple[TextFolder, TextUnit]:
    """Return the index and the unit of a shard's address."""
    path = shard_folder(url)
    folder = _open(path, os.stat(storage.join(path, MANIFEST_NAME)).st_mtime_ns)
    unit = folder.units.get(shard_stem(url))
    if unit is None:
        raise DataError(f"{url}: the index has no such unit; another process has made it again, so restart the run")
    return folder, unit


@lru_cache(maxsize=64)
def _open(path: str, _mtime_ns: int) -> TextFolder:
    return TextFolder(path)
