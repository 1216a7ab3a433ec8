"""The tensors of a checkpoint of transformers for those of a native model, in both directions.

Legend: H heads, K head width, R rotated features of a head, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import CheckpointError, join_problems
from open_lm.hf.families import TensorSource, tensor_sources
from open_lm.hf.weight_files import TensorInfo
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer

_MAX_LISTED = 20
_VOCABULARY = re.compile(r"^(tok_embeddings|output)\.")
# Queries, keys and their norms: (pattern of the native name, how many of the tensors that it consists of are rotated).
_ROTATED = (
    (re.compile(r"attention\.in_proj\."), 2),
    (re.compile(r"attention\.(q_proj|kv_proj|q_norm|k_norm)\."), 1),
)
# Tensors that older checkpoints contain and that their models compute or never use.
_IGNORED = re.compile(r"(rotary_emb|pos_embed)\.inv_freq$|\.masked_bias$|self_attn\.bias$|experts\.bias$")


@dataclass(frozen=True)
class Part:
    """A range of rows of a native tensor that comes from one tensor of a checkpoint, or that is padding (None)."""

    source: str | None
    rows: int
    is_rotated: bool = False


class TensorMap:
    """The mapping for one architecture.

    Attributes:
        shapes: shape of each native tensor that is stored, by name.
        aliases: further names of tied native tensors, with the stored name.
    """

    def __init__(self, params: Params, config: Mapping[str, Any] | None) -> None:
        """Create the mapping to the tensors of a family, or with config None to those of model_type openlm.

        `config` has all fields, see `family_configs.full_config`. Raise ValueError if the family does not have a
        parameter of the model.
        """
        self.params = params
        with torch.device("meta"):
            model = Transformer(params)
        first: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if name.endswith("inv_freq"):
                continue
            stored = first.setdefault(id(value), name)
            if stored == name:
                self.shapes[name] = tuple(value.shape)
            else:
                self.aliases[name] = stored
        self._sources = (
            {name: TensorSource((f"model.{name}",)) for name in self.shapes}
            if config is None
            else tensor_sources(config, self.shapes)
        )
        self._is_family = config is not None

    # ------------------------------------------------------------------------------------------ shapes
    def parts(self, name: str) -> list[Part]:
        """Return the parts of a native tensor, in the order of its rows; experts are rows of a stacked tensor."""
        source, rows = self._sources[name], self._unpadded_rows(name)
        rotated = self._num_rotated(name)
        parts = [Part(part, rows // len(source.names), i < rotated) for i, part in enumerate(source.names)]
        padding = self.shapes[name][0] - rows if self.shapes[name] else 0
        return [*parts, Part(None, padding)] if padding else parts

    def infos(self, name: str, dtype: torch.dtype) -> list[TensorInfo]:
        """Return the tensors of a checkpoint that a native tensor consists of."""
        source, shape = self._sources[name], self.shapes[name]
        if source.is_stacked:
            return [TensorInfo(part, dtype, (shape[2], shape[1])) for part in source.names]
        rows = self._unpadded_rows(name) // len(source.names)
        return [TensorInfo(part, dtype, (rows, *shape[1:])) for part in source.names]

    def _unpadded_rows(self, name: str) -> int:
        shape, num_ids = self.shapes[name], self.params.unpadded_vocab_size
        return num_ids if num_ids is not None and _VOCABULARY.match(name) else shape[0]

    def _num_rotated(self, name: str) -> int:
        """Return how many of a tensor's parts have their rows in the order of llama_rotary, unlike in the family."""
        if not self._is_family or self.params.positional_embedding_type != "llama_rotary":
            return 0
        return next((count for pattern, count in _ROTATED if pattern.search(name)), 0)

    def problems(self, existing: Mapping[str, TensorInfo]) -> list[str]:
        """Return what does not fit in the tensors of a checkpoint: missing and surplus ones, shapes and dtypes."""
        expected = {info.name: info.shape for name in self.shapes for info in self.infos(name, torch.float32)}
        known = {*expected, *self._tied_names()}
        missing = [f"{name} {shape}" for name, shape in expected.items() if name not in existing]
        surplus = [
            f"{info.name} {info.shape}"
            for info in existing.values()
            if info.name not in known and not _IGNORED.search(info.name)
        ]
        different = [
            f"{name}: found {existing[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in existing and existing[name].shape != shape
        ]
        quantized = [
            f"{info.name} {str(info.dtype).removeprefix('torch.')}"
            for info in existing.values()
            if info.name in known and (not info.dtype.is_floating_point or info.dtype.itemsize < 2)
        ]
        titles = {
            "missing": missing,
            "not part of the model": surplus,
            "of another shape": different,
            "quantized, expected floating-point weights": quantized,
        }
        return [f"{len(names)} tensors are {title}: {_listed(names)}" for title, names in titles.items() if names]

    def _tied_names(self) -> list[str]:
        """Return names of tensors that a checkpoint may store a second time."""
        if not self._is_family:
            return [f"model.{name}" for name in self.aliases]
        return ["lm_head.weight"] if self.params.weight_tying else []

    # ------------------------------------------------------------------------------------------ values
    def to_native(self, name: str, part: Part, tensor: Tensor) -> Tensor:
        """Return the rows of a native tensor that a tensor of a checkpoint gives."""
        if self._sources[name].is_stacked:
            return tensor.t()[None]
        return self._interleave(tensor) if part.is_rotated else tensor

    def unpack(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of a checkpoint that a native tensor consists of; see `infos`."""
        rows = tensor[: self._unpadded_rows(name)] if tensor.dim() else tensor
        rotated = self._num_rotated(name)
        tensors = self._sources[name].unpack(rows)
        return [self._separate(part) if i < rotated else part for i, part in enumerate(tensors)]

    def _rotated_width(self) -> int:
        return int(self.params.head_dim * self.params.rope_fraction)

    def _interleave(self, tensor: Tensor) -> Tensor:
        """Reorder the rows (H K, …) of queries or keys: features i and i + R/2 of a head become 2i and 2i + 1."""
        heads, width = tensor.unflatten(0, (-1, self.params.head_dim)), self._rotated_width()
        pairs = heads[:, :width].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat((pairs, heads[:, width:]), dim=1).flatten(0, 1)

    def _separate(self, tensor: Tensor) -> Tensor:
        """Undo `_interleave`."""
        heads, width = tensor.unflatten(0, (-1, self.params.head_dim)), self._rotated_width()
        halves = heads[:, :width].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat((halves, heads[:, width:]), dim=1).flatten(0, 1)

    def check(self, existing: Mapping[str, TensorInfo], label: str) -> None:
        """Raise CheckpointError with all `problems`."""
        problems = self.problems(existing)
        if problems:
            raise CheckpointError(join_problems(problems, label))


def _listed(names: Sequence[str]) -> str:
    hidden = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", … and {hidden} more" if hidden > 0 else "")
