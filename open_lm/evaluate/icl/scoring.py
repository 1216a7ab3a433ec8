"""Compute the log-probabilities of the continuations of a batch of examples in one forward pass.

Logits are computed only where a scored token is predicted.
Legend: B sequences of the batch, T length of the longest one, N scored tokens of the batch, D model width,
V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm.evaluate.icl.packing import PackedSequence, Unit, pack
from open_lm.kernels.document_attention import DocumentMask
from open_lm.kernels.general_attention import AttentionOptions
from open_lm.kernels.prefix_attention import PrefixAttention
from open_lm.kernels.token_scores import TokenScores, logits_scores, token_scores
from open_lm.model.attention import xformers_attn
from open_lm.model.transformer import Transformer
from open_lm.parallel.parallelize import unwrap


@dataclass(frozen=True)
class ChoiceScores:
    """The scores of the continuations of an example.

    Attributes:
        log_probs: by choice, (n,) float32 log-probabilities of its tokens.
        max_log_probs: by choice, those of the most likely tokens.
        is_greedy: by choice, (n,) bool, whether each token is the most likely one.
    """

    log_probs: dict[int, np.ndarray]
    max_log_probs: dict[int, np.ndarray]
    is_greedy: dict[int, np.ndarray]


class ScoredTokens:
    """The `loss` with which a model returns the scores of N tokens instead of logits.

    Args:
        sources: (N,) int64, index in the flattened batch (B*T,) of the token that predicts each scored token. Tokens
            with the same source need one row of logits.
        targets: (N,) int64, the scored tokens.
        device: device of the model.
    """

    per_token = False
    logit_means = None

    def __init__(self, sources: np.ndarray, targets: np.ndarray, device: torch.device) -> None:
        order = np.argsort(sources, kind="stable")
        rows, counts = np.unique(sources, return_counts=True)
        self.rows, self.targets = torch.from_numpy(rows).to(device), torch.from_numpy(targets[order]).to(device)
        self.counts = counts.tolist()
        self._place = torch.from_numpy(np.argsort(order)).to(device)  # of each scored token in `targets`

    def from_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: Any) -> Tensor:
        """Return `TokenScores` as (3,N) float32 from hidden states (B,T,D); the others are those of `token_scores`."""
        states = hidden.flatten(0, 1)[self.rows]
        return self._stacked(token_scores(states, weight, self.targets, bias, counts=self.counts, **settings))

    def from_logits(self, logits: Tensor) -> Tensor:
        """Return `TokenScores` as (3,N) float32 from logits (B,T,V)."""
        return self._stacked(logits_scores(logits.flatten(0, 1)[self.rows].float(), self.targets, self.counts))

    def _stacked(self, scores: TokenScores) -> Tensor:
        return torch.stack([value.float()[self._place] for value in scores])


@dataclass(frozen=True)
class BatchLayout:
    """How the sequences of a batch are stored for a model.

    Attributes:
        width: D of a model that accepts packed sequences; None for a model that does not.
        is_flat: store all sequences in one row without padding, for the CPU kernels of `PrefixAttention`. Otherwise
            each sequence is a padded row.
    """

    width: int | None
    is_flat: bool

    @staticmethod
    def of_model(model: nn.Module, device: torch.device) -> BatchLayout:
        """Return the layout for a model.

        Models of transformers, and attention functions that are not torch's, do not accept an arbitrary mask. Rotary
        frequencies that depend on the length of a sequence need separate sequences.
        """
        inner = unwrap(model)
        if not isinstance(inner, Transformer):
            return BatchLayout(None, False)
        function = inner.params.attn_func
        if function is xformers_attn or isinstance(function, functools.partial):
            return BatchLayout(None, False)
        blocks: Any = inner.layers
        if any(block.attention.needs_lengths for block in blocks):
            return BatchLayout(None, False)
        is_plain = all(block.attention.current_options().is_plain for block in blocks)
        return BatchLayout(inner.params.dim, is_flat=is_plain and device.type == "cpu")


def score_units(
    model: nn.Module,
    units: Sequence[Unit],
    layout: BatchLayout,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Iterator[ChoiceScores]:
    """Yield the scores of each unit of a batch, in order. One forward pass."""
    if layout.is_flat:
        sequences = [pack(prompt for unit in units for prompt in unit.prompts)]
        ids, offsets = sequences[0].ids.astype(np.int64)[None], np.zeros(1, dtype=np.int64)
        mask: DocumentMask | Tensor | None = flat_mask(sequences[0])
    else:
        sequences = [sequence for unit in units for sequence in unit.sequences]
        length = max(len(sequence.ids) for sequence in sequences)
        ids, offsets = _padded([sequence.ids for sequence in sequences], length), np.arange(len(sequences)) * length
        mask = _mask(model, sequences, length, device)
    sources = np.concatenate([sequence.sources + start for sequence, start in zip(sequences, offsets, strict=True)])
    targets = np.concatenate([sequence.targets for sequence in sequences]).astype(np.int64)
    loss = ScoredTokens(sources, targets, device)
    with autocast():
        scores = model(torch.from_numpy(ids).to(device), attention_mask=mask, loss=loss)[0]
    prompts = [prompt for sequence in sequences for prompt in sequence.prompts]
    parts = np.split(scores.cpu().numpy(), np.cumsum([len(prompt.targets) for prompt in prompts])[:-1], axis=1)
    by_prompt = {id(prompt): part for prompt, part in zip(prompts, parts, strict=True)}
    for unit in units:
        values = {prompt.choice: by_prompt[id(prompt)] for prompt in unit.prompts}
        log_probs, max_log_probs, is_greedy = ({choice: part[i] for choice, part in values.items()} for i in range(3))
        yield ChoiceScores(log_probs, max_log_probs, {choice: part > 0 for choice, part in is_greedy.items()})


def _padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return the rows as one array (B,T) int64, with zeros after each."""
    out = np.zeros((len(rows), length), dtype=np.int64)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def _mask(
    model: nn.Module, sequences: Sequence[PackedSequence], length: int, device: torch.device
) -> DocumentMask | Tensor | None:
    """Return the attention mask of a batch; None if it is causal.

    Padding is on the right, so causal attention needs no mask for it. Only functions whose weights depend on the
    length of a sequence do.
    """
    if not sequences[0].is_causal:
        return packed_mask(sequences, length, device)
    inner = unwrap(model)
    if isinstance(inner, Transformer) and isinstance(inner.params.attn_func, functools.partial):
        return torch.from_numpy(_padded([np.ones(len(s.ids)) for s in sequences], length)).to(device)
    return None


