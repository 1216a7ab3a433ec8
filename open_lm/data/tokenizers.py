"""The tokenizer of a data set or a run: find it, copy it to a run, and reject another one.

A data set has it next to its dataset.json, and a run next to its data.json: the folder `tokenizer/` has its files, and
the JSON file its name and fingerprint. Data sets and runs of earlier versions have no copy, and older ones no record.
Whoever turns text into ids for a model, or ids into text, calls `choose_tokenizer`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.data import provenance
from open_lm.data.shard_format import shard_folder
from open_lm.data.tokenizer_copies import (
    TokenizerRecord,
    find_copies,
    fingerprint_of,
    read_copy,
    read_files,
    records_of,
    same_ids,
    short,
    write_copy,
)
from open_lm.errors import ConfigError, DataError, StorageError, join_problems
from open_lm.system.names import unescape, user_path
from open_lm.tokenizer import (
    COPY_FOLDER,
    DEFAULT_TOKENIZER,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_files,
)

if TYPE_CHECKING:
    from open_lm.data.order import Source

OVERRIDE_FLAG = "--allow-other-tokenizer"


def add_tokenizer_args(parser: Any) -> None:
    """Add the flags of a program that runs a model on text, to pass to `choose_tokenizer`, to an argparse parser."""
    parser.add_argument(
        "--tokenizer",
        type=user_path,
        help="hub name, folder, tokenizer.json or sentencepiece .model file (default: the tokenizer that the run was "
        f"trained with, or {DEFAULT_TOKENIZER} if the run does not record it)",
    )
    parser.add_argument("--eot-token", help="end-of-text token (default: that of the training data or the tokenizer)")
    parser.add_argument(
        OVERRIDE_FLAG,
        action="store_true",
        help="accept a --tokenizer that gives other ids than the one that the run was trained with, with a warning",
    )


# --- data sets -------------------------------------------------------------------------------------------------------
def record_in_run(sources: Sequence[Source], roots: Iterable[str], weights: str | None = None) -> None:
    """Copy the tokenizer of the training data to folders of the run, if there is a copy to take.

    It is next to the shards, or in the run that trained `weights` (path or URL of a checkpoint), if that run has the
    same tokenizer. Otherwise an existing copy stays, unless the data record another tokenizer. Sources with tokenizers
    that give different ids leave no copy.
    """
    records, tokenizer = _records(sources), find_data_tokenizer(sources, weights)
    files = {} if tokenizer is None else tokenizer.files
    for root in roots:
        existing = read_copy(root)
        is_stale = bool(records) and fingerprint_of(existing) not in {record.fingerprint for record in records}
        if existing != files and (files or is_stale):
            write_copy(root, files)


def find_data_tokenizer(sources: Sequence[Source], weights: str | None = None) -> RunTokenizer | None:
    """Return the tokenizer of training data; None if they record none.

    It has a copy if there is one next to the shards, or in the run that trained `weights` (path or URL of a
    checkpoint), if that run has the same tokenizer. Sources with tokenizers that give different ids have no copy.
    """
    records = _records(sources)
    if not records:
        return None
    copies = list(_copies(sources, records).values())
    if not copies and weights is not None and (run := find_run_tokenizer(weights)) is not None and run.copy is not None:
        copies = [run.copy] if run.copy.fingerprint in {record.fingerprint for record in records} else []
    is_one = len(copies) == len(records) and all(same_ids(copies[0], other) for other in copies[1:])
    folder = next(shard_folder(source.shards[0]) for source in sources if source.datasets)
    return RunTokenizer(folder, tuple(records), copies[0].files() if copies and is_one else {})


def check_tokenizers(sources: Sequence[Source], weights: Sequence[str] = (), allow_other: bool = False) -> None:
    """Compare the tokenizers of all sources, and of the runs that trained `weights`, paths or URLs of checkpoints.

    Tokenizers with different fingerprints are compared by their ids. If a copy of one is missing, they may differ,
    which is only a warning.

    Raises:
        DataError: they give different ids, without `allow_other` (--allow-other-tokenizer).
    """
    records = _records(sources)
    runs = {url: run for url in weights if records and (run := find_run_tokenizer(url)) is not None}
    all_records = [*records, *(record for run in runs.values() for record in run.records)]
    users = {record.fingerprint: [str(record)] for record in all_records}
    if len(users) < 2:
        return
    for source in sources:
        for record in records_of(source.datasets):
            users[record.fingerprint].append(source.name)
    copies = _copies(sources, records)
    for url, run in runs.items():
        for record in run.records:
            users[record.fingerprint].append(f"the run of {url}")
        if run.copy is not None:
            copies[run.copy.fingerprint] = run.copy
    known = list(copies.values())
    differ = any(not same_ids(known[0], other) for other in known[1:])
    if not differ and len(known) == len(users):
        return
    listed = [f"{user[0]}: {', '.join(user[1:])}" for user in users.values()]
    if not differ:
        logging.warning(join_problems(listed, "the tokenizers have different files; if they give different ids, the "
                                      "results are wrong"))  # fmt: skip
        return
    message = join_problems(
        listed,
        "The tokenizers give different ids to the same text; use data that was tokenized with one of them, or add "
        f"{OVERRIDE_FLAG}. The tokenizers",
    )
    if not allow_other:
        raise DataError(message)
    logging.warning(message)


def _records(sources: Iterable[Source]) -> list[TokenizerRecord]:
    return records_of(dataset for source in sources for dataset in source.datasets)


def _copies(sources: Sequence[Source], records: Sequence[TokenizerRecord]) -> dict[str, Tokenizer]:
    """Return the tokenizers of these records, by fingerprint, that have a copy next to shards of the sources."""
    folders = dict.fromkeys(
        shard_folder(url)
        for source in sources
        if source.datasets
        for url in source.shards
        if not url.startswith("pipe:")
    )
    return find_copies(folders, [record.fingerprint for record in records])


# --- runs ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer that a run was trained with.

    Attributes:
        root: the run's folder, or its folder in --checkpoint-dir.
        records: one for each tokenizer of the training data, usually one.
        files: the copy in the run's folder; empty if there is none.
    """

    root: str
    records: tuple[TokenizerRecord, ...]
    files: Mapping[str, bytes]

    def is_in(self, folder: str) -> bool:
        """Return whether `folder`, and not one of its parents, has the record."""
        return _absolute(folder) == self.root

    @cached_property
    def copy(self) -> Tokenizer | None:
        """The copy in the run's folder; None if there is none.

        Raises:
            ConfigError: the copy is damaged, or is not the tokenizer of data.json.
        """
        return self._load_copy(None) if self.files else None

    def _load_copy(self, eot_token: str | None) -> Tokenizer:
        name = storage.join(self.root, COPY_FOLDER)
        try:
            tokenizer = tokenizer_from_files(self.files, name, eot_token)
        except ConfigError as error:
            if eot_token is not None:  # the tokenizer may only lack this token
                raise
            raise ConfigError(
                f"{name}: the copy of the run's tokenizer is damaged ({error}); restore it, or remove it and pass "
                "--tokenizer"
            ) from error
        if tokenizer.fingerprint not in {record.fingerprint for record in self.records}:
            raise ConfigError(
                f"{name}: its fingerprint is {short(tokenizer.fingerprint)}, but {provenance.FILE_NAME} of the run "
                f"records {self._recorded}; restore the copy, or remove it and pass --tokenizer"
            )
        return tokenizer

    @property
    def _recorded(self) -> str:
        return " and ".join(map(str, self.records))

    def load(self, eot_token: str | None = None) -> Tokenizer:
        """Return the run's tokenizer: its copy, or else the one with the recorded name (or DEFAULT_TOKENIZER).

        Raises:
            ConfigError: there is no copy, and no tokenizer has the recorded name, or it has another fingerprint.
        """
        if self.files:
            return self._load_copy(eot_token)
        advice = "and there is no copy in the run's folder; pass that tokenizer with --tokenizer"
        if len(self.records) > 1:
            raise ConfigError(
                f"{self.root}: the run was trained with {self._recorded}, which may give different ids; pass one of "
                "them with --tokenizer"
            )
        (record,) = self.records
        name = unescape(record.name) or DEFAULT_TOKENIZER
        try:
            tokenizer = load_tokenizer(name, eot_token)
        except ConfigError as error:
            raise ConfigError(
                f"{self.root}: the run was trained with {record}, which was not found ({error}), {advice}"
            ) from error
        if tokenizer.fingerprint != record.fingerprint:
            raise ConfigError(
                f"{self.root}: the run was trained with {record}, but {name} has the fingerprint "
                f"{short(tokenizer.fingerprint)}, {advice}"
            )
        return self._with_recorded_end(tokenizer, eot_token)

    def check(self, tokenizer: Tokenizer, eot_token: str | None = None, *, allow_other: bool = False) -> Tokenizer:
        """Return a tokenizer that gives the run's ids, with the run's end-of-text id unless `eot_token` is given.

        With `allow_other` (--allow-other-tokenizer), one that gives other ids is returned with a warning.

        Raises:
            ConfigError: the tokenizer gives other ids. Without a copy in the run, it must have the same fingerprint.
        """
        try:
            difference = self._difference(tokenizer)
        except ConfigError as error:
            if not allow_other:
                raise
            difference = f"cannot be compared with the one that the run was trained with ({error})"
        if not difference:
            return self._with_recorded_end(tokenizer, eot_token)
        found = f"--tokenizer {tokenizer.name} (fingerprint {short(tokenizer.fingerprint)}) {difference}"
        if not allow_other:
            is_found = bool(self.files or (len(self.records) == 1 and self.records[0].name))
            advice = "leave out --tokenizer to use the run's" if is_found else "pass the run's"
            raise ConfigError(f"{found}; {advice}, or add {OVERRIDE_FLAG} to use this one")
        logging.warning(f"{found}; it is used because of {OVERRIDE_FLAG}")
        return tokenizer

    def _difference(self, tokenizer: Tokenizer) -> str:
        """Say how a tokenizer differs from the run's; "" if it gives the same ids."""
        is_same = tokenizer.fingerprint in {record.fingerprint for record in self.records}
        if is_same or (self.copy is not None and same_ids(self.copy, tokenizer)):
            return ""
        relation = "gives other ids than" if self.copy else "is not the same file as"
        return f"{relation} the one that the run in {self.root} was trained with, {self._recorded}"

    def _with_recorded_end(self, tokenizer: Tokenizer, eot_token: str | None) -> Tokenizer:
        eot_id = self.records[0].eot_id
        if eot_token is None and eot_id is not None:
            tokenizer.eot_id = eot_id
        return tokenizer


