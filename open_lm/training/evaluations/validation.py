"""The validation loss of the live model, at the ends of epochs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from open_lm.data.token_bytes import token_bytes
from open_lm.data.tokenizers import find_data_tokenizer, find_run_tokenizer
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import run_on_master
from open_lm.errors import ConfigError
from open_lm.evaluate.validation import EvaluationOptions, evaluate_sets, loss_problems, validation_metrics
from open_lm.monitor.loggers import append_line, filter_lines
from open_lm.storage.strict_json import to_json
from open_lm.training.build import RunParts, end_of_text_id
from open_lm.training.evaluations.moment import Moment, Results


class Validation:
    """The validation sets of --val-data, evaluated every --val-frequency epochs and after the last one.

    Attributes:
        results: one dict per validation set, of the last validation; None before the first one.
        step: the step of the last validation.
    """

    name = "val"

    def __init__(self, parts: RunParts, counts: np.ndarray | None = None) -> None:
        self._parts = parts
        self._token_bytes = None if counts is None else torch.from_numpy(counts).to(parts.runtime.device)
        self.results: list[dict[str, Any]] | None = None
        self.step: int | None = None

    @classmethod
    def create(cls, parts: RunParts, weights: str | None) -> Validation | None:
        """Return the validation of a run, or None without --val-data."""
        if not parts.val_loaders:
            return None
        return cls(parts, run_on_master(lambda: _token_bytes(parts, weights)))

    def is_due(self, moment: Moment) -> bool:
        every = self._parts.config.validation.val_frequency
        return moment.epochs_done is not None and (moment.epochs_done % every == 0 or moment.is_last)

    def run(self, moment: Moment) -> Results:
        """Evaluate the sets and append the results to results.jsonl."""
        parts, self.step = self._parts, moment.step
        self.results = results = evaluate_sets(parts.model, parts.val_loaders, self._options(moment))
        if moment.average is not None:
            for result in results:
                result["average"] = moment.average
        if parts.paths.enabled:
            run_on_master(lambda: append_line(parts.paths.results, to_json(results)))
        for problem in loss_problems(results):
            logging.error(problem)
        return Results(validation_metrics(results))

    def rewind(self, moment: Moment) -> None:
        """Remove the results of later validations from results.jsonl; the run will repeat them."""
        paths, tokens = self._parts.paths, moment.tokens or 0
        if paths.enabled:
            run_on_master(
                lambda: filter_lines(paths.results, lambda line: (line[0].get("train_tokens") or 0) <= tokens)
            )

    def _options(self, moment: Moment) -> EvaluationOptions:
        parts, config = self._parts, self._parts.config
        return EvaluationOptions(
            runtime=parts.runtime,
            layout=parts.layout,
            autocast=get_autocast(config.precision.precision, parts.runtime.device.type),
            cfg=config.validation,
            model_name=config.model.hf_model or config.model.model,
            checkpoint_path=moment.checkpoint,
            train_tokens=moment.tokens,
            log_every=config.logging.log_every_n_steps,
            end_of_text_id=end_of_text_id(config, [s for loader in parts.val_loaders for s in loader.sources]),
            token_bytes=self._token_bytes,
        )


def _token_bytes(parts: RunParts, weights: str | None) -> np.ndarray | None:
    """Return the bytes of text of each id (V,) int64; None without a copy of the tokenizer of the validation sets."""
    sources = [source for loader in parts.val_loaders for source in loader.sources]
    try:
        run = find_data_tokenizer(sources, weights) or (None if weights is None else find_run_tokenizer(weights))
        counts = None if run is None or run.copy is None else token_bytes(run.copy)
    except ConfigError as error:
        logging.warning(f"validation reports no bits per byte: {error}")
        return None
    if counts is None:
        return None
    table = np.zeros(max(parts.params.vocab_size, len(counts)), dtype=np.int64)
    table[: len(counts)] = counts
    return table
