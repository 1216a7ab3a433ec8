"""OpenLM language models for transformers, in three files that need torch and transformers only.

An exported model has copies of these files next to its weights:

    AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)

The logits are those of the trainer's model.
Legend: B batch, T sequence, P cached positions and T, D model width, H query heads, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_openlm import OpenLMConfig
from .layers_openlm import FEED_FORWARDS, Attention, MixtureOfExperts, create_norm
from .rotary_openlm import rotary_table


def _in_layer(pattern: list[bool] | None, layer: int) -> bool:
    return pattern is None or pattern[layer % len(pattern)]


class Block(nn.Module):
    """Attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.is_parallel = config.parallel_block
        self.has_window = config.attn_window is not None and _in_layer(config.attn_window_pattern, layer)
        self.is_rotated = _in_layer(config.rope_pattern, layer) and config.positional_embedding_type != "none"
        self.attention = Attention(config, layer)
        has_experts = config.moe_freq > 0 and layer % config.moe_freq == 0
        self.feed_forward = MixtureOfExperts(config) if has_experts else FEED_FORWARDS[config.ffn_type](config)

        def norm(*positions: str) -> nn.Module:
            return create_norm(config, config.dim) if config.norm_position in positions else nn.Identity()

        self.attention_norm, self.attention_post_norm = norm("pre", "both"), norm("post", "both")
        self.ffn_norm = nn.Identity() if self.is_parallel else norm("pre", "both")
        self.ffn_post_norm = norm("post", "both")
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        """Map x (B,T,D) -> (B,T,D); see `Attention.forward`."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention_post_norm(self.attention(normed, *attention_inputs)))
        normed = normed if self.is_parallel else self.ffn_norm(x)
        return x + self.dropout(self.ffn_post_norm(self.feed_forward(normed)))


class Transformer(nn.Module):
    """The model up to its final norm, with the interface of a backbone of transformers, and the output layer.

    `gradient_checkpointing` and `_gradient_checkpointing_func` are set by transformers.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.post_embed_norm = create_norm(config, config.dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = create_norm(config, config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)

    def embed(self, ids: Tensor) -> Tensor:
        """Map ids (B,T) int64 -> (B,T,D)."""
        embeddings = self.tok_embeddings(ids)
        scale = self.config.embedding_scale
        return embeddings if scale == 1.0 else embeddings * embeddings.new_full((), scale)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normalized hidden states (B,T,D) and the cache; see `OpenLMForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x: Any = self.embed(input_ids) if input_ids is not None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        total = start + x.shape[1]
        if attention_mask is None:
            positions = torch.arange(start, total, device=x.device)
        else:  # padding does not count
            positions = ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
        allowed = {window: self._allowed(x, total, window, attention_mask) for window in (False, True)}
        angles = {window: rotary_table(self.config, positions, window) for window in (False, True)}
        x = self.embedding_dropout(self.post_embed_norm(x))
        block: Any
        for block in self.layers:
            window = block.has_window
            inputs = angles[window] if block.is_rotated else None, allowed[window], attention_mask, past_key_values
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, *inputs)
            else:
                x = block(x, *inputs)
        return BaseModelOutputWithPast(self.norm(x), past_key_values)

    def _allowed(self, x: Tensor, total: int, has_window: bool, attention_mask: Tensor | None) -> Tensor:
        """Return the keys that each query attends to, bool, broadcasting to (B,H,T,P)."""
        length = x.shape[1]
        pairs = torch.ones(length, total, dtype=torch.bool, device=x.device)
        causal = pairs.tril(total - length)
        if has_window and self.config.attn_window is not None:
            causal = causal.triu(total - length - self.config.attn_window + 1)
        if attention_mask is None:
            return causal
        allowed = causal & attention_mask.bool()[:, None, None, :]
        diagonal = pairs.tril(total - length).triu(total - length)
        return allowed | (diagonal & ~allowed.any(-1, keepdim=True))  # no row of a softmax is empty

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (B,T,D) -> logits (B,T,V) float32."""
        logits, config = self.output(hidden).float(), self.config
        if config.logit_soft_cap is not None:
            logits = config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)
        if config.unpadded_vocab_size is not None:
            logits[..., config.unpadded_vocab_size :] = float("-inf")
        return logits

    def balancing_loss(self) -> Tensor | None:
        """Return the weighted load-balancing loss of the last forward pass; None without experts."""
        config = self.config
        loads = [block.feed_forward.loads for block in self.layers if isinstance(block.feed_forward, MixtureOfExperts)]
        if not loads:
            return None
        shares, scores = (torch.stack(parts) for parts in zip(*loads, strict=True))
        if config.moe_loss_scope == "model":
            shares, scores = shares.mean(0, keepdim=True), scores.mean(0, keepdim=True)
        return config.moe_loss_weight * config.moe_num_experts * (shares * scores).sum(-1).mean()


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The model for transformers' generate(), pipelines and trainers."""

    config_class = OpenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads a plain class attribute

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config)
        if config.weight_tying:
            self._tied_weights_keys = {"model.output.weight": "model.tok_embeddings.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, self.config.dim**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.output = new_embeddings

    def forward(  # noqa: PLR0917 (the order in transformers)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute next-token logits and, with labels, the loss.

        Args:
            input_ids: (B,T) int64, or inputs_embeds: (B,T,D).
            attention_mask: (B,P), nonzero for real tokens; positions are derived from it.
            past_key_values: a cache, extended in place; with use_cache a new one if None.
            labels: (B,T) int64, the input ids with -100 for tokens that are not targets; shifted here.
            output_hidden_states: return the final normalized states as the only element of hidden_states.
            logits_to_keep: compute the logits of only this number of last positions; 0 for all.
            num_items_in_batch: divide the summed loss by this number instead of the number of targets.

        Returns:
            loss or None, logits (B,T,V) float32, past_key_values, hidden_states.
        """
        states = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        hidden = states.last_hidden_state
        kept = logits_to_keep if labels is None else 0
        logits = self.model.logits(hidden[:, -kept:] if kept else hidden)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss, logits, states.past_key_values, (hidden,) if output_hidden_states else None
        )
        return output if return_dict in (None, True) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        targets = labels[:, 1:].flatten().to(logits.device)
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        loss = total / ((targets != -100).sum() if num_items is None else num_items)
        balancing = self.model.balancing_loss() if self.training else None
        return loss if balancing is None else loss + balancing
