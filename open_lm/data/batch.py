"""A batch of one rank: token ids in their stored dtype, from which inputs and masked targets are computed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_lm.config.sections import DataConfig
from open_lm.data.masking import IGNORE_INDEX, document_ids, mask_targets
from open_lm.data.shard_format import PAD_ID
from open_lm.data.teacher_cache import StoredTargets
from open_lm.data.token_flags import ID_BITS, ID_MASK


@dataclass(frozen=True)
class TargetMask:
    """The --target-mask-left, --target-mask-individual and --squash-mask-left of a run."""

    left: int | None = None
    individual: int | None = None
    squash: bool = False

    @classmethod
    def from_config(cls, data: DataConfig) -> TargetMask:
        return cls(data.target_mask_left, data.target_mask_individual, data.squash_mask_left)


@dataclass(frozen=True)
class Batch:
    """One rank's sequences of a global batch in their stored dtype; inputs and targets are computed on their device.

    stored_ids (B, T + 1) of `token_flags.stored_dtype`; only signed ids hold PAD_ID or flags. `filled` (B,) bool marks
    the sequences that hold data, `num_samples` is their number, `per_source` their number by source. `skipped` counts
    the filler sequences in place of samples that were too short or (if tolerated) broken. `teacher` has the stored
    distributions of --distill-cache.
    """

    stored_ids: Tensor
    filled: Tensor
    num_samples: int
    per_source: tuple[int, ...]
    skipped: int
    vocab_size: int
    mask: TargetMask
    teacher: StoredTargets | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Send batches from a worker as plain bytes through its pipe.

        torch would send a shared-memory descriptor for each tensor. That is slower for so few bytes and fails where
        /dev/shm is small, as in containers.
        """
        others = (getattr(self, field.name) for field in fields(self)[2:])
        return _from_arrays, (self.stored_ids.numpy(), self.filled.numpy(), *others)

    @cached_property
    def tokens(self) -> Tensor:
        """All ids (B, T + 1) int64; padding becomes the last id of the vocabulary, like any negative id."""
        stored = self.stored_ids
        tokens = (stored & ID_MASK if self._may_have_flags else stored).to(torch.int64)
        return tokens.masked_fill(stored == PAD_ID, self.vocab_size + PAD_ID) if self._may_be_padded else tokens

    @property
    def inputs(self) -> Tensor:
        """(B, T) int64."""
        return self._split[0]

    @property
    def targets(self) -> Tensor:
        """(B, T) int64; IGNORE_INDEX where masked, padded or filler."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        targets = self.tokens[:, 1:]
        if self._may_be_padded:
            targets = targets.masked_fill(self.stored_ids[:, 1:] < 0, IGNORE_INDEX)
        inputs, targets = mask_targets(
            self.tokens[:, :-1],
            targets,
            mask_left=self.mask.left,
            mask_individual=self.mask.individual,
            squash=self.mask.squash,
        )
        if self.num_samples < len(self.stored_ids):
            targets = targets.masked_fill(~self.filled[:, None], IGNORE_INDEX)
        return inputs.contiguous(), targets.contiguous()

    def documents(self, end_of_text_id: int) -> Tensor | None:
        """Return the number of each input's document in its sequence, (B, T) int32; None if no stored id has flags.

        A sequence without flags has the documents that `end_of_text_id` ends (`masking.document_ids`).
        """
        if not self._may_have_flags:
            return None
        stored = self.stored_ids[:, :-1]
        starts = ((stored >> ID_BITS & 1) * (stored != PAD_ID)).to(torch.int32)
        numbers = starts.cumsum(-1, dtype=torch.int32)
        has_flags = numbers[:, -1:] > 0
        return torch.where(has_flags, numbers, document_ids(self.inputs, end_of_text_id))

    @property
    def _may_be_padded(self) -> bool:
        return self.stored_ids.dtype.is_signed

    @property
    def _may_have_flags(self) -> bool:
        return self.stored_ids.dtype == torch.int32 and self.vocab_size <= ID_MASK

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the copy from page-locked memory is asynchronous."""
        stored_ids, filled = (tensor.to(device, non_blocking=True) for tensor in (self.stored_ids, self.filled))
        return replace(self, stored_ids=stored_ids, filled=filled)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return replace(self, stored_ids=self.stored_ids.pin_memory(), filled=self.filled.pin_memory())


def _from_arrays(stored_ids: np.ndarray, filled: np.ndarray, *others: Any) -> Batch:
    return Batch(torch.from_numpy(stored_ids), torch.from_numpy(filled), *others)
