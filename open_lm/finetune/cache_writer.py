"""Compute and write the files of a cache of a teacher's distributions, shard by shard; see cache_teacher.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from open_lm import storage
from open_lm.config.distill_section import DistillConfig
from open_lm.data import provenance, teacher_cache
from open_lm.data.batch import Batch, TargetMask
from open_lm.data.fetch import FetchFolder, FetchSettings
from open_lm.data.hashing import hash_key
from open_lm.data.order import Samples, Source
from open_lm.data.shard_format import shard_folder
from open_lm.data.shards import ShardStore
from open_lm.data.sources import check_data_key, find_validation_source
from open_lm.data.stream import SampleReader, StreamSpec
from open_lm.data.teacher_cache import SETTINGS_FILE, CacheSettings, read_settings, shard_problem, write_settings
from open_lm.data.tokenizers import check_tokenizers
from open_lm.data.verify import expected_files
from open_lm.distributed.processes import select_device, world_info_from_env
from open_lm.errors import ConfigError, DataError
from open_lm.finetune.distillation import (
    Teacher,
    find_teacher,
    load_teacher_alone,
    num_token_ids,
    teacher_fingerprint,
)
from open_lm.finetune.distributions import draw_ids, entropies, most_likely_ids, uniform_numbers
from open_lm.kernels.threads import limit_threads
from open_lm.system.names import printable

FOLDER = "teacher"  # of the default --output, next to the shards
_CHUNK_ELEMENTS = 1 << 24  # probabilities in float64 at a time
_REPORT_S = 10.0


@dataclass(frozen=True)
class CacheJob:
    """What is computed: the teacher, the shards, the settings of the cache, and where it is written."""

    teacher: Teacher
    source: Source
    reader: SampleReader
    store: ShardStore
    settings: CacheSettings
    folder: str
    batch_size: int
    fetch_folder: FetchFolder | None  # removed with this object


def open_job(args: argparse.Namespace) -> CacheJob:
    """Load the teacher and the list of shards, and check them, the folder and the tokenizers."""
    check_data_key(args.data_key, "--data-key")
    source = find_validation_source(args.data)
    stems = [url.rpartition("/")[2] for url in source.shards]
    if doubled := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ConfigError(
            f"--data: several shards are named {doubled[0]}; create a cache for each folder, and give them all to "
            "--distill-cache"
        )
    device = teacher_device(args.device)
    found = find_teacher(DistillConfig(distill_model=args.model, distill_pretrained=args.pretrained))
    check_tokenizers([source], [found.weights], args.allow_other_tokenizer)
    end_id = args.end_of_text_id
    if args.document_mask and end_id is None and (end_id := provenance.end_of_text_id([source])) is None:
        raise ConfigError(
            "--document-mask needs the id that ends a document, and no dataset.json next to the shards states it: set "
            "--end-of-text-id"
        )
    teacher = load_teacher_alone(found, args.precision, device, end_id)
    params: Any = teacher.model.params
    num_ids = num_token_ids(params) if args.num_ids is None else args.num_ids
    if num_ids > num_token_ids(params):
        raise ConfigError(f"--num-ids {num_ids}: the teacher has {num_token_ids(params)} ids")
    provenance.check_vocabulary([source], params.vocab_size)
    fetch_folder = FetchFolder.if_needed([source])
    fetch = FetchSettings(fetch_folder.name if fetch_folder else None)
    store = ShardStore(1, fetch, expected_files([source]))
    seq_len = len(_member_ids(store, source.shards[0], args.data_key, 0)) - 1
    is_sampled = args.method == "sample"
    settings = CacheSettings(
        teacher=teacher_fingerprint(found),
        method=args.method,
        count=args.draws if is_sampled else min(args.top_k, num_ids),
        temperature=args.temperature,
        seed=args.seed if is_sampled else 0,
        num_ids=num_ids,
        seq_len=seq_len,
        end_of_text_id=end_id,
        precision=args.precision,
    )
    folder = args.output or storage.join(shard_folder(source.shards[0]), FOLDER)
    _open_folder(folder, settings, {"weights": found.weights, "data": source.name})
    spec = StreamSpec((source,), seq_len, params.vocab_size, args.data_key, fetch=fetch)
    return CacheJob(teacher, source, SampleReader(spec), store, settings, folder, args.batch_size, fetch_folder)


def teacher_device(name: str | None) -> torch.device:
    """Return the device of --device; that of this process's local rank for cuda and by default."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: found no CUDA device; use --device cpu")
    if name in (None, "cuda"):
        return select_device(world_info_from_env()[0], first_flag="--device cuda:0")
    return torch.device(name)


