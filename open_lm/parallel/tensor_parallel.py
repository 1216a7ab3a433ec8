"""Tensor parallelism with sequence parallelism: N ranks split every matrix and, in the norms, every sequence.

    tok_embeddings   local rows of the vocabulary; sum over ranks (B,T,D), split to the local tokens (B,t,D)
    norms            (B,t,D)
    attention        all-gather (B,T,D) -> local heads -> partial sums (B,T,D) -> reduce-scatter (B,t,D)
    feed_forward     all-gather (B,T,D) -> local hidden features -> partial sums (B,T,D) -> reduce-scatter (B,t,D)
    norm, output     all-gather (B,T,D); the loss, or logits, over the local rows of the vocabulary

(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198.)
The model needs no changes. Its parameters become DTensors over the mesh dimension "tensor"; modules read their local
shards, and hooks communicate activations. Gradients of replicated parameters are partial sums, which FSDP2 adds up
before it averages them. Therefore FSDP2 must be applied afterwards, over a mesh of one rank if nothing is sharded.
Legend: B batch, T sequence, t local tokens (T/N; fewer on the last ranks if T is not divisible), D model width,
H heads, K head width, W = H*K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from open_lm.config.registry import FEED_FORWARDS
from open_lm.distributed.param_names import is_adapter_name
from open_lm.errors import ConfigError, join_problems
from open_lm.model.adapters import Adapter
from open_lm.model.mixture_of_experts import MixtureOfExperts
from open_lm.model.norms import GemmaRmsNorm, LayerNorm, LPLayerNorm, RmsNorm
from open_lm.model.positional_embedding.rotary import Angles, HeadRotary
from open_lm.parallel.split_parameters import override_attributes, split_parameters

# The dimension along which a block's parameter is split, by its name pattern; None means replicated. The matrices of
# feed-forward networks are declared in their registry. Other parameters are replicated if they have one dimension, and
# an error otherwise.
SPLIT_DIMS: tuple[tuple[str, int | None], ...] = (
    ("attention.in_proj.*", 0),
    ("attention.q_proj.*", 0),
    ("attention.kv_proj.*", 0),
    ("attention.[qk]_norm.*", 0),
    ("attention.out_proj.weight", 1),
    ("feed_forward.router.layer.weight", None),
    ("feed_forward.experts.mlp.w[13]", 2),
    ("feed_forward.experts.mlp.w2", 1),
)
# Of the above, those that are replicated if the key heads cannot be divided among the ranks, and those that are
# replicated if the norms of queries and keys normalize each head.
_KEY_HEADS, _HEAD_NORMS = ("attention.kv_proj.*", "attention.k_norm.*"), ("attention.[qk]_norm.*",)


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split a Transformer over the ranks of the one-dimensional `mesh`, in place; see `check_tensor_parallel`."""
    root: Any = model
    hooks = _ActivationHooks(mesh)
    tied = root.output.weight is root.tok_embeddings.weight
    parallelize_module(root.tok_embeddings, mesh, RowwiseParallel(input_layouts=Replicate()))
    # `ScaledEmbedding.forward` would multiply a DTensor, so scale the sum over ranks instead.
    override_attributes(root.tok_embeddings, forward=nn.Embedding.forward)
    # FSDP2 warns about modules that return views, so return a copy.
    root.tok_embeddings.register_forward_hook(lambda embedding, args, output: embedding.scaled(output).clone())
    _split_output(root.output, mesh)
    if tied:
        root.tok_embeddings.weight = root.output.weight
    # A caller may pass full embeddings instead of token ids, so split behind the point where both paths join.
    root.post_embed_norm.register_forward_pre_hook(hooks.split)
    root.norm.register_forward_hook(hooks.gather_replicated)
    for norm in (root.post_embed_norm, root.norm):
        split_parameters(norm, mesh, {})
    for block in root.layers:
        _split_block(block, mesh, hooks)


def _split_output(output: nn.Module, mesh: DeviceMesh) -> None:
    """Split the rows of the output layer. Its loss takes the DTensors; logits are gathered on all ranks."""
    for name, parameter in list(output.named_parameters(recurse=False)):
        split = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        output.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))

    def replicate(_: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if settings.get("loss") is None:
            args = (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False),)
        return args, settings

    def gather(_: nn.Module, args: object, result: Tensor) -> Tensor:
        return result.redistribute(placements=[Replicate()]).to_local() if isinstance(result, DTensor) else result

    output.register_forward_pre_hook(replicate, with_kwargs=True)
    output.register_forward_hook(gather)


