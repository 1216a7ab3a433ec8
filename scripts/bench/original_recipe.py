"""The training step that OpenLM began with, said again in plain torch: the peer of benchmarks and loss curves.

    step = build("open_lm_11m", "amp_bfloat16", torch.device("cpu"))
    loss = step(inputs, targets)

Nothing of open_lm's model or trainer is used. It does what the first OpenLM did where the machine lets it: LayerNorm in
float32, queries, keys and values from one matrix, rotation in float32, xformers' attention and SwiGLU on CUDA where
that library is installed and torch's own elsewhere, the logits of the whole batch in float32 at once, their mean cross
entropy, and an AdamW that is not fused. Parameters have the names of open_lm's, so that both can start from the same.
Legend: B batch, T sequence, D model width, H heads, K head width, F width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.architecture import read_architecture
from open_lm.config.sections import OptimConfig
from open_lm.errors import ConfigError

NORM_EPS = 1e-5
PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16")
SUPPORTED = {"ffn_type": ("swiglu", "swiglu_torch"), "positional_embedding_type": ("rotary",), "moe_freq": (0,)}


class Norm(nn.Module):
    """Layer normalisation, with gain and bias each optional; `low` computes in the autocast type where there is one."""

    def __init__(self, width: int, gain: bool = True, bias: bool = True, low: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.width, self.low = width, low

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) -> (…, D)."""
        kind = x.device.type
        if not (self.low and torch.is_autocast_enabled(kind)):
            return F.layer_norm(x, (self.width,), self.weight, self.bias, NORM_EPS)
        dtype = torch.get_autocast_dtype(kind)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x.to(dtype), (self.width,), weight, bias, NORM_EPS)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "default_layer_norm": partial(nn.LayerNorm, eps=NORM_EPS),
    "gain_only_layer_norm": partial(Norm, bias=False),
    "no_wb_layer_norm": partial(Norm, gain=False, bias=False),
    "lp_layer_norm": partial(Norm, low=True),
    "gain_only_lp_layer_norm": partial(Norm, bias=False, low=True),
}


class Rotary(nn.Module):
    """Rotates pairs (i, i + K/2) of queries and keys by position * 10000^(-2i/K), in float32."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 1.0 / 10000.0**exponents)
        self.tables: tuple[Tensor, Tensor] | None = None

    def forward(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both (B,T,H,K) -> the same in `dtype`."""
        length = queries.shape[1]
        if self.tables is None or self.tables[0].shape[1] != length:
            angles = torch.outer(torch.arange(length, device=queries.device), self.inv_freq).repeat(1, 2)
            self.tables = (angles.cos()[None, :, None], angles.sin()[None, :, None])
        cos, sin = self.tables

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype)

        return rotated(queries), rotated(keys)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of (B,T,H,K): xformers on CUDA where it is installed, else torch's."""
    ops = xformers_ops() if queries.is_cuda else None
    if ops is not None:
        return ops.memory_efficient_attention(queries, keys, values, attn_bias=ops.LowerTriangularMask())
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def xformers_ops() -> Any:
    """The module xformers.ops, or None where it is not installed."""
    try:
        from xformers import ops
    except ImportError:
        return None
    return ops


