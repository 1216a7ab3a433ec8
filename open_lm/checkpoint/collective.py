"""What the checkpoint's thread says to other ranks. Works without a process group too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from open_lm.errors import StorageError, UserError, join_problems

T = TypeVar("T")


def reduce_scatter(
    group: dist.ProcessGroup | None, each: Callable[[], T], combine: Callable[[list[T]], list[Any] | None]
) -> Any:
    """Call `each` on every rank of `group`, and `combine` of the results on rank 0; each rank returns its entry of
    what `combine` gives (None for all).

    An error on any rank is raised on all, as a UserError of the same words; `combine` runs only without one.
    """
    if group is None:
        combined = combine([each()])
        return combined[0] if combined is not None else None
    size, is_master = dist.get_world_size(group), dist.get_rank(group) == 0
    gathered: list[Any] | None = [None] * size if is_master else None
    dist.gather_object(_attempt(each), gathered, dst=0, group=group)
    answers: list[Any] | None = None
    if gathered is not None:
        errors = {str(error): error for _, error in gathered if error is not None}
        outcome = (
            (None, _one_of(list(errors.values())))
            if errors
            else _attempt(lambda: combine([result for result, _ in gathered]))
        )
        results = outcome[0] if outcome[0] is not None else [None] * size
        answers = [(result, outcome[1]) for result in results]
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers, src=0, group=group)
    result, error = answer[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return result


def _attempt(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error
    except Exception as error:  # may hold what cannot be sent
        return None, StorageError(f"{type(error).__name__}: {error}")


def _one_of(errors: list[UserError]) -> UserError:
    if len(errors) == 1:
        return errors[0]
    return type(errors[0])(join_problems([str(error) for error in errors], "the ranks found problems"))