def check_tensor_parallel(model: nn.Module, ranks: int) -> None:
    """Raise ConfigError if a Transformer cannot be split over `ranks` ranks."""
    root: Any = model
    widths = {"heads": root.params.n_heads}
    for block in root.layers:
        for name, parameter in block.named_parameters():
            dim = _split_dim(name, parameter)
            if name.startswith("feed_forward.") and dim:  # the input dimension of the down projection
                widths["hidden features of the feed-forward"] = parameter.shape[dim]
    problems = []
    common = math.gcd(*widths.values())
    if common % ranks:
        valid = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        sizes = " and ".join(f"{width} {name}" for name, width in widths.items())
        problems.append(f"the model has {sizes}, which are divisible over {valid} ranks")
    vocab_size = root.vocab_size
    if (ranks - 1) * -(-vocab_size // ranks) >= vocab_size:
        problems.append(f"a vocabulary of {vocab_size} tokens leaves a rank without a row of the embedding matrix")
    attention = root.layers[0].attention
    norm = attention.q_norm
    divisible_norms = (nn.Identity, nn.LayerNorm, LayerNorm, RmsNorm, GemmaRmsNorm)
    if not attention.norms_heads and not isinstance(norm, divisible_norms):
        problems.append(
            f"--qk-norm with {type(norm).__name__} needs all heads on one rank; choose another --model-norm"
        )
    if problems:
        raise ConfigError(join_problems([f"--tensor-parallel {ranks}: {problem}" for problem in problems]))


# ------------------------------------------------------------------------------------------ parameters
def _split_dim(name: str, parameter: Tensor) -> int | None:
    if is_adapter_name(name):
        layer, _, parameter_name = name.partition(".adapter.")
        dim = _split_dim(f"{layer}.weight", parameter)
        # The columns of A are split like those of the layer's weight, the rows of the others like its rows.
        return dim if (parameter_name == "lora_A") == (dim == 1) else None
    for pattern, dim in (*SPLIT_DIMS, *_feed_forward_dims()):
        if fnmatch(name, pattern):
            return dim
    if parameter.dim() > 1:
        raise ConfigError(f"--tensor-parallel does not support the parameter {name}; remove the flag")
    return None


def _feed_forward_dims() -> Iterator[tuple[str, int]]:
    for entry in FEED_FORWARDS.entries().values():
        yield from ((f"feed_forward.{name}.*", 0) for name in entry.facts.get("inputs", ()))
        yield from ((f"feed_forward.{name}.weight", 1) for name in entry.facts.get("outputs", ()))


def _split_block(block: nn.Module, mesh: DeviceMesh, hooks: _ActivationHooks) -> None:
    attention: Any = block.get_submodule("attention")
    feed_forward = block.get_submodule("feed_forward")
    replicated: tuple[str, ...] = _HEAD_NORMS if attention.norms_heads else ()
    if attention.num_key_heads % mesh.size():
        replicated += _KEY_HEADS
        attention.local_key_heads = local_key_heads(
            attention.n_heads, attention.num_key_heads, mesh.size(), mesh.get_local_rank()
        )
    for prefix, module in block.named_modules():
        dims: dict[str, int | None] = {}
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}"
            is_replicated = any(fnmatch(path, pattern) for pattern in replicated)
            dims[name] = None if is_replicated else _split_dim(path, parameter)
        split_parameters(module, mesh, dims)
        if isinstance(module, Adapter) and dims["lora_A"] == 1:
            module.tensor_mesh = mesh
    for network in (attention, feed_forward):
        network.register_forward_pre_hook(hooks.gather)
        network.register_forward_hook(hooks.reduce_scatter)
    for name in ("q_norm", "k_norm"):
        norm: Any = attention.get_submodule(name)
        if not isinstance(norm, nn.Identity) and not any(fnmatch(f"attention.{name}.weight", p) for p in replicated):
            norm.tensor_mesh = mesh
            override_attributes(norm, forward=_norm_over_ranks)
    positions: Any = attention.pos_embed
    if isinstance(positions, HeadRotary):
        positions.tensor_mesh = mesh  # type: ignore[assignment]
        override_attributes(positions, angles=_local_head_angles)
    if isinstance(feed_forward, MixtureOfExperts):
        feed_forward.register_forward_hook(_scale_balancing_loss_gradient(mesh.size()))


