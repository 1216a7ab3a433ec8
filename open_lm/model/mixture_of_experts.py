"""A mixture of experts in place of a feed-forward network.

Each token goes to the k experts that its router scores highest; their outputs are added, weighted by those scores.
While training an expert takes a bounded number of tokens (its capacity) and the rest pass by on the residual stream, so
that every shape is known beforehand. In evaluation nothing is dropped, so that a token's result does not depend on what
else is in the batch.
Fedus et al. 2021 (https://arxiv.org/abs/2101.03961), Lepikhin et al. 2020 (https://arxiv.org/abs/2006.16668).
Legend: B batch, T sequence, D model width, F hidden width, E experts, k experts of a token, C capacity, N = B*T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Scores of all experts for each token."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (N,D) -> probabilities (N,E), float32 whatever the model's type."""
        return torch.softmax(self.layer(tokens).float(), dim=-1)


class ExpertMLP(nn.Module):
    """E networks D -> F -> D with a tanh-approximated gelu, in two stacked weights."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, slots: Tensor) -> Tensor:
        """slots (E,C,D) -> (E,C,D)."""
        return torch.bmm(F.gelu(torch.bmm(slots, self.w1), approximate="tanh"), self.w2)

    def one(self, expert: int, tokens: Tensor) -> Tensor:
        """The network of one expert: tokens (n,D) -> (n,D)."""
        return F.gelu(tokens @ self.w1[expert], approximate="tanh") @ self.w2[expert]


class Experts(nn.Module):
    """Holds the experts under the name that existing checkpoints use."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = ExpertMLP(num_experts, dim, hidden_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Earlier checkpoints carry a bias that their model never added to its output.
        state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MixtureOfExperts(nn.Module):
    """Router and experts of one block.

    Args:
        dim: D; the experts' hidden width is 4 D.
        num_experts: E.
        top_k: k, at most E.
        capacity_factor: C = capacity_factor * k * N / E; 0 drops nothing while training either.

    Attributes:
        balancing_loss: after a forward in training mode, the float32 scalar E / (N k) * sum_e count_e * mean score_e,
            which is 1 when all experts get equal shares; with its graph, on the device. None before.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, capacity_factor: float) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.router = Router(dim, num_experts)
        self.experts = Experts(num_experts, dim, 4 * dim)
        self.balancing_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D), 0 for tokens that no expert had room for."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.training:
            taken = F.one_hot(chosen, self.num_experts)
            shares = taken.sum((0, 1), dtype=torch.float32) / chosen.numel()
            self.balancing_loss = self.num_experts * (shares * scores.mean(0)).sum()
        limited = self.training and self.capacity_factor > 0
        mixed = self._bounded(tokens, weights, chosen) if limited else self._unbounded(tokens, weights, chosen)
        return mixed.to(x.dtype).view_as(x)

    def _bounded(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """At most C tokens for each expert, first choices before second ones, earlier tokens first -> (N,D)."""
        count, width = tokens.shape
        capacity = max(1, min(count, int(self.capacity_factor * self.top_k * count / self.num_experts)))
        expert = chosen.t().reshape(-1)  # (k*N,): all first choices, then all second ones
        place = (F.one_hot(expert, self.num_experts).cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
        # Whoever finds no place is written to one spare row at the end, and reads zeros from there.
        spare = self.num_experts * capacity
        slot = torch.where(place < capacity, expert * capacity + place, spare)
        slots = tokens.new_zeros(spare + 1, width).index_copy(0, slot, tokens.repeat(self.top_k, 1))
        out = self.experts.mlp(slots[:-1].view(self.num_experts, capacity, width)).reshape(spare, width)
        picked = torch.cat((out, out.new_zeros(1, width)))[slot].view(self.top_k, count, width)
        return (picked * weights.t()[..., None]).sum(0)

    def _unbounded(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every choice is served, one expert after the other; counts go to the host -> (N,D)."""
        order = chosen.reshape(-1).argsort(stable=True)
        counts: list[int] = torch.bincount(chosen.reshape(-1), minlength=self.num_experts).tolist()
        rows = order // self.top_k
        groups = tokens[rows].split(counts)
        served = [self.experts.mlp.one(expert, group) for expert, group in enumerate(groups) if len(group)]
        out = torch.cat(served) * weights.reshape(-1)[order, None]
        return out.new_zeros(tokens.shape).index_add(0, rows, out)
