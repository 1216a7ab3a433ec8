"""The tokenizer of a run, for the evaluations that read or write text."""

from __future__ import annotations

from open_lm.data.tokenizers import find_data_tokenizer, find_run_tokenizer
from open_lm.distributed.processes import run_on_all_ranks
from open_lm.errors import ConfigError
from open_lm.tokenizer import Tokenizer, load_tokenizer
from open_lm.training.build import RunParts


def run_tokenizer(parts: RunParts, weights: str | None, flag: str) -> Tokenizer:
    """Return the tokenizer of the training data, or else of the run that trained `weights`. Collective.

    --tokenizer must give the same ids, unless --allow-other-tokenizer is set or neither of them records a tokenizer.

    Args:
        parts: the parts of the run.
        weights: path or URL of the checkpoint that the run loads.
        flag: the flag that needs the tokenizer.

    Raises:
        ConfigError: no usable tokenizer, or --tokenizer gives other ids.
    """
    return run_on_all_ranks(lambda: _find(parts, weights, flag))


def _find(parts: RunParts, weights: str | None, flag: str) -> Tokenizer:
    spec, allow_other = parts.config.live_evaluation.tokenizer, parts.config.data.allow_other_tokenizer
    sources = parts.sources if parts.train_loader is None else parts.train_loader.sources
    run = find_data_tokenizer(sources, weights) or (find_run_tokenizer(weights) if weights is not None else None)
    if run is not None:
        return run.load() if spec is None else run.check(load_tokenizer(spec), allow_other=allow_other)
    if spec is None:
        where = "the dataset.json next to the shards" if sources else f"the run of {weights}"
        raise ConfigError(
            f"{flag} needs the tokenizer that the model is trained with, and {where} records none: give it with "
            "--tokenizer"
        )
    return load_tokenizer(spec)
