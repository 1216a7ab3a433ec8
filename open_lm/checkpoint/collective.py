"""The collective that checkpoint threads use to coordinate. It also works without a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from open_lm.errors import StorageError, UserError, join_problems

T = TypeVar("T")


def reduce_scatter(
    group: dist.ProcessGroup | None,
    error_prefix: str,
    local_step: Callable[[], T],
    global_step: Callable[[list[T]], list[Any] | None],
) -> Any:
    """Run `local_step` on every rank of `group`, then `global_step` of the results on rank 0.

    `global_step` returns one result per rank, which is this function's result on that rank, or None for all ranks.

    An error on any rank is raised on all ranks, as a UserError with the same message; `global_step` then does not run.
    An error that is not a UserError becomes a StorageError that starts with `error_prefix`.
    """
    if group is None:
        combined, error = _try(error_prefix, lambda: global_step([local_step()]))
        if error is not None:
            raise error
        return combined[0] if combined is not None else None
    size, is_master = dist.get_world_size(group), dist.get_rank(group) == 0
    gathered: list[Any] | None = [None] * size if is_master else None
    dist.gather_object(_try(error_prefix, local_step), gathered, dst=0, group=group)
    outcomes = _global_outcomes(error_prefix, gathered, global_step) if gathered is not None else None
    outcome: list[Any] = [None]
    dist.scatter_object_list(outcome, outcomes, src=0, group=group)
    result, error = outcome[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return result


def _global_outcomes(
    error_prefix: str, gathered: list[Any], global_step: Callable[[list[Any]], list[Any] | None]
) -> list[Any]:
    """Return (result, error) for each rank."""
    errors = {str(error): error for _, error in gathered if error is not None}
    if errors:
        first = next(iter(errors.values()))
        error = first if len(errors) == 1 else type(first)(join_problems(list(errors), "several ranks failed"))
        return [(None, error)] * len(gathered)
    results, error = _try(error_prefix, lambda: global_step([result for result, _ in gathered]))
    return [(result, error) for result in results or [None] * len(gathered)]


def _try(error_prefix: str, function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Return (result, error) of a function, with an error that can be sent to other ranks."""
    try:
        return function(), None
    except UserError as error:
        return None, error
    except Exception as error:  # may not be picklable
        return None, StorageError(f"{error_prefix} ({type(error).__name__}: {error})")
