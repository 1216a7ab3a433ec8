"""Coordinate check: measure the size of activations in the first steps for models of several widths.

See appendix D of Yang et al. 2022, https://arxiv.org/abs/2203.03466.

With a correct maximal-update parametrization, the entries of all activations keep their size when the model becomes
wider, at the start and after each update. In the standard parametrization they grow from the first update on, so that
wider models need lower learning rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import Config
from open_lm.data.device import on_device
from open_lm.data.loader import build_train_loader
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.kernels.general_attention import repeat_heads
from open_lm.model.transformer import Attention, Block, Transformer, create_model
from open_lm.optim.build import build_optimizer
from open_lm.optim.schedules import const_lr
from open_lm.training.step import StepOptions, train_step

EMBEDDING, ATTENTION, SCORES, FEED_FORWARD = "embedding", "attention output", "attention logits", "feed-forward output"
RESIDUAL, LOGITS = "residual", "output logits"
KINDS = (EMBEDDING, ATTENTION, SCORES, FEED_FORWARD, RESIDUAL, LOGITS)
# Kinds that may shrink with the width: they are sums of products, which are correlated only after updates.
MAY_SHRINK = (SCORES, LOGITS)
TOLERANCE = 0.25  # largest slope that passes: a factor of 2 for a model 16 times as wide


@dataclass(frozen=True)
class Check:
    """The sizes of activations with one parametrization.

    Attributes:
        name: of the parametrization.
        widths: n widths, ascending.
        sizes: by kind, the root mean square of the entries, (n, steps + 1): before each update and after the last one.
    """

    name: str
    widths: tuple[int, ...]
    sizes: Mapping[str, np.ndarray]

    def slopes(self, kind: str) -> np.ndarray:
        """Return the slope of log size over log width before each update and after the last one (steps + 1,)."""
        slopes: np.ndarray = np.polyfit(np.log(self.widths), np.log(self.sizes[kind]), 1)[0]
        return slopes

    def failures(self) -> list[str]:
        """Describe each kind whose size grows with the width after any number of updates, or shrinks after the last.

        The kinds of MAY_SHRINK may shrink.
        """
        found = []
        for kind in KINDS:
            slopes = self.slopes(kind)
            worst = int(np.argmax(slopes))
            if not slopes.max() <= TOLERANCE:
                found.append(f"{kind} ~ width^{slopes[worst]:.2f} after {worst} updates")
            elif kind not in MAY_SHRINK and slopes[-1] < -TOLERANCE:
                found.append(f"{kind} ~ width^{slopes[-1]:.2f} after {len(slopes) - 1} updates")
        return found


def check(name: str, models: Mapping[int, Config], steps: int, seeds: Sequence[int]) -> Check:
    """Train each model for some steps on the same data and return the sizes of its activations.

    Args:
        name: of the parametrization.
        models: settings by width; data, optimizer and learning rate are constant over the steps.
        steps: number of updates.
        seeds: seeds of the initialization; sizes are the root mean square over them.
    """
    sizes: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for width in sorted(models):
        runs = [_measure(models[width], steps, seed) for seed in seeds]
        for kind in KINDS:
            sizes[kind].append(np.sqrt(np.mean([run[kind] for run in runs], axis=0)))
    return Check(name, tuple(sorted(models)), {kind: np.stack(values) for kind, values in sizes.items()})


def _measure(config: Config, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Return the mean square (steps + 1,) of the activations of each kind in a training run."""
    model = create_model(config.model)
    model.reset_parameters(seed)
    params: Any = model.params
    loader = build_train_loader(
        config.data,
        seq_len=params.seq_len,
        vocab_size=params.vocab_size,
        batch_size=config.data.global_batch_size,
        seed=config.run.seed,
    )
    optimizer = build_optimizer(model, config.optim)
    schedule = const_lr(optimizer, config.optim.lr, warmup_length=0)
    options = StepOptions(
        Runtime(),
        MeshLayout(),
        get_autocast(config.precision.precision, "cpu"),
        z_loss_coefficient=config.optim.z_loss_coefficient,
        grad_clip_norm=config.optim.grad_clip_norm,
    )
    records = _Records(model)
    model.train()
    batches = itertools.islice(on_device(loader.batches(steps + 1), torch.device("cpu")), steps + 1)
    for step, (batch, _) in enumerate(batches):
        schedule(step)
        records.start_step()
        train_step(model, batch.inputs, batch.targets, optimizer, options)
    return {kind: np.array([math.fsum(values) / len(values) for values in records.of(kind)]) for kind in KINDS}


class _Records:
    """The mean squares of a model's activations, by hooks on its modules."""

    def __init__(self, model: Transformer) -> None:
        self._steps: list[dict[str, list[float]]] = []
        self._watch(model.tok_embeddings, lambda _, output: {EMBEDDING: output})
        self._watch(model.output, lambda inputs, _: {LOGITS: type(model.output).forward(model.output, *inputs)})
        for block in model.modules():
            if isinstance(block, Block):
                self._watch(block, lambda _, output: {RESIDUAL: output[0]})
                self._watch(block.attention, lambda _, output: {ATTENTION: output[0]})
                self._watch(block.feed_forward, lambda _, output: {FEED_FORWARD: output})
                self._watch(block.attention.pos_embed, _scores(block.attention))

    def start_step(self) -> None:
        self._steps.append({})

    def of(self, kind: str) -> list[list[float]]:
        """Return the mean squares of a kind: for each step those of all layers."""
        return [step[kind] for step in self._steps]

    def _watch(self, module: nn.Module, select: Callable[[Any, Any], dict[str, Tensor]]) -> None:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            with torch.no_grad():
                for kind, values in select(inputs, output).items():
                    square = values.detach().float().square().mean().item()
                    self._steps[-1].setdefault(kind, []).append(square)

        module.register_forward_hook(record)


def _scores(attention: Attention) -> Callable[[Any, Any], dict[str, Tensor]]:
    """Return a function of the queries and keys of a layer that returns the attention logits of the first sequence."""
    scale = attention.options.scale or attention.head_dim**-0.5

    def select(_: Any, output: Any) -> dict[str, Tensor]:
        queries, keys = output[0][:1], repeat_heads(output[1][:1], output[0].shape[2])
        scores = torch.einsum("bqhk,bthk->bhqt", queries.float(), keys.float()) * scale
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return {SCORES: scores[..., causal]}

    return select
