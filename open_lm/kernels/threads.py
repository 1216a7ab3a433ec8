"""Choose the CPU threads of a short pass by its work: a step of text generation, or a small micro-batch of training.

The threads of an operator wait for each other when it ends. If other processes use the cores, a wait lasts until the
scheduler runs the slowest thread, which is milliseconds. A step of a small model has hundreds of operators of a few
microseconds: with two threads on two cores and one other busy process it becomes ten or more times slower, while it
gains almost nothing on an idle machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Multiply-adds of a matrix product that keep a thread busy for about a millisecond.
MIN_WORK_PER_THREAD = 1 << 22

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_INITIAL_THREADS = torch.get_num_threads()
_matrix_sizes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def threads_for_work(work: int, max_threads: int) -> int:
    """Return the number of threads, 1 to max_threads, for matrix products of `work` multiply-adds each."""
    return max(1, min(max_threads, work // MIN_WORK_PER_THREAD))


@contextmanager
def limit_threads(model: nn.Module, num_tokens: int, device: torch.device) -> Iterator[None]:
    """Limit the threads of the `with` block to those that passes over `num_tokens` tokens at a time need.

    The previous number is restored afterwards. Nothing changes on another device than a CPU, nor if the user has chosen
    a number: by OMP_NUM_THREADS, MKL_NUM_THREADS, or torch.set_num_threads after this module was imported. A number
    that was set earlier is the maximum.
    """
    before = torch.get_num_threads()
    threads = before
    if before > 1 and device.type == "cpu" and not _is_users_choice(before):
        threads = threads_for_work(num_tokens * _mean_matrix_size(model), before)
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_users_choice(threads: int) -> bool:
    return threads != _INITIAL_THREADS or any(name in os.environ for name in _VARIABLES)


def _mean_matrix_size(model: nn.Module) -> int:
    """Return the mean number of elements of the matrices in the model's blocks.

    Embeddings and the output layer do not count: they are few operators of a step. A stack of matrices, as in a mixture
    of experts, counts as one of its matrices.
    """
    if model not in _matrix_sizes:
        blocks = getattr(model, "layers", model)
        sizes = [p.shape[-1] * p.shape[-2] for p in blocks.parameters() if p.dim() > 1]
        _matrix_sizes[model] = sum(sizes) // max(1, len(sizes))
    return _matrix_sizes[model]
