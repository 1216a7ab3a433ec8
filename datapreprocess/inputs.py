"""Find the input files of a run by path, glob, folder or list, and divide them into units of work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from open_lm import storage
from open_lm.datapreprocess.readers import (
    HUB_PREFIX,
    Piece,
    ReadOptions,
    can_stream,
    describe_suffixes,
    expand_folder,
    is_data_name,
    split,
    split_suffixes,
)
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import DataError, UserError, join_problems
from open_lm.system.names import glob_paths, input_pattern, is_glob, is_list, list_file, user_path

_TARGET_UNITS = 1024  # many per worker, so that all workers finish at about the same time
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 1 << 20, 256 << 20
_MIN_FILE_BYTES = 16 << 10  # cost of a small file: opening it takes time too


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    mtime_s, etag: used to detect changes of the file; 0.0 and "" if unknown.
    """

    url: str
    num_bytes: int
    mtime_s: float = 0.0
    etag: str = ""


@dataclass(frozen=True)
class Unit:
    """A unit of work: pieces of files of one source, which are read in order.

    group, copy: a source that is read several times has one unit per pass over the same pieces. These units have the
        same group; `copy` is the number of the pass.
    streamed: the only piece is a large compressed file, which one task decompresses and other tasks encode.
    digest: hash of the state of the files; if it changes, the unit must be processed again.
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
        """The input bytes of all pieces."""
        return sum(piece.num_bytes for piece in self.pieces)


# --- finding -----------------------------------------------------------------------------------------------------


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str] | None = None) -> list[InputFile]:
    """Return the files that match the patterns, sorted by URL and without duplicates.

    A pattern is a path or URL of a file, a local or remote glob, a folder (searched recursively), a data set of
    Hugging Face `datasets` (a saved one or `hf-dataset://NAME?split=…`), or `@FILE`, a text file with one pattern per
    line. Folders yield only files with a known suffix, or with one of `suffixes`. Files that are named directly or
    matched by a glob must have a reader. All problems are reported in one error.
    """
    matched: dict[str, InputFile] = {}
    problems: list[str] = []
    errors: list[UserError] = []
    for pattern in _expand_lists(patterns, errors):
        if not pattern.strip():
            problems.append("an input is an empty string; is a shell variable unset?")
            continue
        try:
            files = _match(pattern, suffixes)
        except UserError as error:
            errors.append(error)
            continue
        if not files:
            allowed = f"; --suffixes selects {' '.join(suffixes)}" if suffixes is not None else ""
            problems.append(f"{pattern}: no file matches; supported suffixes are {describe_suffixes()}{allowed}")
        matched.update(files)
    if not patterns:
        problems.append("no input is given")
    if len(errors) == 1 and not problems:
        raise errors[0]
    if problems or errors:
        raise DataError(join_problems([*problems, *map(str, errors)], "The input cannot be read"))
    return [matched[url] for url in sorted(matched)]


def _expand_lists(patterns: Iterable[str], errors: list[UserError]) -> Iterator[str]:
    """Yield the patterns with every @list replaced by its lines; append an error for each unusable list."""
    for pattern in map(input_pattern, patterns):
        if not is_list(pattern):
            yield pattern
            continue
        try:
            lines = [line.strip() for line in storage.read_lines(list_file(pattern))]
        except UserError as error:
            errors.append(error)
            continue
        names = [user_path(line) for line in lines if line and not line.startswith("#")]
        if not names:
            errors.append(DataError(f"{pattern}: this list contains no inputs"))
        yield from names


def _match(pattern: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    """Return the files that match one pattern by URL; raise an error for files that have no reader."""
    info = None if pattern.startswith(HUB_PREFIX) else storage.info(pattern)
    if info is not None:
        split_suffixes(pattern)
        return _by_url([info])
    data_set = expand_folder(pattern)
    if data_set is not None:
        return _by_url(data_set)
    if not is_glob(pattern):
        return _in_folder(pattern, suffixes)
    files = _by_url(storage.glob_infos(pattern))
    for url in files:
        split_suffixes(url)
    if storage.is_remote(pattern):
        files = files or _in_folder(pattern, suffixes)
    else:
        for folder in filter(os.path.isdir, glob_paths(storage.local_path(pattern))):
            files |= _in_folder(folder, suffixes)
    return files


def _in_folder(folder: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    """Return the data files in a folder and its subfolders, except hidden ones such as unfinished work."""
    root = folder.rstrip("/") if storage.is_remote(folder) else os.path.abspath(storage.local_path(folder))
    infos = storage.list_infos(root, recursive=True)
    infos = [item for item in infos if is_data_name(item.url) and "/." not in item.url.removeprefix(root)]
    return _by_url([item for item in infos if suffixes is None or item.url.endswith(tuple(suffixes))])


def _by_url(infos: Sequence[storage.FileInfo]) -> dict[str, InputFile]:
    """Return files by URL; local ones by absolute path, so that a file named in two ways is read once."""
    urls = [item.url if storage.is_remote(item.url) else os.path.abspath(item.url) for item in infos]
    return {url: InputFile(url, item.size, item.mtime_s, item.etag) for url, item in zip(urls, infos, strict=True)}


# --- dividing into units -----------------------------------------------------------------------------------------


def unit_size(inputs: Sequence[InputFile], max_bytes: int = _MAX_UNIT_BYTES) -> int:
    """Return the size of a unit in bytes: a power of two, so that a small change of the inputs keeps most units."""
    target = sum(item.num_bytes for item in inputs) // _TARGET_UNITS
    return min(max(1 << max(0, target - 1).bit_length(), _MIN_UNIT_BYTES), max_bytes)


def plan_units(
    inputs: Sequence[InputFile],
    sampling: Sampling,
    options: ReadOptions,
    *,
    keep_order: bool = False,
    max_bytes: int = _MAX_UNIT_BYTES,
) -> list[Unit]:
    """Divide the inputs into units of similar size, independently of the number of workers.

    Small files of one source share a unit; large files are split if their format allows it. Units are in order of
    source and URL, or with `keep_order` of URL only. A file that cannot be split may exceed `max_bytes`.
    """
    unit_bytes = unit_size(inputs, max_bytes)
    with_sources = [(sampling.source_of(item.url), item) for item in inputs]
    if not keep_order:
        with_sources.sort(key=lambda entry: (entry[0], entry[1].url))
    groups: list[tuple[str, list[Piece], bool]] = []
    free_bytes = 0
    for source, item in with_sources:
        for piece, streamed in _split_file(item, unit_bytes, options):
            if not groups or groups[-1][0] != source or free_bytes <= 0 or streamed or groups[-1][2]:
                groups.append((source, [], streamed))
                free_bytes = unit_bytes
            groups[-1][1].append(piece)
            free_bytes -= max(piece.num_bytes, _MIN_FILE_BYTES)
    by_url = {item.url: item for item in inputs}
    units: list[Unit] = []
    for number, (source, pieces, streamed) in enumerate(groups):
        for copy in range(sampling.passes(source)):
            digest = _digest(number, copy, sampling.factor(source), pieces, by_url.__getitem__)
            units.append(Unit(len(units), number, copy, source, tuple(pieces), streamed, digest))
    return units


def _split_file(item: InputFile, unit_bytes: int, options: ReadOptions) -> list[tuple[Piece, bool]]:
    """Return the pieces of a file, each with whether to stream it."""
    pieces = split(item.url, item.num_bytes, unit_bytes)
    streamed = len(pieces) == 1 and item.num_bytes > 4 * unit_bytes and can_stream(item.url, options)
    return [(piece, streamed) for piece in pieces]


def _digest(number: int, copy: int, factor: float, pieces: Sequence[Piece], file_of: Callable[[str], InputFile]) -> str:
    """Return a hash of everything that determines the result of a unit, except for the settings of the run.

    It is part of file names in the work folder: renaming `Piece`, `InputFile` or one of their fields changes the hash,
    and interrupted runs then start over.
    """
    facts = [(piece, file_of(piece.url)) for piece in pieces]
    return hashlib.sha256(repr((number, copy, factor, facts)).encode()).hexdigest()[:12]
