"""Rows of preference data and prompts as data sets of TRL, without rows that are too long."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any

from open_lm import storage
from open_lm.distributed.processes import run_on_master
from open_lm.errors import DataError, join_problems
from open_lm.finetune.preference_data import LOCATION, Row, is_conversation

_MAX_LISTED = 10


def pair_tokens(row: Row, tokenizer: Any) -> int:
    """Return the number of tokens of the prompt with the longer completion. Raise DataError if the template fails."""
    return max(_tokens(row, row["prompt"], row[key], tokenizer) for key in ("chosen", "rejected"))


def prompt_tokens(row: Row, tokenizer: Any) -> int:
    """Return the number of tokens of the prompt. Raise DataError if the template fails."""
    return _tokens(row, row["prompt"], None, tokenizer)


def _tokens(row: Row, prompt: Any, completion: Any, tokenizer: Any) -> int:
    if not is_conversation(row):
        return len(tokenizer(prompt + (completion or ""))["input_ids"]) + (completion is not None)  # the end of text
    try:
        ids = tokenizer.apply_chat_template(
            prompt + (completion or []), add_generation_prompt=completion is None, return_dict=True
        )
    except Exception as error:  # jinja and templates raise errors of many types
        raise DataError(
            f"{row[LOCATION]}: the chat template fails for this conversation ({type(error).__name__}: {error}); "
            "correct the row or the template"
        ) from error
    return len(ids["input_ids"])


def fitting(rows: Sequence[Row], num_tokens: Sequence[int], limit: int, policy: str) -> list[Row]:
    """Return the rows of at most `limit` tokens.

    Raises:
        DataError: rows are longer and the policy is "error", or no row remains.
    """
    long = [(row, length) for row, length in zip(rows, num_tokens, strict=True) if length > limit]
    if long and policy == "error":
        listed = [f"{row[LOCATION]}: has {length} tokens" for row, length in long[:_MAX_LISTED]]
        if len(long) > _MAX_LISTED:
            listed.append(f"and {len(long) - _MAX_LISTED} further rows")
        heading = f"expected at most {limit} tokens; shorten these rows, or drop them with --overlong drop"
        raise DataError(join_problems(listed, heading))
    kept = [row for row, length in zip(rows, num_tokens, strict=True) if length <= limit]
    if long:
        logging.warning(f"dropped {len(long)} of {len(rows)} rows that are longer than {limit} tokens")
    if not kept:
        raise DataError(f"all {len(rows)} rows are longer than {limit} tokens; shorten them")
    return kept


def stored_dataset(rows: Sequence[Row], folder: str, split: str) -> Any:
    """Return rows as a data set that is stored in a folder, where TRL also caches what it computes from it. Collective.

    Raises:
        DataError: values of a key have types that a column cannot have.
    """
    import datasets

    datasets.disable_progress_bars()
    content = json.dumps(rows, ensure_ascii=False, sort_keys=True, allow_nan=False)
    target = storage.join(folder, f"{split}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")

    def write() -> None:
        if os.path.isdir(target):
            return
        shutil.rmtree(f"{target}.incomplete", ignore_errors=True)
        try:
            dataset = datasets.Dataset.from_list(list(rows))
        except Exception as error:  # pyarrow raises several types
            raise DataError(f"{rows[0][LOCATION]} and later rows: the types of the values differ ({error})") from error
        dataset.save_to_disk(f"{target}.incomplete")
        os.rename(f"{target}.incomplete", target)

    run_on_master(write)
    return datasets.load_from_disk(target)
