"""What one run of the preprocessor is to do, as plain data: inputs, units of work, settings, layout of the output."""

from __future__ import annotations

import glob as local_glob
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from open_lm import storage
from open_lm.data.shard_format import MEMBER_KINDS
from open_lm.datapreprocess.readers import Piece, is_known, is_splittable, split_suffixes
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import ConfigError, DataError, UserError, join_problems

TOOL_VERSION = 1  # of the output's content: raised whenever the same inputs and settings give other bytes
_UNITS = 64
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True)
class InputFile:
    """A file to read; `mtime_s` (0.0 where unknown) only tells whether unfinished work still fits."""

    url: str
    num_bytes: int
    mtime_s: float = 0.0


@dataclass(frozen=True)
class Unit:
    """A piece of work of its own: pieces of files of one source, read in order; `copy` counts passes over them.

    `group` is the same for all passes over the same pieces.
    """

    index: int
    group: int
    copy: int
    source: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Layout:
    """Where shards go: `folders` under `root` ("" is the root itself), named by `template` from number `first` on.

    `shard_sequences` None lets the size of the data decide.
    """

    root: str
    folders: tuple[str, ...] = ("",)
    template: str = "shard-{:07d}"
    first: int = 0
    shard_sequences: int | None = None

    def folder(self, index: int) -> str:
        return storage.join(self.root, self.folders[index]) if self.folders[index] else self.root

    def shard(self, folder: int, index: int) -> str:
        return storage.join(self.folder(folder), self.template.format(self.first + index) + ".tar")


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the output (and, in `workers`, `ray_*` and `work_dir`, what does not)."""

    inputs: tuple[InputFile, ...]
    layout: Layout
    tokenizer: str | None
    seq_len: int = 2048
    kind: str = "npy"
    content_key: str = "text"
    seed: int = 0
    shuffle: bool = True
    sampling: Sampling | None = None
    vocab_size: int | None = None
    eot_token: str | None = None
    skip_bad_lines: bool = False
    drop_tail: bool = False
    workers: int | None = None
    ray_address: str | None = None
    ray_options: dict[str, Any] = field(default_factory=dict)
    work_dir: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.seq_len < 1:
            problems.append(f"--seqlen must be at least 1, found {self.seq_len}")
        if self.kind not in MEMBER_KINDS:
            problems.append(f"--format must be one of {', '.join(MEMBER_KINDS)}, found {self.kind!r}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"the number of workers must be at least 1, found {self.workers}")
        if self.layout.shard_sequences is not None and self.layout.shard_sequences < 1:
            problems.append(f"a shard must hold at least 1 sequence, found {self.layout.shard_sequences}")
        if problems:
            raise ConfigError(join_problems(problems))

    @property
    def length(self) -> int:
        """Ids in a member: the inputs and, one further on, the targets of a sequence."""
        return self.seq_len + 1

    def settings(self, fingerprint: str, eot_id: int, vocab_size: int) -> dict[str, Any]:
        """What must be equal for two runs to give the same output, beside the inputs; JSON-able."""
        return {
            "version": TOOL_VERSION,
            "tokenizer": self.tokenizer,
            "tokenizer_fingerprint": fingerprint,
            "eot_id": eot_id,
            "vocab_size": vocab_size,
            "seq_len": self.seq_len,
            "format": self.kind,
            "content_key": self.content_key,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shard_sequences": self.layout.shard_sequences,
            "folders": list(self.layout.folders),
            "sampling": None if self.sampling is None else _plain(self.sampling),
            "skip_bad_lines": self.skip_bad_lines,
            "drop_tail": self.drop_tail,
        }

    def input_records(self) -> list[dict[str, Any]]:
        """The inputs as a finished data set records them: without times, which differ between copies."""
        return [{"url": item.url, "num_bytes": item.num_bytes} for item in self.inputs]


def _plain(sampling: Sampling) -> dict[str, Any]:
    markers = {name: list(marks) for name, marks in sampling.markers.items()}
    return {"markers": markers, "factors": dict(sampling.factors)}


# --- inputs ------------------------------------------------------------------------------------------------------


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str] | None = None) -> list[InputFile]:
    """The files that local or remote globs, folders (searched through) and file names stand for: sorted, each once.

    In folders only files of known (or the given) suffixes count; a file named otherwise must have a reader.
    """
    found: dict[str, InputFile] = {}
    problems: list[str] = []
    errors: list[UserError] = []
    for pattern in patterns:
        try:
            files = _matches(pattern, suffixes)
        except UserError as error:
            errors.append(error)
            continue
        if not files:
            problems.append(f"{pattern}: nothing matches; expected files ending in .jsonl, .jsonl.zst, .jsonl.gz, …")
        found.update(files)
    if not patterns:
        problems.append("no input is named")
    if len(errors) == 1 and not problems:
        raise errors[0]
    if problems or errors:
        raise DataError(join_problems([*problems, *map(str, errors)], "The input cannot be read"))
    return [found[url] for url in sorted(found)]


def _matches(pattern: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    info = storage.info(pattern)
    if info is not None:
        split_suffixes(pattern)
        return _by_url([info])
    if not re.search(r"[*?\[]", pattern):
        return _in_folder(pattern, suffixes)
    files = _by_url([item for url in storage.glob(pattern) if (item := storage.info(url))])
    for url in files:
        split_suffixes(url)
    if not storage.is_remote(pattern):
        for folder in filter(os.path.isdir, local_glob.glob(storage.local_path(pattern), recursive=True)):
            files |= _in_folder(folder, suffixes)
    return files


def _in_folder(folder: str, suffixes: Sequence[str] | None) -> dict[str, InputFile]:
    infos = [item for item in storage.list_infos(folder, recursive=True) if is_known(item.url)]
    return _by_url([item for item in infos if suffixes is None or item.url.endswith(tuple(suffixes))])


def _by_url(infos: Sequence[storage.FileInfo]) -> dict[str, InputFile]:
    return {item.url: InputFile(item.url, item.size, item.mtime_s) for item in infos}


def plan_units(inputs: Sequence[InputFile], sampling: Sampling | None) -> list[Unit]:
    """Cut the inputs into units of like size, the same for any number of workers.

    Small files of one source share a unit, large plain JSON-lines files are cut by bytes.
    """
    total = sum(item.num_bytes for item in inputs)
    unit_bytes = min(max(total // _UNITS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    groups: list[tuple[str, list[Piece]]] = []
    room = 0
    for item in inputs:
        source = sampling.source_of(item.url) if sampling else ""
        for piece in _pieces(item, unit_bytes):
            if not groups or groups[-1][0] != source or room <= 0:
                groups.append((source, []))
                room = unit_bytes
            groups[-1][1].append(piece)
            room -= piece.end - piece.start
    units: list[Unit] = []
    for number, (source, pieces) in enumerate(groups):
        for copy in range(sampling.passes(source) if sampling else 1):
            units.append(Unit(len(units), number, copy, source, tuple(pieces)))
    return units


def _pieces(item: InputFile, unit_bytes: int) -> list[Piece]:
    if item.num_bytes <= 2 * unit_bytes or not is_splittable(item.url):
        return [Piece(item.url, 0, item.num_bytes)]
    starts = list(range(0, item.num_bytes - unit_bytes // 2, unit_bytes))
    return [Piece(item.url, a, b) for a, b in zip(starts, [*starts[1:], item.num_bytes], strict=True)]


def shard_size(num_sequences: int, wanted: int | None) -> int:
    """Sequences in a shard: as asked, else 8192, or less where a small data set would make fewer than 16 shards."""
    return wanted or min(8192, max(64, -(-num_sequences // 16)))


def work_name(root: str) -> str:
    """A name for the work folder of an output that does not lie on this machine."""
    return f"open_lm-{hashlib.sha256(root.encode()).hexdigest()[:16]}"
