"""The training batches of one rank, built from the flags, with a position that can be saved and restored.

    loader = build_train_loader(config.data, seq_len=…, vocab_size=…, batch_size=…, rank=…, world_size=…, seed=…)
    for batch, state in loader.batches(num_steps): …

Batch path: training/trainer.py iterates over `TrainLoader.batches`; next: batch.py prepares them.
`state` is the position after the batch. `build_train_loader` with a state resumes with the next sequence, on any number
of ranks and workers. The loaders of validation sets are in validation_loader.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from open_lm.config.sections import DataConfig
from open_lm.data.batch import Batch, BatchSpec, TargetMask, load_batches
from open_lm.data.epochs import check_run_length
from open_lm.data.fetch import FetchFolder
from open_lm.data.mixture import samples_per_source
from open_lm.data.order import DataOrder, OrderSettings, Source
from open_lm.data.sources import check_data_key, find_sources
from open_lm.data.stream import StreamSpec, lazy_size_of

logger = logging.getLogger(__name__)


class TrainLoader:
    """The batches of one rank; they end only if the number of passes is limited and the data runs out.

    `sources` are the data sets of the mixture, `state` is the position after the last batch. With `allow_changed`, a
    state of other data is accepted with a warning (see `resume.resume_state`).
    """

    def __init__(self, spec: BatchSpec, workers: int, folder: FetchFolder | None, allow_changed: bool = False) -> None:
        self._spec, self._workers, self._folder, self._allow_changed = spec, workers, folder, allow_changed
        self._iterator: Iterator[tuple[Batch, dict[str, Any]]] | None = None
        self._logged: set[str] = set()
        self.sources: tuple[Source, ...] = spec.stream.sources
        self.state = self._order_from(spec.state).state()

    def _order_from(self, state: dict[str, Any] | None) -> DataOrder:
        spec = self._spec
        order = DataOrder(
            self.sources,
            spec.seed,
            spec.order,
            size_of=lazy_size_of(spec.stream),
            state=state,
            allow_changed=self._allow_changed,
        )
        if order.change_warning and spec.rank == 0:
            logger.warning(order.change_warning)
        return order

    @property
    def tokens_available(self) -> list[int | None]:
        """Tokens of one pass over each source; None if shards must be read to know."""
        sequences = [source.num_sequences for source in self.sources]
        return [None if number is None else number * self._spec.stream.seq_len for number in sequences]

    def batches(self, num_batches: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield the next `num_batches` batches, each with the state after it (JSON-able).

        Another call continues after the last batch. DataError, StorageError: from reading the data.
        """
        for _ in range(num_batches):
            if self._iterator is None:
                self._iterator = load_batches(replace(self._spec, state=self.state), self._workers, self._logged)
            try:
                batch, state = next(self._iterator)
            except BaseException:
                self.close()
                raise
            self._log_new_passes(state)
            self.state = state
            yield batch, state

    def _log_new_passes(self, state: dict[str, Any]) -> None:
        for source, before, after in zip(self.sources, self.state["sources"], state["sources"], strict=True):
            if after["pass"] > before["pass"] and self._spec.rank == 0:
                logger.info(f"starting pass {after['pass'] + 1} over {source.name}")

    def has_batches(self, state: dict[str, Any], num_batches: int) -> bool:
        """Return whether the data has `num_batches` batches after `state`; sources of unknown size are assumed to."""
        if self._spec.order.max_passes is None:
            return True
        taken = sum(source["samples"] for source in state["sources"])
        count = taken + num_batches * self._spec.global_batch_size
        needed = samples_per_source([source.weight for source in self.sources], count)
        sizes = [source.num_sequences for source in self.sources]
        return all(size is None or number <= size for size, number in zip(sizes, needed, strict=True))

    def rewind(self, state: dict[str, Any], skip_batches: int = 0) -> None:
        """Move to `skip_batches` global batches after `state`."""
        self.close()
        order = self._order_from(state)
        order.take(skip_batches * self._spec.global_batch_size)
        self.state = order.state()

    def close(self) -> None:
        """Stop the workers; `batches` would start new ones from the state."""
        self._iterator = None


def build_train_loader(
    data: DataConfig,
    *,
    seq_len: int,
    vocab_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    state: dict[str, Any] | None = None,
) -> TrainLoader:
    """Build the loader of one rank's training batches.

    `batch_size` is the rank's number of sequences per optimizer step, over all accumulated micro-batches. `state` is
    the one that `batches` yielded with the last step to keep; its seed replaces `seed`. Raises ConfigError, DataError
    or StorageError at once for missing shards, weights that do not fit the sources, too little data for the run in one
    pass, or a state of other data (without --allow-changed-data).
    """
    data = DataConfig.from_object(data)
    check_data_key(data.data_key, "--data-key")
    sources = find_sources(data)
    one_pass = bool(data.dataset_manifest) and not data.multiple_data_passes
    global_batch_size = batch_size * world_size
    check_run_length(
        data, sources, one_pass=one_pass, seq_len=seq_len, global_batch_size=global_batch_size, log=rank == 0
    )
    folder = FetchFolder.if_needed(sources)
    spec = BatchSpec(
        stream=StreamSpec.from_config(data, sources, data.data_key, folder, seq_len=seq_len, vocab_size=vocab_size),
        order=OrderSettings(
            resampled=data.dataset_resampled,
            shuffle_samples=not data.disable_buffer,
            max_passes=1 if one_pass else None,
        ),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        mask=TargetMask.from_config(data),
        state=state,
    )
    return TrainLoader(spec, data.workers, folder, data.allow_changed_data)
