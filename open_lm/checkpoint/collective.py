"""What the checkpoint's thread says to other ranks. Works without a process group too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from open_lm.errors import StorageError, UserError, join_problems

T = TypeVar("T")


def reduce_scatter(
    group: dist.ProcessGroup | None,
    about: str,
    each: Callable[[], T],
    combine: Callable[[list[T]], list[Any] | None],
) -> Any:
    """Call `each` on every rank of `group`, and `combine` of the results on rank 0; each rank returns its entry of
    what `combine` gives (None for all).

    An error on any rank is raised on all, as a UserError of the same words; `combine` runs only without one. An error
    that is none of ours becomes a StorageError that begins with `about`.
    """
    if group is None:
        combined, error = _attempt(about, lambda: combine([each()]))
        if error is not None:
            raise error
        return combined[0] if combined is not None else None
    size, is_master = dist.get_world_size(group), dist.get_rank(group) == 0
    gathered: list[Any] | None = [None] * size if is_master else None
    dist.gather_object(_attempt(about, each), gathered, dst=0, group=group)
    answers = _answers(about, gathered, combine) if gathered is not None else None
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers, src=0, group=group)
    result, error = answer[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return result


def _answers(about: str, gathered: list[Any], combine: Callable[[list[Any]], list[Any] | None]) -> list[Any]:
    """(result, error) for each rank."""
    errors = {str(error): error for _, error in gathered if error is not None}
    if errors:
        first = next(iter(errors.values()))
        error = first if len(errors) == 1 else type(first)(join_problems(list(errors), "the ranks found problems"))
        return [(None, error)] * len(gathered)
    results, error = _attempt(about, lambda: combine([result for result, _ in gathered]))
    return [(result, error) for result in results or [None] * len(gathered)]


def _attempt(about: str, function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error
    except Exception as error:  # may hold what cannot be sent
        return None, StorageError(f"{about} ({type(error).__name__}: {error})")
