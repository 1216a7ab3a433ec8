"""From token ids to inputs and targets: cutting a training window out of a chunk, masking targets from the loss, and
telling a row's documents apart.

Masked targets are -100, which losses.py leaves out of both the sum and the count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_lm.errors import DataError
from open_lm.model.losses import IGNORE_INDEX


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

    mask_left (L): only what follows the last L of a row stays a target; L itself does not.
    mask_individual (P): never a target (padding).
    squash: every L is taken out and the rest moves left; P (0 without P) fills up the inputs, `ignore_index` the
        targets.

        inputs   a b c L d e L f P    ->  a b c d e f P P P
        targets  b c L d e L f P P    ->  _ _ _ _ f _ _ _ _

    Inputs and targets are squashed each for itself, as OpenLM always has: an L that opens a row stands in the inputs
    only, and what follows it is then shifted by one. Put at least one token before L.
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
    """Move the kept elements of each row (B, T) to its left, in their order, and fill up with `fill`."""
    order = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)
    places = torch.arange(rows.shape[-1], device=rows.device)
    return rows.gather(-1, order).masked_fill(places >= keep.sum(-1, keepdim=True), fill)


def mask_sequence(chunk: Tensor, start_idx: int, args: Any, ignore_tok: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, seq_len) from `start_idx` of a chunk (B, > start_idx + seq_len) of ids.

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
    """Inputs and targets (B, args.seq_len) from a chunk of ids (B, at least seq_len + 1).

    A longer chunk is cut at a random place, from torch's global generator. DataError for a shorter one.
    """
    spare = chunk.shape[1] - (args.seq_len + 1)
    if spare < 0:
        raise DataError(
            f"the chunk holds {chunk.shape[1]} ids a row, seq_len {args.seq_len} needs {args.seq_len + 1}: "
            "use a model with a smaller seq_len or tokenize the data again"
        )
    start = int(torch.randint(0, spare + 1, (1,))) if spare else 0
    return mask_sequence(chunk, start, args)


def document_ids(inputs: Tensor, end_of_text_id: int) -> Tensor:
    """The document of each token, numbered from 0 in each row: inputs (B,T) int64 -> (B,T) int32, on their device.

    The end-of-text token belongs to the document that it ends, the next token begins a new one:

        inputs   b c E d e f E E g P      E end of text, P padding
        ids      0 0 0 0 1 1 1 1 2 3 3

    A row begins where a chunk was cut, mostly inside a document; that piece is document 0, with positions from 0.
    Padding belongs to the row's last document: it comes after all of that document's tokens, which therefore never see
    it, and its own targets are masked. (Padded with the end-of-text token, each pad is a document of its own.)
    Targets stay as they are: the target of an end-of-text token is the first token of the next document, trained on
    as without the mask.
    """
    is_end = inputs == end_of_text_id
    return is_end.cumsum(-1, dtype=torch.int32) - is_end.to(torch.int32)
