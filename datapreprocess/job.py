"""The description of a preprocessing run as plain data: inputs, settings, limits and output layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from open_lm import storage
from open_lm.data.shard_format import MEMBER_KINDS
from open_lm.datapreprocess.inputs import InputFile
from open_lm.datapreprocess.readers import ReadOptions
from open_lm.datapreprocess.sampling import Sampling
from open_lm.errors import ConfigError, join_problems

TOOL_VERSION = 3  # version of the output content: incremented when the same inputs and settings give different bytes
DEFAULT_BAD_FRACTION = 0.001
SPECIAL_TOKENS = "special_tokens_in_text"  # the setting of that name, see DocumentEncoder


@dataclass(frozen=True)
class Layout:
    """The locations and names of the output shards.

    root, folders: shards are written to each folder in `folders` under `root` ("" is the root itself).
    template, first: format of a shard's stem and the number of the first shard.
    shard_sequences: sequences per shard; None chooses it from the size of the data.
    per_source: each source has a folder with its name, which contains the `folders`.
    """

    root: str
    folders: tuple[str, ...] = ("",)
    template: str = "shard-{:07d}"
    first: int = 0
    shard_sequences: int | None = None
    per_source: bool = False

    def folders_of(self, source: str) -> tuple[str, ...]:
        """Return the folders of the output of `source`; without `per_source` all sources share one output."""
        if not self.per_source:
            return self.folders
        names = self.folders if len(self.folders) > 1 else ("",)
        return tuple(f"{source}/{name}".rstrip("/") for name in names)

    def folder(self, name: str) -> str:
        """Return the path or URL of a folder."""
        return storage.join(self.root, name) if name else self.root

    def shard(self, folder: str, index: int) -> str:
        """Return the path or URL of shard number `index` (from 0) of a folder."""
        return storage.join(self.folder(folder), self.template.format(self.first + index) + ".tar")


@dataclass(frozen=True)
class PreprocessJob:
    """The inputs and settings of a preprocessing run.

    The fields before `max_bad_fraction` determine the content of the output; it and the fields after it do not. With
    `has_flags`, the encoder's ids have flags (open_lm.data.token_flags).
    """

    inputs: tuple[InputFile, ...]
    layout: Layout
    tokenizer: str | None
    seq_len: int = 2048
    kind: str = "npy"
    options: ReadOptions = field(default_factory=ReadOptions)
    seed: int = 0
    shuffle: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    mixture: dict[str, Any] | None = None
    split_documents: bool = False
    drop_tail: bool = False
    has_flags: bool = False
    max_bad_fraction: float = DEFAULT_BAD_FRACTION
    workers: int | None = None
    memory_limit: int | None = None
    ray_address: str | None = None
    ray_options: dict[str, Any] = field(default_factory=dict)
    work_dir: str | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.seq_len < 1:
            problems.append(f"--seqlen must be at least 1, found {self.seq_len}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            problems.append(f"--seed must fit 64 bits, found {self.seed}")
        if self.kind not in MEMBER_KINDS:
            problems.append(f"--format must be one of {', '.join(MEMBER_KINDS)}, found {self.kind!r}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"the number of workers must be at least 1, found {self.workers}")
        if self.layout.shard_sequences is not None and self.layout.shard_sequences < 1:
            problems.append(f"a shard must hold at least 1 sequence, found {self.layout.shard_sequences}")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"--max-bad-fraction must be from 0 to 1, found {self.max_bad_fraction}")
        if problems:
            raise ConfigError(join_problems(problems))

    @property
    def length(self) -> int:
        """Token ids per sequence: seq_len inputs plus one, since the targets are shifted by one token."""
        return self.seq_len + 1

    @cached_property
    def sources(self) -> list[str]:
        """The sorted names of all sources; a source's number is its index in this list."""
        return sorted({self.sampling.source_of(item.url) for item in self.inputs})

    @property
    def num_bytes(self) -> int:
        """The total size of the input files."""
        return sum(item.num_bytes for item in self.inputs)

    def settings(self, tokenizer: dict[str, Any]) -> dict[str, Any]:
        """Return the settings, as JSON values, that must match for two runs on the same inputs to give the same output.

        tokenizer: facts about the tokenizer, such as its fingerprint and vocabulary size.
        """
        return {
            "version": TOOL_VERSION,
            "tokenizer": self.tokenizer,
            **tokenizer,
            "seq_len": self.seq_len,
            "format": self.kind,
            "content_key": self.options.content_key,
            "separator": self.options.separator,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shard_sequences": self.layout.shard_sequences,
            "folders": [name for source in self.sources for name in self.layout.folders_of(source)]
            if self.layout.per_source
            else list(self.layout.folders),
            "per_source": self.layout.per_source,
            "sampling": self.sampling.record(),
            "split_documents": self.split_documents,
            "drop_tail": self.drop_tail,
        }


def shard_size(num_sequences: int, requested: int | None) -> int:
    """Return the sequences per shard: `requested`, or 8192, or fewer so that a small data set fills about 16 shards."""
    return requested or min(8192, max(64, -(-num_sequences // 16)))


def work_folder_name(root: str) -> str:
    """Return the name of the work folder for an output at `root`, used when it is outside the output folder."""
    return f"open_lm-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}"


def input_records(inputs: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Return the inputs as dataset.json records them: without modification times, which differ between copies."""
    return [
        {"url": item.url, "num_bytes": item.num_bytes} | ({"etag": item.etag} if item.etag else {}) for item in inputs
    ]
