"""Scan shards in parallel: counts, checksum, used token ids and document lengths."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.data.block_sums import BlockHasher
from open_lm.data.npy_block import NpyRows
from open_lm.data.shard_format import PAD_ID, Member, decode_member, index_shard
from open_lm.data.shards import sequence_members
from open_lm.data.token_flags import without_flags
from open_lm.errors import ConfigError, DataError, UserError

_BLOCK_MEMBERS = 256  # members that are counted together
_MAX_ID = 1 << 24  # larger ids are counted as this one: no vocabulary has them, and a broken shard may contain any
_PROGRESS_EVERY_S = 5.0
MAX_BAD_EXAMPLES = 5  # broken members that are listed per shard


@dataclass
class ShardSurvey:
    """The content of one shard. Tokens are all ids except padding. A shard with a `fault` is unusable.

    Pieces are the parts of documents in sequences: a piece ends after an end-of-text id or at the end of a sequence.
    """

    url: str
    num_bytes: int = 0
    sha256: str = ""
    fault: str = ""
    block_sums: dict[str, Any] = field(default_factory=dict)  # of a manifest's line (see open_lm.data.block_sums)
    num_sequences: int = 0
    num_ignored: int = 0  # members of other kinds than the sequences
    num_tokens: int = 0
    num_pads: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # token ids per member including padding -> members
    bad_members: int = 0
    bad_examples: list[str] = field(default_factory=list)
    min_id: int | None = None  # of all ids except padding
    max_id: int | None = None
    used_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64, sorted, nonnegative
    piece_bins: Counter[int] = field(default_factory=Counter)  # b -> pieces of 2**b to 2**(b + 1) - 1 tokens
    ended_pieces: int = 0  # pieces that end with an end-of-text id, i.e. documents that end in this shard
    longest_piece: int = 0


def survey_shard(url: str, eot_id: int | None = None, tmp_dir: str | None = None) -> ShardSurvey:
    """Scan one shard. An unusable shard sets `fault` and raises nothing.

    Without `eot_id`, pieces are full sequences. A remote shard is first copied to `tmp_dir`
    (default: the system's temporary folder).
    """
    survey = ShardSurvey(url)
    try:
        if storage.is_remote(url):
            with tempfile.TemporaryDirectory(dir=tmp_dir) as folder:
                path = os.path.join(folder, "shard.tar")
                storage.download(url, path)
                _read_file(survey, path, eot_id)
        else:
            _read_file(survey, storage.local_path(url), eot_id)
    except UserError as error:
        survey.fault = str(error)
    except OSError as error:
        survey.fault = f"{url}: cannot be read ({error})"
    return survey


def _read_file(survey: ShardSurvey, path: str, eot_id: int | None) -> None:
    survey.num_bytes = os.path.getsize(path)
    if not survey.num_bytes:
        raise DataError(f"{survey.url}: the file is empty; create or copy the shard again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        survey.sha256 = hashlib.sha256(data).hexdigest()
        indexed = index_shard(data, survey.url)
        members = sequence_members(indexed)
        survey.num_sequences = len(members)
        survey.block_sums = _block_sums(data, members, len(indexed))
        survey.num_ignored = len(indexed) - len(members)
        survey.kinds.update(member.kind for member in members)
        used = np.zeros(_MAX_ID + 1, dtype=bool)
        for start in range(0, len(members), _BLOCK_MEMBERS):
            block = list(_decode(survey, data, members[start : start + _BLOCK_MEMBERS], eot_id))
            if sum(map(len, block)):
                _count(survey, block, used, eot_id)
        survey.used_ids = np.flatnonzero(used)


def _block_sums(data: mmap.mmap, members: Sequence[Member], num_files: int) -> dict[str, Any]:
    """Return the checksums of a shard's blocks for its manifest; empty if its members are not evenly spaced npy."""
    stride = BLOCKSIZE * (1 + -(-members[0].size // BLOCKSIZE))
    expected = range(BLOCKSIZE, BLOCKSIZE + len(members) * stride, stride)
    if members[0].kind != "npy" or num_files != len(members) or [m.offset for m in members] != list(expected):
        return {}
    try:
        is_row = NpyRows(data, members).is_row
    except ValueError:
        return {}
    if not is_row.all():
        return {}
    hasher = BlockHasher()
    hasher.update(memoryview(data))
    return hasher.finish(stride).to_json()


def _decode(
    survey: ShardSurvey, data: mmap.mmap, members: Iterable[Member], eot_id: int | None
) -> Iterator[np.ndarray]:
    for member in members:
        try:
            # Without `eot_id`, the string "<|endoftext|>" of old members becomes id 0, as in training.
            data_of_member = data[member.offset : member.offset + member.size]
            ids = without_flags(decode_member(data_of_member, member.kind, eot_id=eot_id or 0))
        except DataError as error:
            survey.bad_members += 1
            if len(survey.bad_examples) < MAX_BAD_EXAMPLES:
                survey.bad_examples.append(f"{survey.url}: member {member.key}.{member.kind}: {error}")
            continue
        survey.lengths[len(ids)] += 1
        yield ids


def _count(survey: ShardSurvey, block: Sequence[np.ndarray], used: np.ndarray, eot_id: int | None) -> None:
    """Add sequences, each int64 (T,), to the counts, and mark their ids in `used` bool (_MAX_ID + 1,)."""
    ids = np.concatenate(block)
    ends = np.cumsum([len(sequence) for sequence in block])  # (sequences,)
    kept = ids != PAD_ID
    if not kept.all():
        survey.num_pads += int(np.count_nonzero(~kept))
        ends = np.concatenate([[0], np.cumsum(kept)])[ends]
        ids = ids[kept]
    if not len(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    survey.num_tokens += len(ids)
    survey.min_id = low if survey.min_id is None else min(low, survey.min_id)
    survey.max_id = high if survey.max_id is None else max(high, survey.max_id)
    used[np.minimum(ids if low >= 0 else ids[ids >= 0], _MAX_ID)] = True
    if eot_id is not None:
        ended = np.flatnonzero(ids == eot_id) + 1
        survey.ended_pieces += len(ended)
        ends = np.union1d(ends, ended)
    pieces = np.diff(ends, prepend=0)
    pieces = pieces[pieces > 0]
    survey.longest_piece = max(survey.longest_piece, int(pieces.max()))
    bins = np.bincount(np.frexp(pieces)[1] - 1)  # frexp: 2**(exponent - 1) <= piece < 2**exponent
    survey.piece_bins.update({number: int(count) for number, count in enumerate(bins) if count})


def survey_shards(
    urls: Sequence[str],
    sizes: Sequence[int] | None = None,
    *,
    workers: int = 1,
    eot_id: int | None = None,
    tmp_dir: str | None = None,
) -> list[ShardSurvey]:
    """Return the survey of each URL in order, computed by `workers` processes. Report progress on standard error.

    With `sizes` (bytes) the progress is measured in bytes instead of shards.
    """
    if workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, found {workers}")
    if tmp_dir is not None:
        storage.makedirs(tmp_dir)
    work = partial(survey_shard, eot_id=eot_id, tmp_dir=tmp_dir)
    if min(workers, len(urls)) < 2:
        return list(_with_progress(map(work, urls), len(urls), sizes))
    # Spawn processes: forked ones would share the connections and locks of this process.
    with ProcessPoolExecutor(min(workers, len(urls)), multiprocessing.get_context("spawn")) as pool:
        return list(_with_progress(pool.map(work, urls), len(urls), sizes))


def _with_progress(surveys: Iterable[ShardSurvey], shards: int, sizes: Sequence[int] | None) -> Iterator[ShardSurvey]:
    total = sum(sizes or ())
    start = last_report = time.monotonic()
    done = 0
    for number, survey in enumerate(surveys, start=1):
        done += survey.num_bytes
        now = time.monotonic()
        if now - last_report >= _PROGRESS_EVERY_S:
            last_report = now
            print(progress_line(number, shards, done, total, now - start), file=sys.stderr, flush=True)
        yield survey


def progress_line(number: int, shards: int, done: int, total: int, elapsed_s: float) -> str:
    """Return a line with the shards and bytes done, the rate, and the remaining time (by bytes if `total` is known)."""
    share = done / total if total > 0 else number / shards
    remaining_s = round(elapsed_s / share - elapsed_s) if share else 0
    rate = done / 1e6 / elapsed_s
    clock = f"{remaining_s // 3600}:{remaining_s // 60 % 60:02d}:{remaining_s % 60:02d}"
    return f"{number:,} of {shards:,} shards ({share:.0%}), {done / 1e6:,.0f} MB, {rate:,.1f} MB/s, {clock} left"