class Attention(nn.Module):
    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        dim, self.heads = shape["hidden_dim"], shape["n_heads"]
        self.head_width = dim // self.heads
        width = self.heads * self.head_width
        self.in_proj = nn.Linear(dim, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.pos_embed = Rotary(self.head_width)
        self.q_norm = NORMS[shape["model_norm"]](width) if shape["qk_norm"] else nn.Identity()
        self.k_norm = NORMS[shape["model_norm"]](width) if shape["qk_norm"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        queries, keys, values = self.in_proj(x).chunk(3, dim=-1)
        heads = (*x.shape[:2], self.heads, self.head_width)
        values = values.view(heads)
        queries, keys = self.q_norm(queries).view(heads), self.k_norm(keys).view(heads)
        queries, keys = self.pos_embed(queries, keys, values.dtype)
        return self.out_proj(attend(queries, keys, values).view(*x.shape[:2], -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        width = 256 * ((int(8 * dim / 3) + 255) // 256)
        self.w12 = nn.Linear(dim, 2 * width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D): w3(silu(gate) * up), both from the one matrix w12 (2F,D)."""
        ops = xformers_ops() if x.is_cuda else None
        if ops is not None:
            w1, w2 = self.w12.weight.chunk(2)
            return ops.swiglu(x, w1, None, w2, None, self.w3.weight, None)
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape["hidden_dim"])
        self.attention_norm = NORMS[shape["model_norm"]](shape["hidden_dim"])
        self.ffn_norm = NORMS[shape["model_norm"]](shape["hidden_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,T,D) -> (B,T,D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    """`shape`: what a model's JSON file says, with model_norm and qk_norm."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        dim = shape["hidden_dim"]
        self.tok_embeddings = nn.Embedding(shape["vocab_size"], dim)
        self.post_embed_norm = NORMS[shape["model_norm"]](dim) if shape["post_embed_norm"] else nn.Identity()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape["n_layers"]))
        self.norm = NORMS[shape["model_norm"]](dim)
        self.output = nn.Linear(dim, shape["vocab_size"], bias=False)
        if shape["weight_tying"]:
            self.tok_embeddings.weight = self.output.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B,T) int64 -> logits (B,T,V) float32."""
        x = self.post_embed_norm(self.tok_embeddings(ids))
        for block in self.layers:
            x = block(x)
        return self.output(self.norm(x)).float()


class Recipe:
    """A model, its optimizer and the step of both."""

    def __init__(self, model: Model, precision: str, device: torch.device, optim: OptimConfig) -> None:
        self.model, self.optim = model.to(device), optim
        self._amp, self._device_type = precision != "fp32", device.type
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.wd
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of inputs and targets, both (B,T) int64, targets -100 where there is none: float32 scalar."""
        autocast: AbstractContextManager[object] = nullcontext()
        if self._amp:
            autocast = torch.autocast(self._device_type, dtype=torch.bfloat16)
        with autocast:
            logits = self.model(inputs)
            logits = logits.reshape(-1, logits.shape[-1])
            loss = F.cross_entropy(logits, targets.reshape(-1))
            if self.optim.z_loss_coefficient:
                loss = loss + self.optim.z_loss_coefficient * logits.logsumexp(-1).square().mean()
        return loss

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One update; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        if self.optim.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip_norm)
        self.optimizer.step()
        return loss.detach()


def build(
    model: str,
    precision: str,
    device: torch.device,
    *,
    weights: Mapping[str, Tensor] | None = None,
    optim: OptimConfig | None = None,
) -> Recipe:
    """The step of the model that --model names.

    weights: a state dict to start from; without it torch's own initial values, on which speed does not depend. optim:
    lr, betas, eps, wd, grad_clip_norm and z_loss_coefficient count. ConfigError as `check` has it.
    """
    check(model, precision, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the original trained
    made = Model(_shape(model))
    if weights is not None:
        made.load_state_dict(weights)
    return Recipe(made, precision, device, optim or OptimConfig())


def check(model: str, precision: str, device: torch.device) -> None:
    """ConfigError for what is not said again here, on any device."""
    shape = _shape(model)
    accepted = {"model_norm": tuple(NORMS), **SUPPORTED}
    for key, values in accepted.items():
        if shape.get(key, values[0]) not in values:
            raise ConfigError(
                f"--model {model}: {key} is {shape[key]!r}, the original's recipe is said again for "
                f"{', '.join(map(str, values))} only"
            )
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: the original's recipe runs in one of {', '.join(PRECISIONS)}")


def _shape(model: str) -> dict[str, Any]:
    return {"model_norm": "default_layer_norm", "qk_norm": False, **read_architecture(model)}