def _member_ids(store: ShardStore, url: str, data_key: str | None, member: int) -> np.ndarray:
    """Return the ids of a member as stored."""
    shard = store.get(url, data_key)
    store.make_readable(shard, np.array([member]))
    return shard.ids(member)


def _open_folder(folder: str, settings: CacheSettings, notes: dict[str, str]) -> None:
    """Write teacher.json, or check that the folder has a cache with these settings."""
    if storage.is_remote(folder):
        raise ConfigError(f"--output {folder}: expected a local folder, from which training reads; copy it afterwards")
    existing = read_settings(folder)
    if existing is None:
        write_settings(folder, settings, {name: printable(value) for name, value in notes.items()})
    elif differences := settings.differences(existing):
        raise ConfigError(
            f"{storage.join(folder, SETTINGS_FILE)}: belongs to another cache: {'; '.join(differences)} as there; "
            "choose another --output, or remove the folder"
        )


# --- the work --------------------------------------------------------------------------------------------------------
def run(job: CacheJob, shards: Sequence[int]) -> None:
    """Write the files of some shards that do not have one, and report progress and bytes per token."""
    source, report = job.source, _Report(job, shards)
    for shard in shards:
        url, size, sha256 = source.shards[shard], source.sizes[shard], source.sha256[shard]
        if not shard_problem(job.folder, url, job.settings, size, sha256):
            report.skip()
            continue
        num_bytes, tokens, num_ids = write_shard(job, shard, report)
        report.finish(url, num_bytes, tokens, num_ids)
    report.end()


def write_shard(job: CacheJob, shard: int, report: _Report) -> tuple[int, int, int]:
    """Compute and write the file of a shard; return its bytes, tokens and stored ids."""
    size = job.reader.size_of(0, shard)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("counts", "ids", "weights", "entropies", "data")}
    for first in range(0, size, job.batch_size):
        members = np.arange(first, min(first + job.batch_size, size))
        _check_lengths(job, shard, members)
        zeros = np.zeros(len(members), np.int64)
        ids, filled = job.reader.read(Samples(zeros, zeros + shard, members, zeros.astype(np.uint64)))
        parts["data"].append(teacher_cache.sequence_hashes(ids))
        for name, values in _distributions(job, ids, filled, parts["data"][-1]).items():
            parts[name].append(values)
        report.add(len(members))
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    starts = np.concatenate(([0], arrays["counts"].sum(1, dtype=np.int64).cumsum()))
    notes = {"settings": job.settings.digest, "shard_sha256": job.source.sha256[shard]}
    num_bytes = teacher_cache.write_shard(job.folder, job.source.shards[shard], {**arrays, "starts": starts}, notes)
    return num_bytes, size * job.settings.seq_len, len(arrays["ids"])


def _check_lengths(job: CacheJob, shard: int, members: np.ndarray) -> None:
    """Raise DataError for a sequence that training would crop at a random place."""
    url = job.source.shards[shard]
    for member in members.tolist():
        length = len(_member_ids(job.store, url, job.reader.spec.data_key, member))
        if length > job.settings.seq_len + 1:
            raise DataError(
                f"{url}: sequence {member} has {length} ids, but the first of the data set has "
                f"{job.settings.seq_len + 1}; training would crop it at a random place, for which no distributions can "
                "be stored: tokenize the data again with one length"
            )


