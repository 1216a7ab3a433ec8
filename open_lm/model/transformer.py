"""The decoder-only Transformer.

A forward pass embeds the token ids, runs the blocks and returns next-token logits or their loss.
Legend: B batch, T sequence, P cached positions, D model width, H query heads, G key heads, K head width, V vocabulary,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.kernels.linear import FusedLinear, Linear
from open_lm.model.attention import (
    AttentionOptions,
    Mask,
    attend,
    create_document_mask,
    decoding_kernels,
    prepare_mask,
)
from open_lm.model.embedding import ScaledEmbedding, dropout
from open_lm.model.feed_forward import get_feed_forward
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss
from open_lm.model.mixture_of_experts import Experts, MixtureOfExperts, balancing_loss
from open_lm.model.params import LayerKind, Params, create_params
from open_lm.model.positional_embedding import Angles, get_positional_embedding, sequence_lengths, token_positions
from open_lm.model.recomputation import POLICIES, with_recomputation

LayerCache = Sequence[Tensor]  # keys and values of a layer, both (B,P,G,K), with the position embedding applied


class Attention(nn.Module):
    """Causal self-attention of one block.

    One matrix computes queries, keys and values if all have H heads. Grouped heads (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245) have one matrix for queries, and one for keys and values.
    """

    def __init__(self, params: Params, kind: LayerKind) -> None:
        super().__init__()
        assert params.attn_func is not None
        self.n_heads, self.num_key_heads, self.head_dim = params.n_heads, params.n_kv_heads, params.head_dim
        width, kv_width = self.n_heads * self.head_dim, params.n_kv_heads * self.head_dim
        self.is_grouped = kv_width < width
        if self.is_grouped:
            self.q_proj = Linear(params.dim, width, bias=params.qkv_bias)
            self.kv_proj = FusedLinear(params.dim, 2 * kv_width, parts=2, bias=params.qkv_bias)
        else:
            self.in_proj = FusedLinear(params.dim, 3 * width, parts=3, bias=params.qkv_bias)
        self.out_proj = Linear(width, params.dim, bias=params.attn_out_bias)
        embedding = params.positional_embedding_type if kind.is_rotated else "none"
        rope = params.rope(kind)
        self.pos_embed: Any = get_positional_embedding(embedding, self.head_dim, rope)
        self.needs_lengths = rope.depends_on_length
        self.attn_func = params.attn_func
        self.options = params.attention_options(kind)
        self.norms_heads = params.qk_norm_per_head
        norm_widths = (self.head_dim, self.head_dim) if self.norms_heads else (width, kv_width)
        self.q_norm, self.k_norm = (params.norm(w) if params.apply_qk_norm else nn.Identity() for w in norm_widths)
        self.local_key_heads: list[int] | None = None  # those that a tensor-parallel rank uses; None for all

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        attention_mask: Mask | None = None,
        angles: Angles | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend to the cached keys and to the keys of x.

        Args:
            x: (B,T,D).
            cache: keys and values 2 x (B,P,G,K) of earlier positions.
            attention_mask: (B,P+T), or a `DocumentMask`; the result of `prepare_mask` for this layer.
            angles: the result of `self.angles`; computed here if None.

        Returns:
            (B,T,D), and keys and values 2 x (B,P+T,G,K).
        """
        queries, keys, values = self._heads(x)
        angles = self.angles(x, cache, attention_mask) if angles is None else angles
        queries, keys, values = self.pos_embed(queries, keys, values, angles)
        if cache is not None:
            keys = torch.cat((cache[0], keys), dim=1)
            values = torch.cat((cache[1], values), dim=1)
        mixed = attend(self.attn_func, queries, keys, values, attention_mask, self.current_options())
        return self.out_proj(mixed.flatten(-2)), [keys, values]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized queries (B,T,H,K) and keys, and values (B,T,G,K), without positions; x (B,T,D)."""
        if self.is_grouped:
            queries, (keys, values) = self.q_proj(x), self.kv_proj(x).chunk(2, dim=-1)
        else:
            queries, keys, values = self.in_proj(x).chunk(3, dim=-1)
        head_shape = (-1, self.head_dim)  # -1: with tensor parallelism a rank has only some of the heads
        if self.norms_heads:
            queries, keys = self.q_norm(queries.unflatten(-1, head_shape)), self.k_norm(keys.unflatten(-1, head_shape))
        else:
            queries, keys = self.q_norm(queries).unflatten(-1, head_shape), self.k_norm(keys).unflatten(-1, head_shape)
        values = values.unflatten(-1, head_shape)
        if self.local_key_heads is not None:
            keys, values = keys[:, :, self.local_key_heads], values[:, :, self.local_key_heads]
        return queries, keys, values

    def current_options(self) -> AttentionOptions:
        """Return the options of attention, without dropout in evaluation mode."""
        return self.options if self.training else self.options.without_dropout()

    def angles(self, x: Tensor, cache: LayerCache | None, attention_mask: Mask | None) -> Angles | None:
        """Return the rotation angles of queries and keys, which are the same in all layers of a kind."""
        positions = token_positions(x, 0 if cache is None else cache[0].shape[1], attention_mask)
        lengths = sequence_lengths(positions, attention_mask) if self.needs_lengths else None
        angles: Angles | None = self.pos_embed.angles(positions, self.n_heads, lengths)
        return angles


class Block(nn.Module):
    """Attention and feed-forward network, each added to the residual stream.

    Norms of their inputs and outputs, where the architecture has them, are modules, else nn.Identity.

    Args:
        layer_id: the index of the block, from 0.
        params: the architecture of the model.
    """

    def __init__(self, layer_id: int, params: Params) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.kind = params.layer_kind(layer_id)
        self.is_parallel, self.has_dropout = params.parallel_block, params.has_dropout
        self.attention = Attention(params, self.kind)
        self.feed_forward = _create_feed_forward(layer_id, params)
        if isinstance(self.feed_forward, nn.Sequential):
            # Existing checkpoints also store these two weights under a second name.
            self._ff_w1, self._ff_w2 = self.feed_forward[0], self.feed_forward[2]

        def norm(*positions: str) -> nn.Module:
            return params.norm(params.dim) if params.norm_position in positions else nn.Identity()

        self.attention_norm = norm("pre", "both")
        self.attention_post_norm = norm("post", "both")
        self.ffn_norm = nn.Identity() if self.is_parallel else norm("pre", "both")
        self.ffn_post_norm = norm("post", "both")
        self.dropout = dropout(params.residual_dropout)

    def forward(
        self,
        x: Tensor,
        past_key_value: LayerCache | None = None,
        use_cache: bool = False,
        attention_mask: Mask | None = None,
        angles: Angles | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Run the block on x (B,T,D); the arguments are those of `Attention.forward`.

        Returns:
            (B,T,D), and with use_cache keys and values 2 x (B,P+T,G,K), else None.
        """
        normed = self.attention_norm(x)
        mixed, cache = self.attention(normed, past_key_value, attention_mask, angles)
        x = x + self.dropout(self.attention_post_norm(mixed))
        normed = normed if self.is_parallel else self.ffn_norm(x)
        x = x + self.dropout(self.ffn_post_norm(self.feed_forward(normed)))
        return x, cache if use_cache else None


