"""The input files of a run: found through names, globs, folders and lists, and cut into units of work."""

from __future__ import annotations

import glob as local_glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from open_lm import storage
from open_lm.datapreprocess.readers import (
    HUB_PREFIX,
    Piece,
    ReadOptions,
    can_stream,
    expand_folder,
    is_data_name,
    split,
    split_suffixes,
)
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import DataError, UserError, join_problems

_TARGET_UNITS = 1024  # enough for every worker to have many, so that all end together
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 1 << 20, 256 << 20
_MIN_FILE_BYTES = 16 << 10  # a file counts as no less: opening it takes time too
_LIST_PREFIX = "@"


@dataclass(frozen=True)
class InputFile:
    """A file to read. `mtime_s` (0.0 where unknown) and `etag` ("" where unknown) tell whether it changed."""

    url: str
    num_bytes: int
    mtime_s: float = 0.0
    etag: str = ""


@dataclass(frozen=True)
class Unit:
    """A piece of work of its own: pieces of files of one source, read in order; `copy` counts passes over them.

    group: the same for all passes over the same pieces.
    streamed: the one piece is a large compressed file, decompressed by one task and encoded by others.
    digest: of the files as they are now; another one means that the unit has to be done again.
    """

    index: int
    group: int
    copy: int
    source: str
    pieces: tuple[Piece, ...]
    streamed: bool
    digest: str

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


# --- finding -----------------------------------------------------------------------------------------------------


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str] | None = None) -> list[InputFile]:
    """The files that names, local or remote globs, folders (searched through) and @lists stand for: sorted, each once.

    Data sets of Hugging Face `datasets` are folders too, saved ones or `hf-dataset://NAME?split=…`. In other folders
    only files of known (or the given) suffixes count; a file named otherwise must have a reader. `@FILE` stands for the
    names in the lines of a text file.
    """
    found: dict[str, InputFile] = {}
    problems: list[str] = []
    errors: list[UserError] = []
    for pattern in _without_lists(patterns, errors):
        if not pattern.strip():
            problems.append("an empty name among the inputs; is a variable of the shell not set?")
            continue
        try:
            files = _matches(pattern, suffixes)
        except UserError as error:
            errors.append(error)
            continue
        if not files:
            problems.append(f"{pattern}: nothing matches; expected files ending in .jsonl, .jsonl.zst, .parquet, …")
        found.update(files)
    if not patterns:
        problems.append("no input is named")
    if len(errors) == 1 and not problems:
        raise errors[0]
    if problems or errors:
        raise DataError(join_problems([*problems, *map(str, errors)], "The input cannot be read"))
    return [found[url] for url in sorted(found)]


def _without_lists(patterns: Iterable[str], errors: list[UserError]) -> Iterator[str]:
    """The patterns, those of lists in their place; lists that cannot be used are added to the errors."""
    for pattern in patterns:
        if not pattern.startswith(_LIST_PREFIX):
            yield pattern
            continue
        try:
            lines = [line.strip() for line in storage.read_text(pattern.removeprefix(_LIST_PREFIX)).splitlines()]
        except UserError as error:
            errors.append(error)
            continue
        names = [line for line in lines if line and not line.startswith("#")]
        if not names:
            errors.append(DataError(f"{pattern}: no line of this list names an input"))
        yield from names


def _matches(pattern: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    info = None if pattern.startswith(HUB_PREFIX) else storage.info(pattern)
    if info is not None:
        split_suffixes(pattern)
        return _by_url([info])
    data_set = expand_folder(pattern)
    if data_set is not None:
        return _by_url(data_set)
    if not re.search(r"[*?\[]", pattern):
        return _in_folder(pattern, suffixes)
    files = _by_url(storage.glob_infos(pattern))
    for url in files:
        split_suffixes(url)
    if not storage.is_remote(pattern):
        for folder in filter(os.path.isdir, local_glob.glob(storage.local_path(pattern), recursive=True)):
            files |= _in_folder(folder, suffixes)
    return files


def _in_folder(folder: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    """The data files in a folder and below; what is hidden, such as unfinished work, is none."""
    place = folder.rstrip("/") if storage.is_remote(folder) else os.path.abspath(storage.local_path(folder))
    infos = storage.list_infos(place, recursive=True)
    infos = [item for item in infos if is_data_name(item.url) and "/." not in item.url.removeprefix(place)]
    return _by_url([item for item in infos if suffixes is None or item.url.endswith(tuple(suffixes))])


def _by_url(infos: Sequence[storage.FileInfo]) -> dict[str, InputFile]:
    """Files by their addresses; local ones by absolute paths, so that one named in two ways comes once."""
    places = [item.url if storage.is_remote(item.url) else os.path.abspath(item.url) for item in infos]
    return {url: InputFile(url, item.size, item.mtime_s, item.etag) for url, item in zip(places, infos, strict=True)}


# --- cutting -----------------------------------------------------------------------------------------------------


def unit_size(inputs: Sequence[InputFile]) -> int:
    """Bytes of a unit of work: a power of two, so that a small change of the inputs leaves most units as they were."""
    wanted = sum(item.num_bytes for item in inputs) // _TARGET_UNITS
    return min(max(1 << max(0, wanted - 1).bit_length(), _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)


def plan_units(
    inputs: Sequence[InputFile], sampling: Sampling, options: ReadOptions, *, keep_order: bool = False
) -> list[Unit]:
    """Cut the inputs into units of like size, the same for any number of workers.

    Small files of one source share a unit, large ones are cut where their format allows. Units follow the inputs, by
    source and then by name, or, to keep their order, by name alone.
    """
    unit_bytes = unit_size(inputs)
    named = [(sampling.source_of(item.url), item) for item in inputs]
    if not keep_order:
        named.sort(key=lambda entry: (entry[0], entry[1].url))
    groups: list[tuple[str, list[Piece], bool]] = []
    room = 0
    for source, item in named:
        for piece, streamed in _pieces(item, unit_bytes, options):
            if not groups or groups[-1][0] != source or room <= 0 or streamed or groups[-1][2]:
                groups.append((source, [], streamed))
                room = unit_bytes
            groups[-1][1].append(piece)
            room -= max(piece.num_bytes, _MIN_FILE_BYTES)
    by_url = {item.url: item for item in inputs}
    units: list[Unit] = []
    for number, (source, pieces, streamed) in enumerate(groups):
        for copy in range(sampling.passes(source)):
            digest = _digest(number, copy, sampling.factor(source), pieces, by_url.__getitem__)
            units.append(Unit(len(units), number, copy, source, tuple(pieces), streamed, digest))
    return units


def _pieces(item: InputFile, unit_bytes: int, options: ReadOptions) -> list[tuple[Piece, bool]]:
    """The pieces of a file, each with whether it is to be streamed."""
    pieces = split(item.url, item.num_bytes, unit_bytes)
    streamed = len(pieces) == 1 and item.num_bytes > 4 * unit_bytes and can_stream(item.url, options)
    return [(piece, streamed) for piece in pieces]


def _digest(number: int, copy: int, factor: float, pieces: Sequence[Piece], file_of: Callable[[str], InputFile]) -> str:
    """What a unit's result depends on, beside the settings of the run."""
    facts = [(piece, file_of(piece.url)) for piece in pieces]
    return hashlib.sha256(repr((number, copy, factor, facts)).encode()).hexdigest()[:12]
