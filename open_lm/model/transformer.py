"""The model: Params, Block, Transformer, and how they are made from a configuration.

Legend: B batch, T sequence, P cached positions before it, D model width, H heads, K head width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.config.architecture import architecture_of
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError, join_problems
from open_lm.kernels.linear import FusedLinear, Linear
from open_lm.model.attention import AttnFunc, Mask, find_documents, get_attn_func
from open_lm.model.feed_forward import get_feed_forward
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss
from open_lm.model.mixture_of_experts import MixtureOfExperts
from open_lm.model.norms import get_norm_class
from open_lm.model.positional_embedding import Angles, get_positional_embedding, token_positions
from open_lm.model.recomputation import POLICIES, recomputed

LayerCache = Sequence[Tensor]  # keys and values of a layer, both (B,P,H,K), keys already rotated


@dataclass
class Params:
    """The shape of a model. Fields that are left None follow from the names beside them."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    vocab_size: int = 50432
    seq_len: int = 2048
    norm_eps: float = 1e-5
    post_embed_norm: bool = False
    weight_tying: bool = False
    model_norm: str = "default_layer_norm"
    norm_type: Callable[..., nn.Module] | None = None
    attn_name: str = "auto"
    attn_activation: str | None = None
    attn_seq_scalar: str | None = None
    attn_seq_scalar_alpha: float | None = None
    attn_func: AttnFunc | None = None
    apply_qk_norm: bool = False
    positional_embedding_type: str = "rotary"
    ffn_type: str = "swiglu"
    moe_freq: int = 0
    moe_num_experts: int | None = None
    moe_top_k: int = 2
    moe_capacity_factor: float = 1.25
    moe_loss_weight: float = 0.1
    moe_weight_parallelism: bool = False
    moe_expert_model_parallelism: bool = False

    def __post_init__(self) -> None:
        if self.norm_type is None:
            self.norm_type = get_norm_class(self.model_norm)
        if self.attn_func is None:
            self.attn_func = get_attn_func(
                self.attn_name, self.attn_activation, self.attn_seq_scalar, self.attn_seq_scalar_alpha
            )
        problems = self._problems()
        if problems:
            raise ConfigError(join_problems(problems, "the model's configuration"))

    def _problems(self) -> list[str]:
        problems = [
            f"{label} is {value}, expected at least 1"
            for label, value in (
                ("hidden_dim", self.dim),
                ("n_layers", self.n_layers),
                ("n_heads", self.n_heads),
                ("vocab_size", self.vocab_size),
                ("seq_len", self.seq_len),
            )
            if value < 1
        ]
        if 1 <= self.dim < self.n_heads:
            problems.append(f"n_heads is {self.n_heads}, more than hidden_dim {self.dim}")
        if self.moe_freq > 0:
            experts = self.moe_num_experts
            if experts is None or experts < 1:
                problems.append(f"--moe-num-experts is {experts}, expected at least 1 because --moe-freq is set")
            elif not 1 <= self.moe_top_k <= experts:
                problems.append(f"--moe-top-k is {self.moe_top_k}, expected 1 to {experts}, the number of experts")
        return problems

    @property
    def hidden_dim(self) -> int:
        """D, as the JSON files call it."""
        return self.dim

    @property
    def head_dim(self) -> int:
        """K; H * K may be less than D."""
        return self.dim // self.n_heads

    def norm(self, width: int) -> nn.Module:
        """A new normalisation over the last dimension."""
        assert self.norm_type is not None
        return self.norm_type(width, eps=self.norm_eps)