def find_run_tokenizer(checkpoint: str) -> RunTokenizer | None:
    """Return the tokenizer of the run that wrote a checkpoint; None if the run does not record any.

    checkpoint: path or URL of a run folder, of a step_N folder or an epoch_N.pt or another file in its checkpoints/; or
        a folder in the format of transformers.
    """
    folder = _absolute(checkpoint)
    if (exported := _find_exported(folder)) is not None:
        return exported
    for _ in range(3):
        description = _read_description(folder)
        if description is not None:
            files = read_copy(folder)
            records = records_of(dataset for source in description["sources"] for dataset in source["datasets"])
            if not records and files:  # the run was resumed on data that do not record their tokenizer
                tokenizer = tokenizer_from_files(files, storage.join(folder, COPY_FOLDER))
                records = [TokenizerRecord(tokenizer.fingerprint, eot_id=tokenizer.eot_id)]
            return RunTokenizer(folder, tuple(records), files) if records else None
        folder = os.path.dirname(folder)
    return None


def _find_exported(folder: str) -> RunTokenizer | None:
    """Return the tokenizer of a folder in the format of transformers; None for any other folder, or without one."""
    if storage.info(storage.join(folder, "config.json")) is None:
        return None
    files = read_files(folder)
    if not files:
        return None
    tokenizer = tokenizer_from_files(files, folder)
    return RunTokenizer(folder, (TokenizerRecord(tokenizer.fingerprint, eot_id=tokenizer.eot_id),), files)


