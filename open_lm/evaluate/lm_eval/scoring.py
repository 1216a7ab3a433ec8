"""Score continuations and generate texts for the requests of lm-eval, in batches of the ICL engine.

Legend: B prompts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from open_lm.evaluate.icl.evaluator import without_compilation
from open_lm.evaluate.icl.packing import batches_of_lengths, equal_choices, form_batches, pack_example
from open_lm.evaluate.icl.prompts import Choice, Example
from open_lm.evaluate.icl.scoring import BatchLayout, score_units
from open_lm.generate.sampling import Sampling, generate_ids
from open_lm.model.transformer import Transformer
from open_lm.monitor.watchdog import heartbeat
from open_lm.parallel.parallelize import evaluation_mode
from open_lm.tokenizer import Tokenizer

_MAX_GROUP = 64  # continuations that are computed in one batch because they may share a context


class Pair(NamedTuple):
    """The token ids of a context, which is not empty, and of the continuation whose probability is computed."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-probability of a continuation, and whether each of its tokens is the most likely one."""

    log_prob: float
    is_greedy: bool


@dataclass(frozen=True)
class Engine:
    """A model and how its batches are computed.

    Attributes:
        model: a native model.
        device: its device.
        autocast: a factory of autocast contexts.
        batch_tokens: padded tokens of a batch.
    """

    model: Transformer
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    batch_tokens: int

    def score(self, groups: Sequence[Sequence[Pair]]) -> Iterator[tuple[int, list[Score]]]:
        """Yield (index of a group, its scores), in the order in which batches are computed.

        The pairs of a group may share the first tokens of their contexts, which are then computed once.
        """
        layout = BatchLayout.of_model(self.model, self.device)
        examples = [Example(index, "", tuple(map(_choice, group))) for index, group in enumerate(groups)]
        units = [pack_example(example, layout.width) for example in examples]
        with evaluation_mode(self.model), without_compilation(self.model):
            for batch in form_batches(units, self.batch_tokens, padded=not layout.is_flat):
                heartbeat("evaluating with lm-eval")
                scores = score_units(self.model, batch, layout, self.device, self.autocast)
                for unit, score in zip(batch, scores, strict=True):
                    order = equal_choices(unit.example)
                    sums = [float(score.log_probs[choice].sum(dtype=np.float64)) for choice in order]
                    greedy = [bool(score.is_greedy[choice].all()) for choice in order]
                    yield unit.example.index, [Score(*pair) for pair in zip(sums, greedy, strict=True)]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, tokenizer: Tokenizer, stops: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        """Yield (index of a prompt, generated text), in the order in which batches are computed.

        Args:
            prompts: token ids, none empty, each with place for the new tokens.
            sampling: settings that all prompts share. The random choices depend on the seed and the other prompts, but
                not on the size of batches.
            tokenizer: decodes the ids; its end-of-text token ends a text.
            stops: a text ends before the first of these strings.
        """
        sampling = replace(sampling, stop_ids=(tokenizer.eot_id,), vocab_limit=tokenizer.vocab_size)
        first_row = 0
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        for batch in batches_of_lengths(lengths, self.batch_tokens):
            heartbeat("evaluating with lm-eval")
            with without_compilation(self.model), self.autocast():
                steps = generate_ids(self.model, [prompts[index] for index in batch], sampling, first_row)
                texts = _texts(steps, len(batch), tokenizer, stops)
            yield from zip(batch, texts, strict=True)
            first_row += len(batch)


def split_groups(pairs: Sequence[Pair], keys: Sequence[object]) -> list[list[int]]:
    """Return the indices of consecutive pairs with equal keys, in groups of limited size."""
    groups: list[list[int]] = []
    for index in range(len(pairs)):
        if index and keys[index] == keys[index - 1] and len(groups[-1]) < _MAX_GROUP:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _choice(pair: Pair) -> Choice:
    return Choice(np.asarray(pair.context, dtype=np.int32), np.asarray(pair.continuation, dtype=np.int32))


def _texts(
    steps: Iterator[list[int | None]], num_prompts: int, tokenizer: Tokenizer, stops: Sequence[str]
) -> list[str]:
    """Return the text of each prompt from the steps of `generate_ids`, of which only the necessary ones run."""
    ids: list[list[int]] = [[] for _ in range(num_prompts)]
    is_done = [False] * num_prompts
    window = max((len(stop.encode()) for stop in stops), default=0) + 1  # a token has at least one byte
    for step in steps:
        for row, token in enumerate(step):
            if token is None or token == tokenizer.eot_id:
                is_done[row] = True
            elif not is_done[row]:
                ids[row].append(token)
                recent = tokenizer.decode(ids[row][-window:])
                is_done[row] = any(stop in recent for stop in stops)
        if all(is_done):
            break
    return [_before_stops(tokenizer.decode(row), stops) for row in ids]


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text
