"""The loss of a batch of token ids, for every layout of ranks.

Legend: B sequences of this rank's batch, T sequence.
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
    """How to run the model.

    Attributes:
        layout: the layout of ranks.
        autocast: a factory of autocast contexts for the compute precision.
        end_of_text_id: the id that ends a document if attention stays within documents, else None.
    """

    @property
    def layout(self) -> MeshLayout: ...
    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]: ...
    @property
    def end_of_text_id(self) -> int | None: ...


def batch_loss(model: nn.Module, ids: Tensor, loss: TokenLoss, options: ForwardOptions) -> Tensor:
    """Return `loss` of the model's predictions for full sequences of ids (B,T).

    With context parallelism the summed loss covers this rank's tokens only; per-token losses cover all tokens, (B,T).
    """
    layout, masks = options.layout, dict[str, Any]()
    documents = None if options.end_of_text_id is None else document_ids(ids, options.end_of_text_id)
    if layout.context > 1:
        masks["attention_mask"] = context_parallel_mask(layout, ids.shape[1], ids.device, documents)
        ids, loss = shard_sequences(ids, layout), replace(loss, targets=shard_sequences(loss.targets, layout))
    elif documents is not None:
        masks["document_ids"] = documents
    with options.autocast():
        result: Tensor = model(ids, loss=loss, **masks)[0]
    return gather_sequences(result, layout) if loss.per_token else result
