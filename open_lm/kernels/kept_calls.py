"""Keep the results of calls that selective activation checkpointing would repeat, because it sees no operator in them.

A policy of checkpointing recognizes operators by name. A kernel that torch.compile has generated is none: the backward
pass would run it again. `keep_result` makes such a call once. It holds the call's inputs and what its own backward pass
needs, outside of the checkpointed function's saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachingTorchDispatchMode


class KeptCalls:
    """The results of the calls in one run of a checkpointed function, in order.

    Enter `recording` around its forward pass and `replaying` around each recomputation.
    """

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.recording = _Context(self, is_replay=False)
        self.replaying = _Context(self, is_replay=True)


class _Context:
    """Record or replay the calls of `keep_result` in the `with` block."""

    def __init__(self, calls: KeptCalls, is_replay: bool) -> None:
        self.calls, self.is_replay = calls, is_replay
        self.position = 0  # of the next call to replay
        self._tokens: list[Token[_Context | None]] = []

    def __enter__(self) -> None:
        self.position = 0
        self._tokens.append(_current.set(self))

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())


_current: ContextVar[_Context | None] = ContextVar("kept_calls", default=None)


def keep_result(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors), which a recomputation in the backward pass does not call again.

    The function must depend on these tensors only. Outside of `KeptCalls` this is a plain call.
    """
    context = _current.get()
    if context is None:
        return function(*tensors)
    result: Tensor = _Kept.apply(context, function, *tensors)
    return result


class _Kept(torch.autograd.Function):
    """An autograd function that holds the graph of a call instead of its saved tensors."""

    @staticmethod
    def forward(ctx: Any, context: _Context, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        results = context.calls.results
        if context.is_replay:
            context.position += 1
            return results[context.position - 1].detach()
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        # Identity hooks replace those of the checkpoint, which would drop the saved tensors of the call.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same), _without_policy():
            ctx.result = function(*leaves)
        ctx.leaves = leaves
        results.append(ctx.result.detach())
        return results[-1].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        leaves, result = ctx.leaves, ctx.result
        ctx.leaves = ctx.result = None  # free the tensors before the rest of the backward pass
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(result, needed, grads[0]))
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def _without_policy() -> AbstractContextManager[object]:
    """Return a context in which the policy of selective checkpointing sees no operators.

    It finds saved results by the number of an operator's call, and a recomputation does not repeat those of a kept
    call. In torch 2.7, torch.compile does not compile under a policy.
    """
    is_active = isinstance(_get_current_dispatch_mode(), _CachingTorchDispatchMode)
    return _pop_mode_temporarily() if is_active else nullcontext()


def _same(tensor: Tensor) -> Tensor:
    return tensor
