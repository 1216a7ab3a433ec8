"""Copy batches to the training device, one batch ahead.

The loader's batches have the dtype their ids are stored in (two bytes if the vocabulary allows) and become int64 inputs
and targets on the device. On CUDA a separate stream does this during the step on the previous batch, so that training
waits neither for the copy nor for the conversion. The CPU uses the same code without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from open_lm.data.batch import Batch
from open_lm.kernels.sparse_targets import SparseTargets

State = TypeVar("State")


@dataclass(frozen=True)
class DeviceBatch:
    """A rank's sequences of a global batch on the device; fields as in `Batch`.

    inputs, targets (B, T) int64; filled (B,) bool. documents (B, T) int32 are the documents that stored flags mark
    (`Batch.documents`); None without flags, or if attention is not limited to documents. `stored` are the teacher's
    distributions of --distill-cache.
    """

    inputs: Tensor
    targets: Tensor
    filled: Tensor
    num_samples: int
    per_source: tuple[int, ...]
    skipped: int
    documents: Tensor | None = None
    stored: SparseTargets | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the batch."""
        yield from (self.inputs, self.targets, self.filled)
        if self.documents is not None:
            yield self.documents
        if self.stored is not None:
            yield from (self.stored.ids, self.stored.weights, self.stored.entropies)


def on_device(
    batches: Iterable[tuple[Batch, State]], device: torch.device, end_of_text_id: int | None = None
) -> Iterator[tuple[DeviceBatch, State]]:
    """Yield the batches on `device`, each with its state, and load and copy the next one ahead.

    With `end_of_text_id`, attention is limited to documents.

    The yielded state belongs to the yielded batch, although the loader is already one batch further. A caller that
    stops early continues with `loader.rewind(state)`. An error while loading a batch is raised after the batch before
    it was yielded.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: list[tuple[_PendingCopy, State]] = []
    failure: Exception | None = None
    try:
        for batch, state in batches:
            ahead.append((_PendingCopy(batch, device, stream, end_of_text_id), state))
            if len(ahead) == 2:
                copy, copy_state = ahead.pop(0)
                yield copy.result(), copy_state
    except Exception as error:
        failure = error
    for copy, copy_state in ahead:
        yield copy.result(), copy_state
    if failure is not None:
        raise failure


class _PendingCopy:
    """A batch that is being copied to the device, on `stream` if there is one."""

    def __init__(
        self, batch: Batch, device: torch.device, stream: torch.cuda.Stream | None, end_of_text_id: int | None
    ) -> None:
        self._device = device
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            moved = batch.to(device)
            self._batch = DeviceBatch(
                inputs=moved.inputs,
                targets=moved.targets,
                filled=moved.filled,
                num_samples=batch.num_samples,
                per_source=batch.per_source,
                skipped=batch.skipped,
                documents=None if end_of_text_id is None else moved.documents(end_of_text_id),
                stored=None if batch.teacher is None else batch.teacher.on_device(device),
            )
        self._event = None if stream is None else stream.record_event()

    def result(self) -> DeviceBatch:
        """Return the batch without blocking; later work on the current stream waits for the copy."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            for tensor in self._batch.tensors():
                tensor.record_stream(current)  # the copy stream owns the memory and must not reuse it too early
        return self._batch
