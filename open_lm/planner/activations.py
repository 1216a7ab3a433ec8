"""List the activations that the forward pass saves for the backward pass. Update this table when the model changes.

Every entry is a tensor that autograd saves. The entries were found with torch.autograd.graph.saved_tensors_hooks on a
block; scripts/check_plan.py compares them with torch's memory tracker. Compiled blocks save less: the partitioner of
torch.compile recomputes norms, casts and activation functions in the backward pass.
Legend: D model width, W width of all heads, H heads, F hidden width of the feed-forward network, E experts,
k experts of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from open_lm.config.registry import NORMS, POSITIONAL_EMBEDDINGS
from open_lm.config.sections import Config
from open_lm.planner.shapes import ModelShape

Split = Literal["tokens", "features", "replicated"]


@dataclass(frozen=True)
class ElementSizes:
    """The bytes per element of each kind of tensor.

    Attributes:
        stored: parameters, reduced gradients and moments.
        gathered: parameters as FSDP gathers them, and gradients before their reduction.
        reduced: gradients during their reduction.
        compute: operands of matrix products.
        residual: the residual stream.
        autocast: whether autocast casts the matrices for each use.
        norms: the dtype that norms compute in; 0 for the dtype of their input.
    """

    stored: int
    gathered: int
    reduced: int
    compute: int
    residual: int
    autocast: bool
    norms: int = 0


def element_sizes(config: Config, device_type: str = "cuda") -> ElementSizes:
    """Return the element sizes that follow from --precision, --fsdp-amp, --fsdp-pure-bf16 and --model-norm."""
    precision, parallel = config.precision.precision, config.parallel
    stored = 2 if precision in ("bf16", "fp16") else 4
    mixed = parallel.fsdp and (parallel.fsdp_amp or parallel.fsdp_pure_bf16)
    gathered = 2 if mixed else stored
    reduced = 4 if mixed and parallel.fsdp_amp else gathered
    autocast = precision.startswith("amp")
    # The embedding determines the dtype of the residual stream; no addition to it is wider than float32.
    residual, compute = gathered, 2 if autocast else gathered
    norms = 0
    if autocast and NORMS.fact(config.model.model_norm, "computes_in") == "autocast":
        norms = compute
    elif autocast and device_type == "cuda":
        norms = 4  # autocast runs norms in float32 on CUDA, but not on CPU
    return ElementSizes(stored, gathered, reduced, compute, residual, autocast, norms)


@dataclass(frozen=True)
class SavedActivations:
    """A saved tensor of `features` elements of `bytes` per token. `split`: what tensor parallelism shards."""

    name: str
    features: float
    bytes: int
    split: Split = "features"


def total_bytes(saved: Iterable[SavedActivations], tokens: int, tensor: int = 1) -> int:
    """Return the bytes on one of `tensor` tensor-parallel ranks that process `tokens` together."""
    return round(sum(s.features * s.bytes * tokens / (1 if s.split == "replicated" else tensor) for s in saved))


def saved_by_block(
    shape: ModelShape, sizes: ElementSizes, block: int, context: int = 1, compiled: bool = False
) -> list[SavedActivations]:
    """Return what block number `block` saves with `context` context-parallel ranks. Mirrors model/transformer.py."""
    if compiled:
        first, *others = shape.block_norms
        # The sums of the residual stream inside of the block are recomputed from the output of attention.
        saved = [SavedActivations(first, shape.dim, sizes.residual, "tokens")]
        saved += [SavedActivations(name, shape.dim, sizes.compute, "tokens") for name in others]
    else:
        saved = [tensor for name in shape.block_norms for tensor in _norm(name, shape, sizes)]
    if shape.residual_dropout:
        saved.append(SavedActivations("dropout masks", 2 * shape.dim, 1, "tokens"))
    return [
        *saved,
        *_attention(shape, sizes, context, compiled),
        *(_experts(shape, sizes) if shape.has_experts(block) else _feed_forward(shape, sizes, compiled)),
    ]


@dataclass(frozen=True)
class Product:
    """A matrix product of a block: `outputs` features per token from `inputs` features per output."""

    name: str
    inputs: int
    outputs: float
    split: Split = "features"

    @property
    def multiplications(self) -> float:
        """The multiplications per token."""
        return self.inputs * self.outputs


def products(shape: ModelShape, block: int) -> list[Product]:
    """Return the matrix products of block number `block` in the order of its forward pass."""
    dim, width = shape.dim, shape.width
    into = [Product("queries, keys, values", dim, width + 2 * shape.kv_width)]
    if shape.kv_width < width:
        into = [Product("queries", dim, width), Product("keys, values", dim, 2 * shape.kv_width)]
    into.append(Product("out_proj", width, dim, "tokens"))
    if shape.has_experts(block):
        slots = expert_slots(shape)
        inputs = [Product("experts in", dim, slots * shape.moe_ffn_dim)] * shape.expert_inputs
        return [
            *into,
            Product("router", dim, shape.moe_num_experts),
            *inputs,
            Product("experts out", shape.moe_ffn_dim, slots * dim),
        ]
    return [
        *into,
        *(Product(name, dim, parts * shape.hidden) for name, parts in shape.ffn_inputs.items()),
        Product("feed_forward out", shape.hidden, dim, "tokens"),
    ]


def saved_with_op_checkpointing(
    shape: ModelShape, sizes: ElementSizes, block: int, every: int = 1, exchanges: bool = False
) -> list[SavedActivations]:
    """Return what a block saves with --activation-checkpointing op: its input, and the results of attention and of one
    in `every` matrix products. If it `exchanges` tokens with other ranks, also what it receives."""
    c = sizes.compute
    received = 2 * expert_slots(shape) * shape.dim if exchanges and shape.has_experts(block) else 0.0
    return [
        SavedActivations("exchanged tokens", received, c),
        SavedActivations("input", shape.dim, sizes.residual, "tokens"),
        SavedActivations("attention", shape.width, c),
        SavedActivations("logsumexp", shape.n_heads, 4),
        *(SavedActivations(p.name, p.outputs, c, p.split) for p in products(shape, block)[::every]),
    ]


def backward_transients(shape: ModelShape, sizes: ElementSizes, block: int) -> list[SavedActivations]:
    """Return what a block's backward pass holds at its peak beyond the saved activations: feed-forward gradients."""
    c = sizes.compute
    if shape.has_experts(block):
        slots = expert_slots(shape)
        return [
            SavedActivations("experts", slots * shape.expert_inputs * shape.moe_ffn_dim, c),
            SavedActivations("gradients", shape.moe_top_k * shape.dim, c),
        ]
    return [
        SavedActivations("feed_forward", sum(shape.ffn_inputs.values()) * shape.hidden, c),
        SavedActivations("gradient of the output", shape.dim, sizes.residual, "tokens"),
        SavedActivations("its cast", shape.dim if sizes.autocast and sizes.residual != c else 0, c, "replicated"),
    ]