class Attention(nn.Module):
    """Causal self-attention of one block."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        assert params.attn_func is not None
        self.n_heads, self.head_dim = params.n_heads, params.head_dim
        width = self.n_heads * self.head_dim
        self.in_proj = FusedLinear(params.dim, 3 * width, parts=3)
        self.out_proj = Linear(width, params.dim, bias=False)
        self.pos_embed: Any = get_positional_embedding(params.positional_embedding_type, self.head_dim)
        self.attn_func = params.attn_func
        self.q_norm = params.norm(width) if params.apply_qk_norm else nn.Identity()
        self.k_norm = params.norm(width) if params.apply_qk_norm else nn.Identity()

    def angles(self, x: Tensor, past: LayerCache | None, attention_mask: Mask | None) -> Angles | None:
        """By which `forward` is to turn queries and keys: the same in all layers."""
        positions = token_positions(x, 0 if past is None else past[0].shape[1], attention_mask)
        angles: Angles | None = self.pos_embed.angles(positions, self.n_heads)
        return angles

    def forward(
        self,
        x: Tensor,
        past: LayerCache | None = None,
        attention_mask: Mask | None = None,
        angles: Angles | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B,T,D), past 2 x (B,P,H,K), attention_mask (B,P+T) or documents -> (B,T,D) and keys and values 2 x
        (B,P+T,H,K). Without `angles` they are computed here."""
        queries, keys, values = self.in_proj(x).chunk(3, dim=-1)
        heads = (-1, self.head_dim)  # not n_heads: under tensor parallelism these are a rank's heads alone
        queries = self.q_norm(queries).unflatten(-1, heads)
        keys = self.k_norm(keys).unflatten(-1, heads)
        values = values.unflatten(-1, heads)
        angles = self.angles(x, past, attention_mask) if angles is None else angles
        queries, keys, values = self.pos_embed(queries, keys, values, angles)
        if past is not None:
            keys = torch.cat((past[0], keys), dim=1)
            values = torch.cat((past[1], values), dim=1)
        mixed = self.attn_func(queries, keys, values, is_causal=True, attention_mask=attention_mask)
        return self.out_proj(mixed.flatten(-2)), [keys, values]


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    Args:
        layer_id: the block's index from 0; with params.moe_freq = n, blocks 0, n, 2n, … have a mixture of experts.
        params: the model's shape.
    """

    def __init__(self, layer_id: int, params: Params) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(params)
        self.feed_forward: nn.Module
        if params.moe_freq > 0 and layer_id % params.moe_freq == 0:
            assert params.moe_num_experts is not None
            self.feed_forward = MixtureOfExperts(
                params.dim, params.moe_num_experts, params.moe_top_k, params.moe_capacity_factor
            )
        else:
            self.feed_forward = get_feed_forward(params.ffn_type, params.dim)
        if isinstance(self.feed_forward, nn.Sequential):
            # Existing checkpoints hold these two weights under a second name as well.
            self._ff_w1, self._ff_w2 = self.feed_forward[0], self.feed_forward[2]
        self.attention_norm = params.norm(params.dim)
        self.ffn_norm = params.norm(params.dim)

    def forward(
        self,
        x: Tensor,
        past_key_value: LayerCache | None = None,
        use_cache: bool = False,
        attention_mask: Mask | None = None,
        angles: Angles | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x (B,T,D), attention_mask (B,P+T) or documents, angles as `Attention` takes them -> (B,T,D) and, with
        use_cache, keys and values 2 x (B,P+T,H,K)."""
        mixed, cache = self.attention(self.attention_norm(x), past_key_value, attention_mask, angles)
        x = x + mixed
        x = x + self.feed_forward(self.ffn_norm(x))
        return x, cache if use_cache else None


