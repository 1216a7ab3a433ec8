"""Make the indexes of --train-text when a run starts: each node tokenizes its share of the units.

The ranks synchronize every few seconds, so that no collective waits long, and rank 0 logs the progress. A run that was
killed continues its index. See docs/internals/raw_text.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.config.sections import Config, DataConfig
from open_lm.data.cache import Cache
from open_lm.data.epochs import pass_tokens
from open_lm.data.fetch import FetchSettings
from open_lm.data.manifest import DATASET_NAME, MANIFEST_NAME, TEXT_PREFIX
from open_lm.data.order import Source
from open_lm.data.sources import find_sources
from open_lm.data.text_folder import CACHE_NAME, INDEX_FOLDER, STATE_NAME, TAILS_STEM, TextFolder
from open_lm.data.text_index import (
    TextIndex,
    bad_fraction,
    check_reports,
    describe,
    finish,
    is_current,
    load_encoder,
    plan_index,
    save_reports,
    start,
    text_folder,
    text_state,
)
from open_lm.data.text_pool import TextPool
from open_lm.data.text_units import UnitReport
from open_lm.distributed.processes import Runtime, broadcast_object, gather_objects, run_on_all_ranks, run_on_master
from open_lm.errors import ConfigError
from open_lm.monitor.run_folder import RunPaths
from open_lm.system.cpus import available_cpus
from open_lm.tokenizer import COPY_FOLDER, FILE_NAMES

_ROUND_S = 5.0
_MAX_LOG_S = 60.0
_TOKENIZER_FILES = tuple(storage.join(COPY_FOLDER, name) for name in FILE_NAMES)


class IndexingStopped(Exception):
    """A stop signal arrived while an index was made. The units tokenized so far are saved."""


@dataclass(frozen=True)
class _Nodes:
    """The nodes of the run: the index of this one, their count, and whether this rank tokenizes for its node."""

    number: int
    count: int
    is_leader: bool

    @classmethod
    def of(cls, runtime: Runtime) -> _Nodes:
        leads = broadcast_object(runtime, gather_objects(runtime.local_rank == 0))
        is_leader = runtime.local_rank == 0
        return cls(sum(leads[: runtime.rank + 1]) - 1, sum(leads), is_leader)


def prepare_text(
    args: argparse.Namespace,
    config: Config,
    architecture: Mapping[str, Any],
    runtime: Runtime,
    paths: RunPaths,
    *,
    stack: ExitStack,
    is_stopped: Callable[[], bool],
) -> Config:
    """Make or check the index of each value of --train-text; return the configuration that reads it. Collective.

    Sets --train-num-samples in `args` to one pass over the text if it is not given. Without --train-text, returns
    `config`.

    Raises:
        ConfigError, DataError: no tokenizer, unusable input, or an index of other data.
        IndexingStopped: `is_stopped` returned True on a rank.
    """
    if not config.data.train_text:
        return config
    nodes = _Nodes.of(runtime)
    data = _with_folders(config.data, runtime, nodes, paths, stack)
    FetchSettings.from_config(data, None)  # checks --cache-dir and --cache-limit
    seq_len = _seq_len(args, architecture)
    tokenizer, vocab_size = config.live_evaluation.tokenizer, architecture.get("vocab_size")
    with ExitStack() as locks:
        indexes, dtype = run_on_master(lambda: _plan(data, tokenizer, seq_len, vocab_size, locks))
        for name, index in zip(data.train_text or [], indexes, strict=True):
            folder = text_folder(str(data.text_index), name)  # on this node
            if index is not None:
                _make(replace(index, folder=folder), dtype, data, nodes, is_stopped)
            elif runtime.is_master:
                logging.info(f"{name}: the text index {folder.path} is up to date")
            _share(folder, nodes, [f"{TAILS_STEM}.tar", MANIFEST_NAME, STATE_NAME, *_TOKENIZER_FILES, DATASET_NAME])
    sources = find_sources(data)
    if runtime.is_master and any(indexes):
        _log_cache(sources, data, nodes)
    if args.train_num_samples is None:
        args.train_num_samples = pass_tokens(sources, seq_len)
    return replace(config, data=replace(data, train_num_samples=args.train_num_samples))


def _with_folders(data: DataConfig, runtime: Runtime, nodes: _Nodes, paths: RunPaths, stack: ExitStack) -> DataConfig:
    """Return the settings with the folders of the indexes and the cache, temporary ones if there is no run folder."""
    root = data.text_index
    if root is not None and storage.is_remote(root):
        raise ConfigError(f"--text-index {root}: expected a local folder")
    if root is None and paths.enabled:
        root = storage.join(paths.root, INDEX_FOLDER)
    if root is None:
        root = run_on_master(lambda: tempfile.mkdtemp(prefix="open_lm-text-"))
        if nodes.is_leader:
            stack.callback(shutil.rmtree, root, ignore_errors=True)
    root = os.path.abspath(storage.local_path(root))
    cache = data.cache_dir or storage.join(root, CACHE_NAME)
    return replace(data, text_index=root, cache_dir=cache, data_key="npy")


def _seq_len(args: argparse.Namespace, architecture: Mapping[str, Any]) -> int:
    seq_len = args.hf_seq_len if args.hf_model else architecture.get("seq_len")
    if not isinstance(seq_len, int):
        flag = "--hf-seq-len" if args.hf_model else f"seq_len in the JSON file of --model {args.model}"
        raise ConfigError(f"--train-text: needs {flag}, the length of a sequence")
    return seq_len


def _plan(
    data: DataConfig, tokenizer: str | None, seq_len: int, vocab_size: int | None, locks: ExitStack
) -> tuple[list[TextIndex | None], np.dtype[Any]]:
    """Plan the indexes that must be made, lock their folders, and write what their processes need; on rank 0 only.

    Returns the index of each value of --train-text (None: up to date), and the dtype of token ids.
    """
    encoder = load_encoder(data, tokenizer)
    if vocab_size is not None and encoder.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer}: has {encoder.vocab_size} ids, but the model's vocabulary has {vocab_size}; set "
            f"vocab_size in the model's JSON file to at least {encoder.vocab_size}, or use a smaller tokenizer"
        )
    states = [text_state(data, name, str(tokenizer), encoder, seq_len) for name in data.train_text or []]
    indexes: list[TextIndex | None] = []
    for state in states:
        folder = text_folder(str(data.text_index), state.name)
        index = None
        if not is_current(folder, state, data.allow_changed_data):
            storage.makedirs(folder.path)
            locks.enter_context(_locked(folder))
            if not is_current(folder, state, data.allow_changed_data):  # another run may have made it in the meantime
                index = plan_index(folder, state)
                start(index, encoder)
        indexes.append(index)
    return indexes, encoder.dtype


@contextlib.contextmanager
def _locked(folder: TextFolder) -> Iterator[None]:
    """Hold the lock of an index's folder. Raise ConfigError if another run holds it."""
    with open(folder.url(".lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--text-index: another run makes {folder.path} at the moment; wait for it, or use another folder"
            ) from None
        yield


def _make(
    index: TextIndex, dtype: np.dtype[Any], data: DataConfig, nodes: _Nodes, is_stopped: Callable[[], bool]
) -> None:
    """Tokenize the units without a report, and finish the index."""
    folder, progress = index.folder, _Progress(index)
    run_on_master(progress.log_start)
    _share(folder, nodes, [STATE_NAME, *_TOKENIZER_FILES])
    units = index.missing[nodes.number :: nodes.count] if nodes.is_leader else []
    settings = FetchSettings.from_config(data, None)
    cache = (str(settings.cache_dir), settings.cache_limit_bytes)
    with TextPool(folder, units, cache, available_cpus()) if nodes.is_leader else _no_pool() as pool:
        is_done = False
        while not is_done:
            reports = run_on_all_ranks(lambda: pool.work(_ROUND_S, is_stopped) if pool is not None else [])
            gathered = gather_objects((reports, 0 if pool is None else pool.done_bytes, is_stopped()))
            is_done, stops = run_on_master(partial(progress.add, gathered, bad_fraction(data)))
            if stops:
                raise IndexingStopped
    run_on_master(lambda: progress.finish(dtype, data))


@contextlib.contextmanager
def _no_pool() -> Iterator[None]:
    yield None


class _Progress:
    """The progress of an index on rank 0: collects the reports of all nodes and logs how long the rest will take."""

    def __init__(self, index: TextIndex) -> None:
        self._index, self._start_s = index, time.monotonic()
        self._next_log_s = 0.0  # seconds after the start
        self._missing_bytes = sum(unit.num_bytes for unit in index.missing)

    def log_start(self) -> None:
        """Log what will be tokenized."""
        index = self._index
        done = len(index.units) - len(index.missing)
        logging.info(
            f"{index.state.name}: indexing {self._missing_bytes / 1e6:,.1f} MB of input in "
            f"{len(index.state.inputs):,} files{f'; {done} of {len(index.units)} units are done already' * bool(done)}"
        )

    def add(self, gathered: Sequence[tuple[Sequence[UnitReport], int, bool]], limit: float) -> tuple[bool, bool]:
        """Save the reports of a round; return whether all units are done, and whether a rank must stop."""
        index, reports = self._index, [report for node, _, _ in gathered for report in node]
        index.reports |= {report.key: report for report in reports}
        save_reports(index.folder, reports)
        check_reports(index, limit)
        is_done, done_bytes = not index.missing, sum(done for _, done, _ in gathered)
        if not is_done:
            self._log(done_bytes)
        return is_done, any(stops for _, _, stops in gathered)

    def _log(self, done_bytes: int) -> None:
        seconds, total = time.monotonic() - self._start_s, self._missing_bytes
        if seconds < self._next_log_s:
            return
        self._next_log_s = seconds + min(seconds / 4, _MAX_LOG_S)
        text = f"{self._index.state.name}: indexed {done_bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB of input"
        if done_bytes:
            rate = done_bytes / seconds
            text += f", {rate / 1e6:,.1f} MB/s, about {(total - done_bytes) / rate:,.0f} s left"
        logging.info(text)

    def finish(self, dtype: np.dtype[Any], data: DataConfig) -> None:
        """Write the index and log its counts."""
        index = self._index
        counts = finish(index, dtype, data.allow_changed_data)
        for mismatch in [report.mismatch for report in index.reports.values() if report.mismatch][:1]:
            logging.warning(
                f"{index.state.name}: some text was encoded with the slower reference tokenizer: {mismatch}"
            )
        seconds = time.monotonic() - self._start_s
        logging.info(f"{index.state.name}: {describe(index.folder, counts)}; made in {seconds:.1f} s")


def _log_cache(sources: Sequence[Source], data: DataConfig, nodes: _Nodes) -> None:
    """Log whether training tokenizes the text again, and when preprocessing is the better choice."""
    columns = [zip(source.shards, source.num_bytes, strict=True) for source in sources]
    num_bytes = sum(size or 0 for column in columns for url, size in column if url.startswith(TEXT_PREFIX))
    size = f"the tokenized text ({num_bytes / 1e6:,.1f} MB)"
    if num_bytes > storage.parse_bytes(data.cache_limit):
        text = f"{size} exceeds --cache-limit {data.cache_limit}, so each pass tokenizes the rest again"
    elif nodes.count > 1:
        text = f"{size} fits in the cache; a node tokenizes units that another one indexed when it first reads them"
    elif missing := _missing_units(data):
        text = (
            f"{size} fits in --cache-limit {data.cache_limit}, but other files in {data.cache_dir} leave no space for "
            f"{missing} of its units, which each pass tokenizes again; remove them, or use another --cache-dir"
        )
    else:
        text = f"{size} is in the cache, so training does not tokenize it again"
    logging.info(f"{text}. For many passes or runs, `open-lm preprocess` is better: it shuffles all sequences")


def _missing_units(data: DataConfig) -> int:
    """Return how many units of all texts are not in the cache of this node."""
    folders = [text_folder(str(data.text_index), name) for name in data.train_text or []]
    units = [unit for folder in folders for unit in folder.units.values()]
    cache_dir = FetchSettings.from_config(data, None).cache_dir
    return len(units) - Cache(str(cache_dir), None, 0).count(unit.identity for unit in units)


def _read_if_present(url: str) -> bytes | None:
    return storage.read_bytes(url) if storage.exists(url) else None


def _share(folder: TextFolder, nodes: _Nodes, names: Sequence[str]) -> None:
    """Copy files of rank 0's folder to the folders of all other nodes. Collective."""
    if nodes.count == 1:
        return

    def read() -> dict[str, bytes | None]:
        return {name: _read_if_present(folder.url(name)) for name in names}

    files = run_on_master(read)

    def write() -> None:
        for name, content in files.items() if nodes.is_leader else ():
            url = folder.url(name)
            if content is None:
                storage.remove(url)
            elif _read_if_present(url) != content:
                storage.write_bytes(url, content)

    run_on_all_ranks(write)
