"""Generate the answers of a batch of prompts greedily, with a KV cache.

Legend: B prompts of the batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.evaluate.icl.prompts import Ids
from open_lm.kernels.token_scores import most_likely_tokens
from open_lm.tokenizer import Tokenizer


class NextToken:
    """The `loss` with which a model returns the most likely next token of each sequence instead of logits.

    Sequences are padded on the left, so the last hidden state predicts the next token.
    """

    per_token = False
    logit_means = None

    def from_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
        """Return (B,) int64 from hidden states (B,T,D); the others are those of `most_likely_tokens`."""
        return most_likely_tokens(hidden[:, -1], weight, bias, **settings)

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return (B,) int64 from logits (B,T,V)."""
        return logits[:, -1].float().argmax(-1)


class AnswerDecoder:
    """Decodes generated token ids as llm-foundry does, and recognizes where an answer ends.

    Args:
        tokenizer: the tokenizer of the prompts.
        prefix_space: whether the tokenizer encodes " a" as one token; for others, a space precedes the text.
        stops: regular expressions; the answer ends before the first match.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_space: bool, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.prefix = "" if prefix_space else " "
        self.stop = re.compile("|".join(stops)) if stops else None

    def text(self, ids: Sequence[int]) -> str:
        """Return the generated text, up to the end of the document."""
        if self.tokenizer.eot_id in ids:
            ids = ids[: list(ids).index(self.tokenizer.eot_id)]
        known = [i for i in ids if i < self.tokenizer.vocab_size]
        return self.prefix + self.tokenizer.decode(known)

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Return whether more tokens would not change the answer."""
        if ids[-1] == self.tokenizer.eot_id:
            return True
        return self.stop is not None and self.stop.search(self.text(ids)) is not None


def generate_answers(  # noqa: PLR0917 (the settings of a batch)
    model: nn.Module,
    prompts: Sequence[Ids],
    max_new_tokens: Sequence[int],
    decoder: AnswerDecoder,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    any_rank: Callable[[bool], bool] = bool,
) -> list[str]:
    """Return the text that the model generates after each prompt.

    Args:
        model: in evaluation mode.
        prompts: B prompts (n,) int32 of any lengths, not empty.
        max_new_tokens: maximum number of tokens of each answer.
        decoder: decodes the answers and ends them.
        device: device of the model.
        autocast: a factory of autocast contexts.
        any_rank: return whether the argument is true on any rank. If the ranks compute every forward pass together,
            none may stop before the others.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    has_padding = any(len(prompt) < width for prompt in prompts)
    ids, mask = ids.to(device), mask.to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    is_done = [False] * len(prompts)
    cache, loss = None, NextToken()
    while any_rank(not all(is_done)):
        with autocast():
            chosen, _, cache = model(
                ids, past_key_values=cache, use_cache=True, attention_mask=mask if has_padding else None, loss=loss
            )
        for row, token in enumerate(chosen.tolist()):
            if is_done[row]:
                continue
            answers[row].append(token)
            is_done[row] = len(answers[row]) >= max_new_tokens[row] or decoder.is_complete(answers[row])
        ids = chosen[:, None]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    return [decoder.text(answer) for answer in answers]
