"""A mixture of experts that replaces a feed-forward network.

Each token goes to the k experts with the highest router scores. Their outputs are summed, weighted by the scores. In
training an expert processes a limited number of tokens (its capacity), so that all shapes are known in advance; the
remaining tokens keep only their residual stream. In evaluation no token is dropped, so that the result for a token does
not depend on the rest of the batch.
Fedus et al. 2021 (https://arxiv.org/abs/2101.03961), Lepikhin et al. 2020 (https://arxiv.org/abs/2006.16668).
With expert parallelism (parallel/expert_parallel.py) each rank holds some of the experts, and tokens are sent to them.
Legend: B batch, T sequence, D model width, F hidden width, E experts (of this rank, for the networks), k experts per
token, C capacity, N = B*T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.distributed.expert_exchange import ExpertExchange
from open_lm.kernels.grouped_products import RowGroups, grouped_product


class Router(nn.Module):
    """The router: scores of all experts for each token."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N,D) -> probabilities (N,E), float32 for every model dtype."""
        return torch.softmax(self.layer(tokens).float(), dim=-1)


class ExpertMLP(nn.Module):
    """E networks D -> F -> D with a tanh-approximated GELU, in two stacked weights."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, tokens: Tensor, groups: RowGroups | None = None) -> Tensor:
        """Map slots (E,C,D) -> (E,C,D), or with `groups` the tokens of each expert (n,D) -> (n,D)."""
        return _product(self.hidden(tokens, groups), self.w2, groups)

    def hidden(self, tokens: Tensor, groups: RowGroups | None) -> Tensor:
        """Return the hidden features of the tokens, (E,C,F) or (n,F)."""
        return F.gelu(_product(tokens, self.w1, groups), approximate="tanh")


def _product(tokens: Tensor, matrices: Tensor, groups: RowGroups | None) -> Tensor:
    return torch.bmm(tokens, matrices) if groups is None else grouped_product(tokens, matrices, groups)


class ExpertSwiGLU(ExpertMLP):
    """E networks silu(x w1) * (x w3) w2 (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__(num_experts, dim, hidden_dim)
        self.w3 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    def hidden(self, tokens: Tensor, groups: RowGroups | None) -> Tensor:
        """Return the hidden features of the tokens, (E,C,F) or (n,F)."""
        return F.silu(_product(tokens, self.w1, groups)) * _product(tokens, self.w3, groups)


_NETWORKS: dict[str, type[ExpertMLP]] = {"gelu_tanh": ExpertMLP, "swiglu": ExpertSwiGLU}


class Experts(nn.Module):
    """A container that gives the experts the names that existing checkpoints use.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        network: `moe_ffn_type` of the model's JSON file.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, network: str = "gelu_tanh") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.mlp = _NETWORKS[network](num_experts, dim, hidden_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Older checkpoints contain a bias that their model never used.
        state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MixtureOfExperts(nn.Module):
    """The router and experts of one block.

    Args:
        dim: D.
        experts: the E networks.
        top_k: k, at most E.
        capacity_factor: C = capacity_factor * k * N / E; 0 also keeps all tokens in training.
        normalize_scores: divide the scores of a token's experts by their sum.

    Attributes:
        exchange: sends tokens to the ranks of their experts; None if this rank has all experts.
        loads: after a forward pass in training mode, the share of the choices that each expert gets, and the mean score
            of each, both (E,) float32; with their graph, on the device. None before.
    """

    def __init__(
        self, dim: int, experts: Experts, top_k: int, capacity_factor: float, normalize_scores: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.normalize_scores = normalize_scores
        self.router = Router(dim, self.num_experts)
        self.experts = experts
        self.exchange: ExpertExchange | None = None
        self.loads: tuple[Tensor, Tensor] | None = None

    @property
    def balancing_loss(self) -> Tensor | None:
        """The float32 scalar E / (N k) * sum_e count_e * mean score_e, which is 1 if all experts get equally many."""
        return None if self.loads is None else self.num_experts * (self.loads[0] * self.loads[1]).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,T,D) -> (B,T,D), 0 for tokens that were dropped by all their experts."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.training:
            is_chosen = F.one_hot(chosen, self.num_experts)
            fractions = is_chosen.sum((0, 1), dtype=torch.float32) / chosen.numel()
            self.loads = fractions, scores.mean(0)
        if self.normalize_scores:
            weights = weights / weights.sum(-1, keepdim=True)
        run = self._with_capacity if self.training and self.capacity_factor > 0 else self._without_capacity
        mixed = run(tokens, weights, chosen)
        return mixed.to(x.dtype).view_as(x)

    def _with_capacity(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Run each expert on at most C tokens -> (N,D). First choices and earlier tokens have priority."""
        count, width = tokens.shape
        capacity = max(1, min(count, int(self.capacity_factor * self.top_k * count / self.num_experts)))
        expert = chosen.t().reshape(-1)  # (k*N,): all first choices, then all second choices, …
        rank_in_expert = (F.one_hot(expert, self.num_experts).cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
        # Tokens beyond the capacity are written to an extra slot at the end and read zeros from it.
        overflow = self.num_experts * capacity
        slot = torch.where(rank_in_expert < capacity, expert * capacity + rank_in_expert, overflow)
        slots = tokens.new_zeros(overflow + 1, width).index_copy(0, slot, tokens.repeat(self.top_k, 1))
        out = self._run_slots(slots[:-1].view(self.num_experts, capacity, width)).reshape(overflow, width)
        picked = torch.cat((out, out.new_zeros(1, width)))[slot].view(self.top_k, count, width)
        return (picked * weights.t()[..., None]).sum(0)

    def _without_capacity(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Run the experts on all their tokens -> (N,D). Waits for the device, except with a grouped kernel."""
        order = chosen.reshape(-1).argsort(stable=True)
        counts = F.one_hot(chosen.reshape(-1), self.num_experts).sum(0)
        rows = order // self.top_k
        out = self._run_rows(tokens[rows], counts) * weights.reshape(-1)[order, None]
        return out.new_zeros(tokens.shape).index_add(0, rows, out)

    def _run_slots(self, slots: Tensor) -> Tensor:
        """Run all experts on their slots: (E,C,D) -> (E,C,D). E counts the experts of all ranks."""
        if self.exchange is None:
            return self.experts.mlp(slots)
        return self.exchange.return_slots(self.experts.mlp(self.exchange.send_slots(_as_sent(slots))))

    def _run_rows(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run all experts on rows (n,D), ordered by expert, with counts (E,) rows each: -> (n,D)."""
        if self.exchange is None:
            return self.experts.mlp(rows, RowGroups(counts))
        received, sent = self.exchange.send_rows(_as_sent(rows), counts)
        return self.exchange.return_rows(self.experts.mlp(received, RowGroups(sent.counts)), sent)


def _as_sent(tokens: Tensor) -> Tensor:
    """Return tokens in the dtype in which the experts compute, which halves the bytes to send under autocast."""
    device_type = tokens.device.type
    is_enabled = torch.is_autocast_enabled(device_type)
    return tokens.to(torch.get_autocast_dtype(device_type)) if is_enabled else tokens


def balancing_loss(networks: Sequence[MixtureOfExperts], scope: str) -> Tensor | None:
    """Return the load-balancing loss of a model's mixtures of experts, a float32 scalar; None without any.

    scope "layer": the mean of `MixtureOfExperts.balancing_loss`. "model": that of the loads of all layers together.
    """
    loads = [network.loads for network in networks if network.loads is not None]
    if not loads:
        return None
    shares, scores = (torch.stack(tensors) for tensors in zip(*loads, strict=True))  # (layers,E)
    if scope == "model":
        shares, scores = shares.mean(0, keepdim=True), scores.mean(0, keepdim=True)
    return networks[0].num_experts * (shares * scores).sum(-1).mean()