def _read_description(folder: str) -> provenance.Description | None:
    url = storage.join(folder, provenance.FILE_NAME)
    try:
        return provenance.read(url)
    except StorageError as error:  # some stores report an error for a file that does not exist
        logging.warning(f"the run's record of its tokenizer was not read: {error}")
        return None


def copy_record(checkpoint: str, folder: str) -> None:
    """Copy the record and the tokenizer of the run that wrote a checkpoint to a folder of exported checkpoints.

    Nothing is copied if the run has none, or if the folder is in a run that has one.
    """
    run, existing = find_run_tokenizer(checkpoint), find_run_tokenizer(folder)
    is_inside_run = existing is not None and not existing.is_in(folder)
    if run is None or is_inside_run:
        return
    write_copy(folder, run.files)
    storage.copy(storage.join(run.root, provenance.FILE_NAME), storage.join(folder, provenance.FILE_NAME))


def choose_tokenizer(
    checkpoint: str, spec: str | None = None, eot_token: str | None = None, *, allow_other: bool = False
) -> Tokenizer:
    """Return the tokenizer for a model: `spec`, which must be that of the run, or else the run's own.

    Args:
        checkpoint: see `find_run_tokenizer`.
        spec: the value of --tokenizer, see `load_tokenizer`. Without it, a run that records no tokenizer gets
            DEFAULT_TOKENIZER.
        eot_token: the token that ends a document; by default that of the training data.
        allow_other: accept any `spec`, with a warning (--allow-other-tokenizer).

    Raises:
        ConfigError: no usable tokenizer, or `spec` gives other ids than the run's tokenizer.
    """
    run = find_run_tokenizer(checkpoint)
    if run is None:
        return load_tokenizer(spec or DEFAULT_TOKENIZER, eot_token)
    if spec is None:
        return run.load(eot_token)
    return run.check(load_tokenizer(spec, eot_token), eot_token, allow_other=allow_other)


def _absolute(path: str) -> str:
    return path.rstrip("/") if storage.is_remote(path) else os.path.abspath(storage.local_path(path))