def local_key_heads(heads: int, key_heads: int, ranks: int, rank: int) -> list[int]:
    """Return the key heads that the query heads of a rank use, each for equally many query heads.

    If the groups of query heads are not divided evenly, the result has one key head for each query head.
    """
    local = heads // ranks
    used = [head // (heads // key_heads) for head in range(rank * local, (rank + 1) * local)]
    distinct = sorted(set(used))
    is_even = used == [head for head in distinct for _ in range(local // len(distinct))]
    return distinct if is_even else used


# ------------------------------------------------------------------------------------------ activations
class _ActivationHooks:
    """Module hooks that redistribute activations (B,T,D), forward and backward."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.length = 0  # T of the current forward pass

    def split(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Split replicated activations: (B,T,D) -> (B,t,D)."""
        self.length = args[0].shape[1]
        return self._redistribute(args[0], Replicate(), Shard(1)).to_local(), *args[1:]

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All-gather (B,t,D) -> (B,T,D); the gradients of the result are partial sums.

        The result has the autocast dtype if autocast is enabled, because only matrix products follow.
        """
        x = args[0]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._redistribute(x, Shard(1), Replicate()).to_local(grad_placements=[Partial()]), *args[1:]

    def gather_replicated(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """All-gather (B,t,D) -> (B,T,D); the gradient of the result is the same on all ranks."""
        # FSDP2 warns about views in a model's outputs, so return a copy.
        return self._redistribute(x, Shard(1), Replicate()).to_local().clone()

    def reduce_scatter(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Sum partial sums (B,T,D) over ranks and split them: -> (B,t,D). Applies to the first of several outputs."""
        if isinstance(output, tuple):
            return self.reduce_scatter(module, args, output[0]), *output[1:]
        return self._redistribute(output, Partial(), Shard(1)).to_local()

    def _redistribute(self, x: Tensor, source: Placement, target: Placement) -> DTensor:
        shape = torch.Size((x.shape[0], self.length, *x.shape[2:]))
        stride = (self.length * x.shape[2], x.shape[2], 1)
        activations = DTensor.from_local(x, self.mesh, [source], run_check=False, shape=shape, stride=stride)
        return activations.redistribute(placements=[target])


def _norm_over_ranks(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm over W features that are split over the ranks: x (B,T,W/N) -> (B,T,W/N).

    The ranks all-gather the mean and variance of their features and combine them.
    """
    wide = x.float()
    is_centred = not isinstance(norm, (RmsNorm, GemmaRmsNorm))
    mean = wide.mean(-1, keepdim=True) if is_centred else torch.zeros_like(wide[..., :1])
    local = torch.stack((mean, (wide - mean).square().mean(-1, keepdim=True)))
    sharded = DTensor.from_local(local, norm.tensor_mesh, [Shard(3)], run_check=False)
    gathered = sharded.redistribute(placements=[Replicate()])
    means, variances = gathered.to_local(grad_placements=[Partial()]).unbind()  # (B,T,N) each
    mean = means.mean(-1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(-1, keepdim=True)
    result = (wide - mean) * torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        result = result * (getattr(norm, "gain_offset", 0.0) + norm.weight.float())
    bias = getattr(norm, "bias", None)
    if bias is not None:
        result = result + bias.float()
    # Like the unsplit norms: float32 under autocast, except that LPLayerNorm keeps the autocast dtype.
    keeps_dtype = isinstance(norm, LPLayerNorm) or not torch.is_autocast_enabled(x.device.type)
    return result.to(x.dtype) if keeps_dtype else result


def _local_head_angles(embedding: Any, positions: Tensor, heads: int, lengths: Tensor | None = None) -> Angles:
    """Return `HeadRotary.angles` of this rank's heads; `heads` is the number of all heads."""
    angles, mesh = HeadRotary.angles(embedding, positions, heads), embedding.tensor_mesh
    return Angles(*(table.chunk(mesh.size())[mesh.get_local_rank()] for table in (angles.cos, angles.sin)))


def _scale_balancing_loss_gradient(ranks: int) -> Callable[..., None]:
    """Return a hook that scales the gradient of the balancing loss by 1/ranks.

    All ranks compute the same loss and their gradients are summed, so each rank contributes 1/ranks.
    """

    def scale(module: Any, args: Any, output: Any) -> None:
        if module.loads is not None:
            shares, scores = module.loads
            module.loads = shares, scores.detach() + (scores - scores.detach()) / ranks

    return scale
