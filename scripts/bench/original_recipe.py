"""The training step of the original OpenLM in plain torch: a reference for benchmarks and loss curves.

    step = build("open_lm_11m", "amp_bfloat16", torch.device("cpu"))
    loss = step(inputs, targets)

It uses nothing of open_lm's model or trainer. It computes as the first OpenLM did: LayerNorm in float32, queries, keys
and values from one matrix, rotary embedding in float32, attention and SwiGLU of xformers on CUDA if that library is
installed (otherwise torch's), the float32 logits of the full batch at once, their mean cross entropy, and an unfused
AdamW. Parameters have open_lm's names, so that both models can start from the same weights.
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
SUPPORTED_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16")
SUPPORTED = {"ffn_type": ("swiglu", "swiglu_torch"), "positional_embedding_type": ("rotary",), "moe_freq": (0,)}


class Norm(nn.Module):
    """Layer normalization with optional gain and bias.

    low_precision: compute in the autocast type if autocast is enabled.
    """

    def __init__(self, width: int, gain: bool = True, bias: bool = True, low_precision: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.width, self.low_precision = width, low_precision

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…, D) -> (…, D)."""
        device_type = x.device.type
        if not (self.low_precision and torch.is_autocast_enabled(device_type)):
            return F.layer_norm(x, (self.width,), self.weight, self.bias, NORM_EPS)
        dtype = torch.get_autocast_dtype(device_type)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(x.to(dtype), (self.width,), weight, bias, NORM_EPS)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "default_layer_norm": partial(nn.LayerNorm, eps=NORM_EPS),
    "gain_only_layer_norm": partial(Norm, bias=False),
    "no_wb_layer_norm": partial(Norm, gain=False, bias=False),
    "lp_layer_norm": partial(Norm, low_precision=True),
    "gain_only_lp_layer_norm": partial(Norm, bias=False, low_precision=True),
}


class Rotary(nn.Module):
    """Rotary embedding in float32: rotates pairs (i, i + K/2) by the angle position * 10000^(-2i/K)."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 1.0 / 10000.0**exponents)
        self.tables: tuple[Tensor, Tensor] | None = None

    def forward(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys (B,T,H,K) and return them in `dtype`."""
        length = queries.shape[1]
        if self.tables is None or self.tables[0].shape[1] != length:
            angles = torch.outer(torch.arange(length, device=queries.device), self.inv_freq).repeat(1, 2)
            self.tables = (angles.cos()[None, :, None], angles.sin()[None, :, None])
        cos, sin = self.tables

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype)

        return rotate(queries), rotate(keys)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return causal attention, (B,T,H,K) -> (B,T,H,K): of xformers on CUDA if it is installed, otherwise of torch."""
    ops = xformers_ops() if queries.is_cuda else None
    if ops is not None:
        return ops.memory_efficient_attention(queries, keys, values, attn_bias=ops.LowerTriangularMask())
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def xformers_ops() -> Any:
    """Return the module xformers.ops, or None if it is not installed."""
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
        """Map x (B,T,D) -> (B,T,D)."""
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
        """Map x (B,T,D) -> (B,T,D): w3(silu(gate) * up), with gate and up from the matrix w12 (2F,D)."""
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
        """Map x (B,T,D) -> (B,T,D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    """The original's transformer.

    shape: content of a model's JSON file, with model_norm and qk_norm.
    """

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
        """Map ids (B,T) int64 -> logits (B,T,V) float32."""
        x = self.post_embed_norm(self.tok_embeddings(ids))
        for block in self.layers:
            x = block(x)
        return self.output(self.norm(x)).float()


class Recipe:
    """A model, its optimizer and their training step."""

    def __init__(self, model: Model, precision: str, device: torch.device, optim: OptimConfig) -> None:
        self.model, self.optim = model.to(device), optim
        self._amp, self._device_type = precision != "fp32", device.type
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.wd
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a float32 scalar. inputs, targets: (B,T) int64; targets of -100 are ignored."""
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
        """Update the model; return the loss before the update."""
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
    """Return the training step of a model. Raise the ConfigError of `check`.

    model: as in --model.
    weights: initial state dict; by default torch's initial values, because they do not affect the speed.
    optim: lr, betas, eps, wd, grad_clip_norm and z_loss_coefficient are used.
    """
    check(model, precision, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in the original
    module = Model(_shape(model))
    if weights is not None:
        module.load_state_dict(weights)
    return Recipe(module, precision, device, optim or OptimConfig())


def check(model: str, precision: str, device: torch.device) -> None:
    """Raise ConfigError if this recipe does not implement the model's architecture or the precision."""
    shape = _shape(model)
    accepted = {"model_norm": tuple(NORMS), **SUPPORTED}
    for key, values in accepted.items():
        if shape.get(key, values[0]) not in values:
            raise ConfigError(
                f"--model {model}: {key} is {shape[key]!r}, but the original's recipe supports only "
                f"{', '.join(map(str, values))}"
            )
    if precision not in SUPPORTED_PRECISIONS:
        raise ConfigError(
            f"--precision {precision}: the original's recipe supports only {', '.join(SUPPORTED_PRECISIONS)}"
        )


def _shape(model: str) -> dict[str, Any]:
    return {"model_norm": "default_layer_norm", "qk_norm": False, **read_architecture(model)}