def _create_feed_forward(layer_id: int, params: Params) -> nn.Module:
    """Create the block's feed-forward network; with moe_freq n, blocks 0, n, 2n, … get a mixture of experts."""
    if params.moe_freq > 0 and layer_id % params.moe_freq == 0:
        assert params.moe_num_experts is not None
        experts = Experts(params.moe_num_experts, params.dim, params.moe_ffn_dim, params.moe_ffn_type)
        return MixtureOfExperts(
            params.dim, experts, params.moe_top_k, params.moe_capacity_factor, params.moe_normalize_scores
        )
    assert params.ffn_bias is not None
    return get_feed_forward(params.ffn_type, params.dim, params.ffn_dim, params.ffn_bias)


class Head(nn.Linear):
    """The output layer. It also computes losses, so that FSDP2 gathers its parameters for both.

    multiplier: a factor of the hidden states, see parametrization.py.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, multiplier: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.multiplier = multiplier

    def forward(self, input: Tensor, *, loss: TokenLoss | None = None, **settings: Any) -> Tensor:
        """Map hidden states (B,T,D) to logits (B,T,V), or to `loss` with the settings of `TokenLoss.from_hidden`."""
        if self.multiplier != 1.0:
            input = input * self.multiplier
        if loss is None:
            return super().forward(input)
        return loss.from_hidden(input, self.weight, self.bias, **settings)


class Transformer(nn.Module):
    """A decoder-only language model.

    A new model is initialized from torch's global generator. A model created under torch.device("meta") is not: call
    `to_empty`, and then `reset_parameters` or load a checkpoint.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        self.vocab_size = params.vocab_size
        self.seq_len = params.seq_len
        self.n_layers = params.n_layers
        self.weight_tying = params.weight_tying
        self.grad_checkpointing = False
        self._recomputation = ("full", 1)
        self.tok_embeddings = ScaledEmbedding(params.vocab_size, params.dim, params.embedding_scale)
        self.embedding_dropout = dropout(params.embedding_dropout)
        self.post_embed_norm = params.norm(params.dim) if params.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(layer_id, params) for layer_id in range(params.n_layers))
        self.norm = params.norm(params.dim)
        multiplier = params.parametrization.output_multiplier
        self.output = Head(params.dim, params.vocab_size, bias=params.head_bias, multiplier=multiplier)
        self._tie_weights()
        if not self.output.weight.is_meta:
            self.reset_parameters()

    def _tie_weights(self) -> None:
        if self.weight_tying:
            self.tok_embeddings.weight = self.output.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        self._tie_weights()  # moving from the meta device creates a separate parameter for each module
        return self

    def reset_parameters(self, seed: int | None = None) -> None:
        """Initialize all weights with `init_weights`; a seed of None is drawn from torch's global generator."""
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        init_weights(self, seed)

    def set_grad_checkpointing(self, enable: bool = True, policy: str = "full", every: int = 1) -> None:
        """Configure activation checkpointing of blocks 0, every, 2 * every, …

        Args:
            enable: False keeps all activations and ignores the other arguments.
            policy: "full" keeps only a block's input, "op" also the results of matrix products and attention,
                "half-op" those of attention and every second matrix product.
            every: apply it to one in `every` blocks.

        Raises:
            ConfigError: an unknown policy, or `every` below 1.
        """
        if policy not in POLICIES or every < 1:
            raise ConfigError(
                f"--activation-checkpointing: found policy {policy!r} for one in {every} blocks, expected one of "
                f"{', '.join(POLICIES)}, for one in 1 or more blocks"
            )
        self.grad_checkpointing = enable
        self._recomputation = (policy, every)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Sequence[LayerCache] | None = None,
        use_cache: bool = False,
        attention_mask: Mask | None = None,
        *,
        document_ids: Tensor | None = None,
        loss: TokenLoss | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Tensor, list[list[Tensor]] | None]:
        """Compute next-token logits, or their loss.

        Args:
            input_ids: (B,T) int64 token ids; or
            inputs_embeds: (B,T,D) float token embeddings.
            past_key_values: KV cache of an earlier call, L pairs of keys and values (B,P,G,K); not modified.
            use_cache: return the KV cache.
            attention_mask: (B,P+T), nonzero for real tokens, 0 for padding; left-padded sequences get the logits of the
                unpadded sequences. Logits at padding are meaningless. Or a `DocumentMask`.
            document_ids: (B,T) integers, equal for neighbors in one document (data.masking.document_ids). Attention
                stays within documents and positions start at 0 in each, so that a packed sequence gets the logits of
                its separate documents. Not allowed with past_key_values, use_cache or attention_mask.
            loss: return this loss instead of logits, without holding the logits of all tokens.
            logits_to_keep: compute the logits of only this number of last positions; 0 for all T.

        Returns:
            logits (B,T,V) float32, or the loss; the normalized hidden states (B,T,D); with use_cache the KV cache, L
            pairs (B,P+T,G,K), else None.

        Raises:
            ValueError: neither or both of the inputs, a mask or document_ids of another shape, or document_ids with an
                argument that they exclude.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if document_ids is not None:
            _check_document_ids(
                document_ids, x, past_key_values=past_key_values, use_cache=use_cache, attention_mask=attention_mask
            )
            assert self.params.attn_func is not None
            attention_mask = create_document_mask(document_ids, self.params.attn_func)
        caches: Sequence[LayerCache | None] = past_key_values or [None] * len(self.layers)
        shared = self._shared_by_kind(x, caches[0], attention_mask)
        # After `_shared_by_kind`: tensor parallelism splits the sequences here.
        x = self.embedding_dropout(self.post_embed_norm(x))
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not use_cache
        policy, every = self._recomputation
        new_caches: list[list[Tensor]] = []
        with decoding_kernels(x, 0 if caches[0] is None else caches[0][0].shape[1]):
            for i, block in enumerate(self.blocks()):
                run: Callable[..., Any] = block
                if recompute and i % every == 0:
                    run = with_recomputation(block, policy, self.params.has_dropout)
                x, new_cache = run(x, caches[i], use_cache, *shared[block.kind])
                if new_cache is not None:
                    new_caches.append(new_cache)
        hidden = self.norm(x)
        if loss is not None:
            cap, num_ids = self.params.logit_soft_cap, self.params.unpadded_vocab_size
            return self.output(hidden, loss=loss, soft_cap=cap, num_ids=num_ids), hidden, new_caches or None
        return self.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden), hidden, new_caches or None

    def _shared_by_kind(
        self, x: Tensor, cache: LayerCache | None, attention_mask: Mask | None
    ) -> dict[LayerKind, tuple[Mask | None, Angles | None]]:
        """Return what the layers of each kind share: the mask and the angles of x (B,T,D)."""
        first_of_kind: dict[LayerKind, Attention] = {}
        for block in self.blocks():
            first_of_kind.setdefault(block.kind, block.attention)
        return {
            kind: (
                prepare_mask(attention_mask, layer.current_options(), layer.attn_func, x, cache is not None),
                layer.angles(x, cache, attention_mask),
            )
            for kind, layer in first_of_kind.items()
        }

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, in order."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (B,T,V) float32 of normalized hidden states (B,T,D)."""
        logits: Tensor = self.output(hidden).float()
        cap, num_ids = self.params.logit_soft_cap, self.params.unpadded_vocab_size
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if num_ids is not None and num_ids < self.vocab_size:
            is_padding = torch.arange(self.vocab_size, device=logits.device) >= num_ids
            logits = logits.masked_fill(is_padding, float("-inf"))
        return logits

    def auxiliary_loss(self) -> Tensor | None:
        """Return the load-balancing loss of the last forward pass in training mode; None without experts.

        Training adds it to the mean token loss. It is `balancing_loss` of the mixtures of experts times
        params.moe_loss_weight: a float32 scalar on the device, with its graph. Average it over micro-batches and ranks.
        """
        experts = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        loss = balancing_loss(experts, self.params.moe_loss_scope)
        return None if loss is None else self.params.moe_loss_weight * loss


def _check_document_ids(document_ids: Tensor, x: Tensor, **others: Any) -> None:
    """Raise ValueError if document_ids do not fit x (B,T,D) or if any of the other arguments is given."""
    conflicts = [name for name, value in others.items() if value is not None and value is not False]
    if conflicts:
        raise ValueError(
            f"document_ids together with {', '.join(conflicts)}: document masks support neither cached keys nor "
            "padding; omit one of them"
        )
    if document_ids.shape != x.shape[:2] or document_ids.is_floating_point():
        shape, dtype = tuple(document_ids.shape), document_ids.dtype
        raise ValueError(f"document_ids have shape {shape} of {dtype}, expected integers of shape {tuple(x.shape[:2])}")


def create_model(cfg: object) -> Transformer:
    """Create and initialize a model; see `create_params`. Under torch.device("meta") it uses no memory."""
    return Transformer(create_params(cfg))
