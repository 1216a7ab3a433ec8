"""Split token ids into inputs and targets, mask targets from the loss, and number the documents of a sequence.

Masked targets are -100; losses.py excludes them from both the sum and the count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_lm.errors import DataError

IGNORE_INDEX = -100  # target of tokens that are not trained on, as in torch


def mask_targets(
    inputs: Tensor,
    targets: Tensor,
    *,
    mask_left: int | None = None,
    mask_individual: int | None = None,
    squash: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Mask targets (B, T), and with `squash` remove the marker from inputs (B, T) and targets.

    mask_left (L): only the tokens after the last L of a sequence remain targets; L itself does not.
    mask_individual (P): never a target (padding).
    squash: remove every L and shift the following tokens left; fill up the inputs with P (0 without P), the targets
        with `ignore_index`.

        inputs   a b c L d e L f P    ->  a b c d e f P P P
        targets  b c L d e L f P P    ->  _ _ _ _ f _ _ _ _

    Inputs and targets are squashed separately, as OpenLM always has: an L at the start of a sequence is in the inputs
    only, so the tokens after it are shifted by one against their targets. Put at least one token before L.
    """
    if mask_left is not None:
        is_marker = targets == mask_left
        masked = is_marker.flip(-1).cumsum(-1).flip(-1) > 0  # this position or a later one is L
        if squash:
            targets = targets.masked_fill(masked & ~is_marker, ignore_index)
            inputs = _squash(inputs, inputs != mask_left, 0 if mask_individual is None else mask_individual)
            targets = _squash(targets, targets != mask_left, ignore_index)
        else:
            targets = targets.masked_fill(masked, ignore_index)
    if mask_individual is not None:
        targets = targets.masked_fill(targets == mask_individual, ignore_index)
    return inputs, targets


def _squash(rows: Tensor, keep: Tensor, fill: int) -> Tensor:
    """Move the kept elements of each row (B, T) to the left, in order, and pad with `fill`."""
    order = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)
    places = torch.arange(rows.shape[-1], device=rows.device)
    return rows.gather(-1, order).masked_fill(places >= keep.sum(-1, keepdim=True), fill)


def mask_sequence(chunk: Tensor, start_idx: int, args: Any, ignore_tok: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, seq_len) from position `start_idx` of a chunk (B, > start_idx + seq_len) of ids.

    `args` has seq_len and may have target_mask_left, target_mask_individual and squash_mask_left (see mask_targets).
    """
    stop = start_idx + args.seq_len
    return mask_targets(
        chunk[:, start_idx:stop].clone(),
        chunk[:, start_idx + 1 : stop + 1].clone(),
        mask_left=getattr(args, "target_mask_left", None),
        mask_individual=getattr(args, "target_mask_individual", None),
        squash=bool(getattr(args, "squash_mask_left", False)),
        ignore_index=ignore_tok,
    )


def sample_chunk(chunk: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, args.seq_len) from a chunk of ids (B, at least seq_len + 1).

    A longer chunk is cropped at a random position, from torch's global generator. DataError for a shorter one.
    """
    spare = chunk.shape[1] - (args.seq_len + 1)
    if spare < 0:
        raise DataError(
            f"the chunk has {chunk.shape[1]} ids per sequence, but seq_len {args.seq_len} needs {args.seq_len + 1}; "
            "use a model with a smaller seq_len or tokenize the data again"
        )
    start = int(torch.randint(0, spare + 1, (1,))) if spare else 0
    return mask_sequence(chunk, start, args)


def document_ids(inputs: Tensor, end_of_text_id: int) -> Tensor:
    """Number the documents of each sequence from 0: inputs (B,T) int64 -> (B,T) int32, on the same device.

    The end-of-text token belongs to the document that it ends; the next token starts a new one:

        inputs   b c E d e f E E g P      E end of text, P padding
        ids      0 0 0 0 1 1 1 1 2 3 3

    Most sequences start in the middle of a document; that piece is document 0, with positions from 0. Padding belongs
    to the last document: it follows all tokens of that document, which therefore never attend to it, and its own
    targets are masked. (If padded with the end-of-text token, each pad is a separate document.) Targets do not change:
    the target of an end-of-text token is the first token of the next document, which is trained on as without the mask.
    """
    is_end = inputs == end_of_text_id
    return is_end.cumsum(-1, dtype=torch.int32) - is_end.to(torch.int32)