def saved_by_head(shape: ModelShape, sizes: ElementSizes) -> list[SavedActivations]:
    """Return what is saved after the last block: the inputs of the last norm and the head, token ids and targets."""
    return [
        *_norm("norm", shape, sizes),
        SavedActivations("head", shape.dim, sizes.compute, "replicated"),
        SavedActivations("ids", 2, 8, "replicated"),
    ]


def _norm(name: str, shape: ModelShape, sizes: ElementSizes) -> list[SavedActivations]:
    """Return what a norm saves: its input, or a copy in the dtype that it computes in. Mirrors model/norms.py."""
    if NORMS.fact(shape.model_norm, "computes_in") == "float32":
        return [
            SavedActivations(f"{name} in float32", shape.dim, 4, "tokens"),
            SavedActivations(f"{name} before the gain", shape.dim, sizes.residual, "tokens"),
            SavedActivations(f"{name} scale", 1, 4, "tokens"),
        ]
    return [
        SavedActivations(f"{name} input", shape.dim, sizes.norms or sizes.residual, "tokens"),
        SavedActivations(f"{name} statistics", 2, 4, "tokens"),
    ]


def _attention(shape: ModelShape, sizes: ElementSizes, context: int, compiled: bool) -> list[SavedActivations]:
    """Return what attention saves.

    Mirrors model/transformer.py with a kernel that does not materialize the scores, positional_embedding/rotary.py, and
    context_parallel.py, which gathers the keys and values of all ranks.
    """
    width, kv_width, c = shape.width, shape.kv_width, sizes.compute
    saved = [
        SavedActivations("in_proj input", shape.dim, c, "replicated"),
        SavedActivations("queries, keys, values", width + 2 * kv_width, c),
    ]
    if kv_width < width and c == 4:  # the fused kernels for grouped heads need half precision
        saved.append(SavedActivations("repeated keys, values", 2 * width, c))
    if context > 1:
        saved.append(SavedActivations("gathered keys, values", 2 * kv_width * context, c))
    if shape.qk_norm and not compiled:
        # Norms of queries and keys read the output of in_proj, which is saved already. A norm that computes in another
        # dtype saves a copy.
        if sizes.norms not in (0, c):
            saved += [SavedActivations("queries, keys for their norms", width + kv_width, sizes.norms)]
        saved += [SavedActivations("statistics", 4, 4)]
    if POSITIONAL_EMBEDDINGS.fact(shape.positional_embedding_type, "rotates", True) or shape.qk_norm:
        saved.append(SavedActivations("rotated queries, keys", width + kv_width, c))
    return [*saved, SavedActivations("attention", width, c), SavedActivations("logsumexp", shape.n_heads, 4)]