class Transformer(nn.Module):
    """A decoder-only language model.

    Made with memory it is initialised from torch's global generator; made under torch.device("meta") it is not: call
    `to_empty` and then `reset_parameters` or load a checkpoint.
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
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.post_embed_norm = params.norm(params.dim) if params.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(layer_id, params) for layer_id in range(params.n_layers))
        self.norm = params.norm(params.dim)
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)
        self._tie_weights()
        if not self.output.weight.is_meta:
            self.reset_parameters()

    def _tie_weights(self) -> None:
        if self.weight_tying:
            self.tok_embeddings.weight = self.output.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)
        self._tie_weights()  # moving from the meta device makes a new parameter for each module
        return self

    def reset_parameters(self, seed: int | None = None) -> None:
        """Initialise anew, see `init_weights`; without a seed one is drawn from torch's global generator."""
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        init_weights(self, seed)

    def set_grad_checkpointing(self, enable: bool = True, policy: str = "full", every: int = 1) -> None:
        """Keep less of blocks 0, every, 2 * every, … for the backward pass, and compute the rest again there.

        Args:
            enable: False keeps everything, whatever else is given.
            policy: "full" keeps a block's input alone, "op" also what matrix products and attention give.
            every: of how many blocks one is treated so.

        Raises:
            ConfigError: another policy, or `every` below 1.
        """
        if policy not in POLICIES or every < 1:
            raise ConfigError(
                f"--activation-checkpointing: found policy {policy!r} of every {every}. block, expected one of "
                f"{', '.join(POLICIES)}, and 1 or more"
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
    ) -> tuple[Tensor, Tensor, list[list[Tensor]] | None]:
        """Next-token logits, or their loss.

        Args:
            input_ids: (B,T) int64 token ids; or
            inputs_embeds: (B,T,D) float in their place.
            past_key_values: L pairs of keys and values (B,P,H,K), as an earlier call returned them; not changed.
            use_cache: return such pairs for what this call has seen.
            attention_mask: (B,P+T), nonzero for real tokens, 0 for padding; rows padded on the left get the logits of
                the unpadded rows. Logits at padding mean nothing. Or `Documents`, which say where tokens stand and how
                they attend.
            document_ids: (B,T) integers, equal for neighbours of one document (data.masking.document_ids): attention
                stays inside documents and positions start at 0 in each, so that a row of several documents gets the
                logits of each of them alone. For whole rows: not with past_key_values, use_cache or attention_mask.
            loss: compute this loss in place of logits, which are then never held as a whole.

        Returns:
            logits (B,T,V) float32, or the loss; the normalised hidden states (B,T,D); with use_cache L pairs
            (B,P+T,H,K), else None.

        Raises:
            ValueError: neither or both of the inputs, a mask or document_ids of another shape, or document_ids together
                with what they cannot go with.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask
        if document_ids is not None:
            _check_document_ids(
                document_ids, x, past_key_values=past_key_values, use_cache=use_cache, attention_mask=attention_mask
            )
            assert self.params.attn_func is not None
            mask = find_documents(document_ids, self.params.attn_func)
        first: Any = self.layers[0]
        angles = first.attention.angles(x, past_key_values[0] if past_key_values else None, mask)
        x = self.post_embed_norm(x)
        caches: list[list[Tensor]] = []
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not use_cache
        policy, every = self._recomputation
        for i, block in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            run = recomputed(block, policy) if recompute and i % every == 0 else block
            x, cache = run(x, past, use_cache, mask, angles)
            if cache is not None:
                caches.append(cache)
        hidden = self.norm(x)
        if loss is not None:
            return loss.of_hidden(hidden, self.output.weight), hidden, caches or None
        return self.output(hidden).float(), hidden, caches or None

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the mean token loss of the last forward in training mode; None without experts.

        The mean load-balancing loss of the mixtures of experts times params.moe_loss_weight: a float32 scalar with its
        graph, on the device. With micro-batches or ranks, average it over them.
        """
        losses = [
            module.balancing_loss
            for module in self.modules()
            if isinstance(module, MixtureOfExperts) and module.balancing_loss is not None
        ]
        if not losses:
            return None
        return self.params.moe_loss_weight * torch.stack(losses).mean()


def _check_document_ids(document_ids: Tensor, x: Tensor, **others: Any) -> None:
    """ValueError for document_ids of another shape or type than x (B,T,D) asks for, or given together with others."""
    found = [name for name, value in others.items() if value is not None and value is not False]
    if found:
        raise ValueError(
            f"document_ids together with {', '.join(found)}: documents are kept apart in whole rows only, without "
            "cached keys or padding; leave out one or the other"
        )
    if document_ids.shape != x.shape[:2] or document_ids.is_floating_point():
        shape, kind = tuple(document_ids.shape), document_ids.dtype
        raise ValueError(f"document_ids have shape {shape} of {kind}, expected integers of shape {tuple(x.shape[:2])}")


def create_params(cfg: object) -> Params:
    """The shape of the model that a ModelConfig, or any object with its attributes, names.

    What the model's JSON file says wins over the other attributes.

    Raises:
        ConfigError: an unknown name, a missing or broken file, or settings that cannot be.
    """
    section = ModelConfig.from_object(cfg)
    file = architecture_of(section.model)

    def pick(name: str) -> Any:
        return file.get(name, getattr(section, name))

    return Params(
        dim=file["hidden_dim"],
        n_layers=file["n_layers"],
        n_heads=file["n_heads"],
        vocab_size=file["vocab_size"],
        seq_len=file["seq_len"],
        post_embed_norm=file["post_embed_norm"],
        weight_tying=file["weight_tying"],
        model_norm=pick("model_norm"),
        attn_name=section.attn_name,
        attn_activation=section.attn_activation,
        attn_seq_scalar=section.attn_seq_scalar,
        attn_seq_scalar_alpha=section.attn_seq_scalar_alpha,
        apply_qk_norm=pick("qk_norm"),
        positional_embedding_type=pick("positional_embedding_type"),
        ffn_type=pick("ffn_type"),
        moe_freq=pick("moe_freq"),
        moe_num_experts=pick("moe_num_experts"),
        moe_top_k=pick("moe_top_k"),
        moe_capacity_factor=pick("moe_capacity_factor"),
        moe_loss_weight=pick("moe_loss_weight"),
        moe_weight_parallelism=pick("moe_weight_parallelism"),
        moe_expert_model_parallelism=pick("moe_expert_model_parallelism"),
    )


def create_model(cfg: object) -> Transformer:
    """A new, initialised model; see `create_params`. Under torch.device("meta") it takes no memory."""
    return Transformer(create_params(cfg))
