"""Batches on the device that trains on them, one ahead.

A batch comes from the loader in the width its ids are stored in (two bytes where the vocabulary allows) and becomes
int64 inputs and targets on the device. On CUDA that happens on a stream of its own while the batch before it is trained
on, so that neither the copy nor the widening is waited for. The CPU takes the same way without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from open_lm.data.batch import Batch

State = TypeVar("State")


@dataclass(frozen=True)
class DeviceBatch:
    """A rank's rows of a global batch on the device: inputs, targets (B, T) int64, filled (B,) bool; as in `Batch`."""

    inputs: Tensor
    targets: Tensor
    filled: Tensor
    num_samples: int
    per_source: tuple[int, ...]
    skipped: int


def on_device(batches: Iterable[tuple[Batch, State]], device: torch.device) -> Iterator[tuple[DeviceBatch, State]]:
    """The batches on `device`, each with what came with it; the next one is fetched and copied ahead.

    What comes with a batch stays with it: the state after a batch is handed out with that batch, though the loader
    itself stands one further by then. Who stops early goes on with `loader.rewind(state)`. An error in fetching a batch
    is raised after the batch before it has been handed out.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: list[tuple[_OnItsWay, State]] = []
    failure: Exception | None = None
    try:
        for batch, state in batches:
            ahead.append((_OnItsWay(batch, device, stream), state))
            if len(ahead) == 2:
                sent, its_state = ahead.pop(0)
                yield sent.arrived(), its_state
    except Exception as error:
        failure = error
    for sent, its_state in ahead:
        yield sent.arrived(), its_state
    if failure is not None:
        raise failure


class _OnItsWay:
    """A batch whose copy has begun, on `stream` where there is one."""

    def __init__(self, batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> None:
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
            )
        self._event = None if stream is None else stream.record_event()

    def arrived(self) -> DeviceBatch:
        """The batch; what the current stream does from now on waits for it, the caller does not."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            for tensor in (self._batch.inputs, self._batch.targets, self._batch.filled):
                tensor.record_stream(current)  # the other stream owns its memory, and may not use it again too early
        return self._batch
