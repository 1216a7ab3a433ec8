"""From token ids to their loss, the same in any layout of ranks.

Legend: B rows of this rank's batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from open_lm.config.layout import MeshLayout
from open_lm.data.masking import document_ids
from open_lm.distributed.context_parallel import context_parallel_mask, gather_sequences, shard_sequences
from open_lm.model.losses import TokenLoss


class ForwardOptions(Protocol):
    """How the model is called: the layout of ranks, the precision, and the id that ends a document, inside which
    attention then stays."""

    @property
    def layout(self) -> MeshLayout: ...
    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]: ...
    @property
    def end_of_text_id(self) -> int | None: ...


def batch_loss(model: nn.Module, ids: Tensor, loss: TokenLoss, options: ForwardOptions) -> Tensor:
    """`loss` of the model's predictions from whole rows of ids (B,T).

    With context parallelism a sum is that of this rank's tokens; losses of single tokens are those of all, (B,T).
    """
    layout, more = options.layout, dict[str, Any]()
    documents = None if options.end_of_text_id is None else document_ids(ids, options.end_of_text_id)
    if layout.context > 1:
        more["attention_mask"] = context_parallel_mask(layout, ids.shape[1], ids.device, documents)
        ids, loss = shard_sequences(ids, layout), replace(loss, targets=shard_sequences(loss.targets, layout))
    elif documents is not None:
        more["document_ids"] = documents
    with options.autocast():
        result: Tensor = model(ids, loss=loss, **more)[0]
    return gather_sequences(result, layout) if loss.per_token else result
