"""Exchange tokens for expert parallelism, where the ranks of a group divide the experts of a mixture.

Each of N ranks holds E/N experts and has its own tokens. All-to-all exchanges among the group send every token to the
ranks of its experts, and the results back (Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668). With a capacity,
every rank sends C slots for each expert, so all shapes are known in advance and the host never waits for the device.
Without one, the ranks first exchange the numbers of tokens.
Legend: D model width, E experts, C slots of an expert on each rank, N ranks, R rows that a rank receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives


@dataclass(frozen=True)
class RowExchange:
    """The layout of an exchange of rows, with which `return_rows` reverses it.

    Attributes:
        sent: number of rows sent to each rank.
        received: number of rows received from each rank.
        order: (R,) int64, the indices of the received rows in the order of their experts.
        counts: (E/N,) int64, the number of received rows of each expert of this rank.
    """

    sent: list[int]
    received: list[int]
    order: Tensor
    counts: Tensor


class ExpertExchange:
    """The exchange of tokens among the ranks of an expert-parallel group. All methods are collective over the group.

    Args:
        group: the process group of N ranks. Only its name is kept, so that modules with an exchange can be copied.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = group.size()
        self._group: Any = group.group_name

    def send_slots(self, slots: Tensor) -> Tensor:
        """Send the slots of all experts (E,C,D) to the ranks that hold them: -> (E/N, N C, D). Differentiable."""
        experts, capacity, width = slots.shape
        received = self._all_to_all(slots.view(self.ranks, -1), None, None)
        received = received.view(self.ranks, experts // self.ranks, capacity, width)
        return received.transpose(0, 1).reshape(experts // self.ranks, self.ranks * capacity, width)

    def return_slots(self, outputs: Tensor) -> Tensor:
        """Return the outputs (E/N, N C, D) of `send_slots` to the ranks of their tokens: -> (E,C,D). Differentiable."""
        local, rows, width = outputs.shape
        by_rank = outputs.view(local, self.ranks, rows // self.ranks, width).transpose(0, 1)
        received = self._all_to_all(by_rank.reshape(self.ranks, -1), None, None)
        return received.view(self.ranks * local, rows // self.ranks, width)

    def send_rows(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, RowExchange]:
        """Send rows (n,D), ordered by expert, to the ranks of their experts. Waits for the device. Differentiable.

        counts (E,) int64 is the number of rows of each expert. Returns the received rows (R,D), ordered by expert, and
        the exchange for `return_rows`.
        """
        by_rank = counts.view(self.ranks, -1)
        incoming = self._all_to_all(by_rank, None, None)  # (N, E/N): rows from each rank for each local expert
        sent, received = torch.stack((by_rank.sum(1), incoming.sum(1))).tolist()
        experts = torch.arange(incoming.shape[1], device=counts.device).repeat(self.ranks)
        order = experts.repeat_interleave(incoming.flatten(), output_size=sum(received)).argsort(stable=True)
        exchange = RowExchange(sent, received, order, incoming.sum(0))
        return self._all_to_all(rows, received, sent)[order], exchange

    def return_rows(self, outputs: Tensor, exchange: RowExchange) -> Tensor:
        """Return the outputs (R,D) of received rows to the ranks that sent them, in their order. Differentiable."""
        by_rank = torch.empty_like(outputs).index_copy(0, exchange.order, outputs)
        return self._all_to_all(by_rank, exchange.sent, exchange.received)

    def _all_to_all(self, rows: Tensor, received: list[int] | None, sent: list[int] | None) -> Tensor:
        """Exchange rows (n,…). `received` and `sent` are the numbers of rows per rank, or None for equal numbers."""
        return collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, self._group)