def _distributions(job: CacheJob, ids: np.ndarray, filled: np.ndarray, hashes: np.ndarray) -> dict[str, np.ndarray]:
    """Return counts, ids, weights and entropies of sequences of ids (n, T + 1); those not `filled` have none."""
    settings, device = job.settings, next(job.teacher.model.parameters()).device
    batch = Batch(
        torch.from_numpy(ids),
        torch.from_numpy(filled),
        num_samples=int(filled.sum()),
        per_source=(),
        skipped=0,
        vocab_size=job.reader.spec.vocab_size,
        mask=TargetMask(),
    ).to(device)
    end_id = settings.end_of_text_id
    with limit_threads(job.teacher.model, batch.inputs.numel(), device):
        targets = job.teacher.targets(batch.inputs, None if end_id is None else batch.documents(end_id))
        hidden = targets.hidden[batch.filled].flatten(0, 1)
        uniform = _uniform_numbers(settings, hashes[filled])
        results: list[list[np.ndarray]] = []
        for start in range(0, len(hidden), rows := max(_CHUNK_ELEMENTS // settings.num_ids, 1)):
            part = slice(start, start + rows)
            logits = targets.head.logits(hidden[part], 0, settings.num_ids, torch.float32)
            log_probs = torch.log_softmax(logits.div_(settings.temperature), -1)
            if settings.method == "sample":
                stored = draw_ids(log_probs, torch.from_numpy(uniform[part]).to(device))
            else:
                stored = most_likely_ids(log_probs, settings.count)
            results.append([values.cpu().numpy() for values in (*stored, entropies(log_probs))])
    return _arrays(settings, filled, results)


def _uniform_numbers(settings: CacheSettings, hashes: np.ndarray) -> np.ndarray:
    """Return the random numbers of all draws for sequences with these hashes (n,): float64 (n T, draws)."""
    if settings.method != "sample" or not len(hashes):
        return np.zeros((0, settings.count))
    keys = (hash_key(settings.seed, number) for number in hashes.tolist())
    return np.concatenate([uniform_numbers(key, settings.seq_len, settings.count) for key in keys])


def _arrays(settings: CacheSettings, filled: np.ndarray, results: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of sequences from the parts [counts, ids, weights, entropies] of those that are `filled`."""
    draws_dtype = np.uint8 if settings.count < 256 else np.uint16
    dtypes = {
        "counts": draws_dtype,
        "ids": np.uint16 if settings.num_ids <= 2**16 else np.uint32,
        "weights": draws_dtype if settings.method == "sample" else np.float32,
        "entropies": np.float32,
    }
    arrays = {}
    for number, (name, dtype) in enumerate(dtypes.items()):
        values = np.concatenate([np.zeros(0, dtype), *(part[number].astype(dtype) for part in results)])
        if name in ("counts", "entropies"):
            full = np.zeros((len(filled), settings.seq_len), dtype)
            full[filled] = values.reshape(-1, settings.seq_len)
            values = full
        arrays[name] = values
    return arrays


class _Report:
    """Lines about finished shards, sequences per second, the remaining time, and bytes per token."""

    def __init__(self, job: CacheJob, shards: Sequence[int]) -> None:
        sizes = [job.source.sizes[shard] for shard in shards]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._seq_len, self._shards, self._folder = job.settings.seq_len, len(shards), job.folder
        self._sizes = iter(sizes)
        self._size: int | None = 0
        self._done = self._skipped = self._new = self._shards_done = self._bytes = self._tokens = self._ids = 0
        self._start_s = self._last_s = time.monotonic()

    def skip(self) -> None:
        """Count a shard that has its file already."""
        self._shards_done, self._skipped = self._shards_done + 1, self._skipped + 1
        self._done += next(self._sizes) or 0

    def add(self, sequences: int) -> None:
        """Count sequences, and report every few seconds."""
        self._done, self._new = self._done + sequences, self._new + sequences
        now_s = time.monotonic()
        if now_s - self._last_s >= _REPORT_S:
            self._last_s = now_s
            self._print(f"{self._done} sequences", now_s)

    def finish(self, url: str, num_bytes: int, tokens: int, num_ids: int) -> None:
        """Count a written file."""
        next(self._sizes)
        self._shards_done += 1
        self._bytes, self._tokens, self._ids = self._bytes + num_bytes, self._tokens + tokens, self._ids + num_ids
        share = f"{num_bytes / max(tokens, 1):.1f} bytes and {num_ids / max(tokens, 1):.1f} ids per token"
        self._print(f"{url}: {share}", time.monotonic())

    def end(self) -> None:
        """Summarize all shards."""
        written = self._shards_done - self._skipped
        share = self._bytes / max(self._tokens, 1)
        print(
            f"{self._folder}: {written} of {self._shards} shards written"
            + (f", {share:.1f} bytes per token, {self._bytes / 1e9:.3f} GB" if written else "")
            + (f"; {self._skipped} existed already" if self._skipped else ""),
            flush=True,
        )

    def _print(self, text: str, now_s: float) -> None:
        speed = self._new / max(now_s - self._start_s, 1e-9)
        remaining = ""
        if self._total is not None and speed:
            remaining = f", ETA {timedelta(seconds=round((self._total - self._done) / speed))}"
        print(
            f"[{self._shards_done}/{self._shards} shards] {text}, {speed * self._seq_len:.0f} tokens/s{remaining}",
            flush=True,
        )
