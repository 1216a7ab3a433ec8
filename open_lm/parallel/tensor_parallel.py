"""Tensor parallelism: each of N ranks has a part of every matrix and, between the blocks' networks, of every sequence.

    tok_embeddings   own rows of the vocabulary; the sum over ranks (B,T,D) is cut to the rank's own tokens (B,t,D)
    norms            (B,t,D)
    attention        gathered (B,T,D) -> own heads -> partial sums (B,T,D), added and cut to (B,t,D)
    feed_forward     gathered (B,T,D) -> own hidden features -> partial sums (B,T,D), added and cut to (B,t,D)
    norm, output     gathered (B,T,D); the loss, or logits, over own rows of the vocabulary

(Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198.)
The model knows nothing of it. Its parameters become DTensors over the mesh dimension "tensor", of which a module sees
this rank's part alone; hooks exchange activations. Gradients of what every rank has whole are partial sums, which
FSDP2 adds up before it averages them: it has to be applied afterwards, over one rank where nothing is to be sharded.
Legend: B batch, T sequence, t a rank's part of it (T/N; less on the last ranks where T does not divide), D model width,
H heads, K head width, W = H*K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from open_lm.distributed.sharded_tensor import copy_local_shard
from open_lm.errors import ConfigError, join_problems
from open_lm.model.mixture_of_experts import MixtureOfExperts
from open_lm.model.norms import LayerNorm, LPLayerNorm, RmsNorm
from open_lm.model.positional_embedding.rotary import Angles, HeadRotary

# The dimension that a block's parameter is split along, None for none, by its name there. Others are whole on every
# rank if they have one dimension, and unknown if they have more.
SPLITS: tuple[tuple[str, int | None], ...] = (
    ("attention.in_proj.weight", 0),
    ("attention.[qk]_norm.*", 0),
    ("attention.out_proj.weight", 1),
    ("feed_forward.w12.weight", 0),
    ("feed_forward.w3.weight", 1),
    ("feed_forward.gate_proj.*", 0),
    ("feed_forward.up_proj.*", 0),
    ("feed_forward.down_proj.weight", 1),
    ("feed_forward.0.weight", 0),
    ("feed_forward.2.weight", 1),
    ("feed_forward.router.layer.weight", None),
    ("feed_forward.experts.mlp.w1", 2),
    ("feed_forward.experts.mlp.w2", 1),
)


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank of `mesh` (one dimension) its part of a Transformer, in place; see `check_tensor_parallel`."""
    root: Any = model
    sequences = _Sequences(mesh)
    tied = root.output.weight is root.tok_embeddings.weight
    parallelize_module(root.tok_embeddings, mesh, RowwiseParallel(input_layouts=Replicate()))
    parallelize_module(root.output, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        root.tok_embeddings.weight = root.output.weight
    # Embeddings may also come from the caller, whole: they are cut behind the point where both are one.
    root.post_embed_norm.register_forward_pre_hook(sequences.cut)
    root.norm.register_forward_hook(sequences.gather_for_all)
    for norm in (root.post_embed_norm, root.norm):
        _split_parameters(norm, mesh, {})
    for block in root.layers:
        _split_block(block, mesh, sequences)


def check_tensor_parallel(model: nn.Module, ranks: int) -> None:
    """ConfigError where a Transformer cannot be split over so many ranks."""
    root: Any = model
    widths = {"heads": root.params.n_heads}
    for block in root.layers:
        for name, parameter in block.named_parameters():
            dim = _split_dim(name, parameter)
            if name.startswith("feed_forward.") and dim:  # the rows of what leads back to the model's width
                widths["hidden features of the feed-forward"] = parameter.shape[dim]
    problems = []
    common = math.gcd(*widths.values())
    if common % ranks:
        fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        found = " and ".join(f"{width} {name}" for name, width in widths.items())
        problems.append(f"the model has {found}, which divide over {fitting} ranks")
    rows = root.vocab_size
    if (ranks - 1) * -(-rows // ranks) >= rows:
        problems.append(f"a vocabulary of {rows} leaves a rank without a row")
    norm = root.layers[0].attention.q_norm
    if not isinstance(norm, (nn.Identity, nn.LayerNorm, LayerNorm, RmsNorm)):
        problems.append(f"--qk-norm by {type(norm).__name__} needs all heads in one place; choose another --model-norm")
    if problems:
        raise ConfigError(join_problems([f"--tensor-parallel {ranks}: {problem}" for problem in problems]))


# ------------------------------------------------------------------------------------------ parameters
def _split_dim(name: str, parameter: Tensor) -> int | None:
    for pattern, dim in SPLITS:
        if fnmatch(name, pattern):
            return dim
    if parameter.dim() > 1:
        raise ConfigError(f"--tensor-parallel: it is not known how {name} is to be split; leave the flag out")
    return None


def _split_block(block: nn.Module, mesh: DeviceMesh, sequences: _Sequences) -> None:
    attention, feed_forward = block.get_submodule("attention"), block.get_submodule("feed_forward")
    for prefix, module in block.named_modules():
        dims = {name: _split_dim(f"{prefix}.{name}", p) for name, p in module.named_parameters(recurse=False)}
        _split_parameters(module, mesh, dims)
    for network in (attention, feed_forward):
        network.register_forward_pre_hook(sequences.gather)
        network.register_forward_hook(sequences.add)
    for name in ("q_norm", "k_norm"):
        norm: Any = attention.get_submodule(name)
        if not isinstance(norm, nn.Identity):
            norm.tensor_mesh = mesh
            _specialise(norm, forward=_normed_over_ranks)
    positions: Any = attention.pos_embed
    if isinstance(positions, HeadRotary):
        positions.tensor_mesh = mesh  # type: ignore[assignment]
        _specialise(positions, angles=_angles_of_own_heads)
    if isinstance(feed_forward, MixtureOfExperts):
        feed_forward.register_forward_hook(_share_balancing_loss(mesh.size()))


def _split_parameters(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int | None]) -> None:
    """Make a module's own parameters DTensors, split along dims.get(name) or whole, whose parts are what it sees.

    Of a bias beside a weight that is split along its columns the module sees zeros on all ranks but the first: its
    output is a partial sum.
    """
    parts = getattr(module, "parts", 1)
    views: dict[str, Any] = {}
    for name, parameter in list(module.named_parameters(recurse=False)):
        dim = dims.get(name)
        placement: Placement = Replicate() if dim is None else Shard(dim)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] //= mesh.size()
        local = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        split = DTensor.from_local(local, mesh, [placement], run_check=False)
        if not parameter.is_meta:
            copy_local_shard(split, parameter.detach(), parts)
        module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
        elsewhere = name == "bias" and dims.get("weight") == 1 and mesh.get_local_rank() > 0
        views[name] = _own_part(name, Partial() if dim is None else placement, elsewhere)
    if views:
        _specialise(module, **views)


