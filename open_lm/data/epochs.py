"""Epoch lengths in steps, and checks of the run's length against its data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from open_lm.config.sections import DataConfig
from open_lm.data.mixture import samples_per_source
from open_lm.data.order import Source
from open_lm.errors import ConfigError, DataError, join_problems

logger = logging.getLogger(__name__)


def epoch_sequences(epoch_tokens: int, seq_len: int) -> int:
    """Return the sequences of an epoch of --train-num-samples tokens; a sequence trains seq_len tokens."""
    return epoch_tokens // seq_len


def epoch_end_step(epoch: int, *, epoch_tokens: int, seq_len: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps after `epoch` epochs.

    Only full global batches are trained on. The remainder of an epoch counts towards the next one, so that after all
    epochs less than one global batch is missing.
    """
    return epoch * epoch_sequences(epoch_tokens, seq_len) // global_batch_size


def pass_tokens(sources: Sequence[Source], seq_len: int) -> int:
    """Return the tokens of one pass over all sources. ConfigError if the number of their sequences is not known."""
    sizes = [source.num_sequences for source in sources]
    unknown = [source.name for source, size in zip(sources, sizes, strict=True) if size is None]
    if unknown:
        raise ConfigError(
            f"--train-num-samples is missing: an epoch cannot be one pass over {unknown[0]}, which has no manifest; "
            "set it, or create the manifest with python -m open_lm.utils.make_wds_manifest --data-dir FOLDER"
        )
    return sum(size for size in sizes if size is not None) * seq_len


class Remainder(NamedTuple):
    """What is not trained on: sequences that do not fill a global batch, and tokens that do not fill a sequence."""

    sequences: int
    tokens: int


def run_remainder(epochs: int, *, epoch_tokens: int, seq_len: int, global_batch_size: int) -> Remainder:
    """Return the part of `epochs` epochs of --train-num-samples tokens that is not trained on."""
    sequences = epochs * epoch_sequences(epoch_tokens, seq_len)
    return Remainder(sequences % global_batch_size, epochs * (epoch_tokens % seq_len))


def check_run_length(
    data: DataConfig,
    sources: Sequence[Source],
    *,
    one_pass: bool,
    seq_len: int,
    global_batch_size: int,
    lanes: int,
    log: bool,
) -> None:
    """Check that the run has at least one step, and with `one_pass` that one pass over the data is long enough.

    `lanes` is that of the data order. With `log`, log what the run does not train on. Runs without --train-num-samples
    are not checked.
    """
    if data.train_num_samples is None:
        return
    run = {"epoch_tokens": data.train_num_samples, "seq_len": seq_len, "global_batch_size": global_batch_size}
    steps = epoch_end_step(data.epochs, **run)
    if steps == 0:
        raise ConfigError(
            f"--train-num-samples: {data.train_num_samples} tokens in {data.epochs} epochs are "
            f"{data.epochs * epoch_sequences(data.train_num_samples, seq_len)} sequences of {seq_len}, less than one "
            f"global batch of {global_batch_size}; use more tokens or a smaller batch"
        )
    if one_pass:
        check_enough_data(sources, steps * global_batch_size, seq_len, lanes)
    if log:
        _log_remainder(run_remainder(data.epochs, **run), seq_len, global_batch_size)
        if one_pass:
            _log_unused_sequences(sources, steps * global_batch_size, lanes)


def check_enough_data(sources: Sequence[Source], count: int, seq_len: int, lanes: int = 1) -> None:
    """Raise DataError that lists every source whose first pass is too short for `count` samples of the mixture."""
    problems = []
    for source, needed in zip(sources, samples_per_source([s.weight for s in sources], count, lanes), strict=True):
        available = source.num_sequences
        if available is not None and needed > available:
            problems.append(
                f"{source.name} has {available} sequences ({available * seq_len} tokens), "
                f"{needed} ({needed * seq_len} tokens) are needed"
            )
    if problems:
        heading = (
            f"Not enough data for {count} sequences in one pass; use --multiple-data-passes, more data, or a smaller "
            "--train-num-samples or --epochs"
        )
        raise DataError(join_problems(problems, heading))


def _log_remainder(remainder: Remainder, seq_len: int, global_batch_size: int) -> None:
    if remainder.sequences or remainder.tokens:
        logger.info(
            f"not trained on, of --train-num-samples x --epochs: {remainder.sequences} sequences that do not fill a "
            f"last global batch of {global_batch_size}, and {remainder.tokens} tokens that do not fill a sequence of "
            f"{seq_len}"
        )


def _log_unused_sequences(sources: Sequence[Source], count: int, lanes: int) -> None:
    """Log how many sequences of each source a run of `count` samples in one pass does not use."""
    for source, used in zip(sources, samples_per_source([s.weight for s in sources], count, lanes), strict=True):
        if source.num_sequences is not None and source.num_sequences > used:
            unused = source.num_sequences - used
            logger.info(f"{source.name}: this run does not use {unused} of its {source.num_sequences} sequences")