def _feed_forward(shape: ModelShape, sizes: ElementSizes, compiled: bool) -> list[SavedActivations]:
    """Return what a feed-forward network saves. Mirrors model/feed_forward.py."""
    hidden, c = shape.hidden, sizes.compute
    if sum(shape.ffn_inputs.values()) == 1:  # not gated
        return [
            SavedActivations("input", shape.dim, c, "replicated"),
            SavedActivations("0", hidden, c),
            SavedActivations("gelu", hidden, c),
        ]
    # Each of several input matrices casts its input.
    casts = len(shape.ffn_inputs) if sizes.autocast and sizes.residual != c and not compiled else 1
    return [
        SavedActivations("input", casts * shape.dim, c, "replicated"),
        SavedActivations("gate, up", 2 * hidden, c),
        *([] if compiled else [SavedActivations("activated gate", hidden, c)]),
        SavedActivations("product", hidden, c),
    ]


def expert_slots(shape: ModelShape) -> float:
    """Return the slots of all experts per token; without a capacity, there is one per chosen expert."""
    return (shape.moe_capacity_factor if shape.moe_capacity_factor > 0 else 1.0) * shape.moe_top_k


def _experts(shape: ModelShape, sizes: ElementSizes) -> list[SavedActivations]:
    """Return what a mixture of experts with bounded capacity saves. Mirrors model/mixture_of_experts.py."""
    dim, k, c = shape.dim, shape.moe_top_k, sizes.compute
    slots = expert_slots(shape)
    return [
        SavedActivations("router", dim, c, "replicated"),
        SavedActivations("scores", shape.moe_num_experts, 4, "replicated"),
        SavedActivations("tokens, one copy per selected expert", k * dim, sizes.residual, "replicated"),
        SavedActivations("slots", slots * dim, c, "replicated"),
        # Before and after the activation; with a gate also the second input and the product.
        SavedActivations("hidden", 2 * shape.expert_inputs * slots * shape.moe_ffn_dim, c, "replicated"),
        SavedActivations("expert outputs", k * dim, c, "replicated"),
    ]