def flat_mask(sequence: PackedSequence) -> DocumentMask:
    """Return the mask of one packed sequence on a CPU."""
    attention = PrefixAttention(sequence.pieces)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, _mask: DocumentMask) -> Tensor:
        return attention(queries, keys, values)

    return DocumentMask(torch.from_numpy(sequence.positions.astype(np.int64))[None], attn_func=attend)


def packed_mask(
    sequences: Sequence[PackedSequence], length: int, device: torch.device, window: int | None = None
) -> DocumentMask:
    """Return the mask of packed sequences: a token attends to earlier tokens of its piece and of the piece's prefix.

    Padding tokens attend to themselves. A window limits the distance in positions.
    """
    positions = torch.from_numpy(_padded([sequence.positions for sequence in sequences], length)).to(device)
    is_visible = torch.eye(length, dtype=torch.bool).repeat(len(sequences), 1, 1)
    for row, sequence in zip(is_visible, sequences, strict=True):
        for piece in sequence.pieces:
            for start, stop in (*piece.prefix, (piece.start, piece.stop)):
                row[piece.start : piece.stop, start:stop] = True
    is_visible = is_visible.to(device).tril()
    if window is not None:
        is_visible &= positions[:, :, None] - positions[:, None, :] < window

    def for_options(options: AttentionOptions) -> DocumentMask:
        return packed_mask(sequences, length, device, options.window)

    return DocumentMask(positions, dense=is_visible[:, None], for_options=for_options)