@functools.cache
def _own_part(name: str, gradient: Placement, elsewhere: bool) -> property:
    """What a module sees of its parameter while that is gathered for its forward pass, the DTensor itself else."""

    def part(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
            return parameter
        local = parameter.to_local(grad_placements=[gradient])
        return local * 0.0 if elsewhere else local

    return property(part)


def _specialise(module: nn.Module, **attributes: Any) -> None:
    """Give a module a subclass of its class with these attributes; names of parameters and isinstance stay."""
    own: Any = type(module)
    module.__class__ = _subclass(own, tuple(attributes.items()))


@functools.cache  # equal blocks are compiled once, if their modules are of the same classes
def _subclass(own: type, attributes: tuple[tuple[str, Any], ...]) -> type:
    return type(own.__name__, (own,), dict(attributes))


# ------------------------------------------------------------------------------------------ activations
class _Sequences:
    """Hooks that change which part of the activations this rank has; each knows what its gradients are."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.length = 0  # T of the forward pass under way

    def cut(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B,T,D), the same on all ranks -> (B,t,D)."""
        self.length = args[0].shape[1]
        return self._exchanged(args[0], Replicate(), Shard(1)).to_local(), *args[1:]

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B,t,D) -> (B,T,D), of which each rank has a partial gradient; in the type of autocast, where that is on, as
        all that follows are matrix products."""
        x = args[0]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._exchanged(x, Shard(1), Replicate()).to_local(grad_placements=[Partial()]), *args[1:]

    def gather_for_all(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """(B,t,D) -> (B,T,D), of which all ranks have the same gradient."""
        # A copy, as FSDP2 warns of views among a model's results.
        return self._exchanged(x, Shard(1), Replicate()).to_local().clone()

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Partial sums (B,T,D), perhaps the first of several results -> (B,t,D) of the sums over ranks."""
        if isinstance(output, tuple):
            return self.add(module, args, output[0]), *output[1:]
        return self._exchanged(output, Partial(), Shard(1)).to_local()

    def _exchanged(self, x: Tensor, before: Placement, after: Placement) -> DTensor:
        shape = torch.Size((x.shape[0], self.length, *x.shape[2:]))
        stride = (self.length * x.shape[2], x.shape[2], 1)
        whole = DTensor.from_local(x, self.mesh, [before], run_check=False, shape=shape, stride=stride)
        return whole.redistribute(placements=[after])


def _normed_over_ranks(norm: Any, x: Tensor) -> Tensor:
    """The forward of a norm over W features that sees a rank's part of them: x (B,T,W/N) -> (B,T,W/N).

    Ranks exchange mean and mean square deviation of their parts, from which those of the whole follow.
    """
    wide = x.float()
    centred = not isinstance(norm, RmsNorm)
    mean = wide.mean(-1, keepdim=True) if centred else torch.zeros_like(wide[..., :1])
    own = torch.stack((mean, (wide - mean).square().mean(-1, keepdim=True)))
    parts = DTensor.from_local(own, norm.tensor_mesh, [Shard(3)], run_check=False).redistribute(
        placements=[Replicate()]
    )
    means, squares = parts.to_local(grad_placements=[Partial()]).unbind()  # (B,T,N) each
    mean = means.mean(-1, keepdim=True)
    variance = (squares + (means - mean).square()).mean(-1, keepdim=True)
    result = (wide - mean) * torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        result = result * norm.weight.float()
    bias = getattr(norm, "bias", None)
    if bias is not None:
        result = result + bias.float()
    # As the norms themselves: under autocast in float32, but for the one that stays in the type of autocast.
    stays = isinstance(norm, LPLayerNorm) or not torch.is_autocast_enabled(x.device.type)
    return result.to(x.dtype) if stays else result


def _angles_of_own_heads(embedding: Any, positions: Tensor, heads: int) -> Angles:
    """`HeadRotary.angles` of those of all heads that are this rank's."""
    whole, mesh = HeadRotary.angles(embedding, positions, heads), embedding.tensor_mesh
    return Angles(*(part.chunk(mesh.size())[mesh.get_local_rank()] for part in (whole.cos, whole.sin)))


def _share_balancing_loss(ranks: int) -> Callable[..., None]:
    """A hook: all ranks compute the same balancing loss, and their gradients are added, so each gives its share."""

    def share(module: Any, args: Any, output: Any) -> None:
        loss = module.balancing_loss
        if loss is not None:
            module.balancing_loss = loss.detach() + (loss - loss.detach()) / ranks

    return share
