"""Predict the memory and the work of Muon's update. Mirrors muon.py and matrix_assignment.py of open_lm.optim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from open_lm.config.memory_limits import MUON_BATCH_ELEMENTS
from open_lm.config.registry import OPTIMIZERS
from open_lm.planner.shapes import Weight

if TYPE_CHECKING:
    from open_lm.planner.setup import TrainingSetup


def muon_weights(setup: TrainingSetup) -> list[Weight]:
    """Return the weights that Muon updates: the matrices of the blocks. Empty for other optimizers."""
    return block_matrices(setup) if OPTIMIZERS.fact(setup.config.optim.optimizer, "orthogonal") else []


def block_matrices(setup: TrainingSetup) -> list[Weight]:
    """Return the trained matrices of the blocks."""
    return [w for w in setup.trained(setup.shape.weights) if w.block is not None and len(w.shape) > 1]


def muon_flops(setup: TrainingSetup) -> float:
    """Return the FLOPs of a rank's share of the orthogonalization in a step: 20 m^2 n + 10 m^3 for m x n, m <= n.

    They do not depend on the number of tokens. The ranks share the matrices.
    """
    total = 0.0
    for weight in muon_weights(setup):
        count, *sides = weight.matrices
        m, n = sorted(sides)
        total += count * (20.0 * m * m * n + 10.0 * m**3)
    return total / setup.ranks


def muon_update_bytes(setup: TrainingSetup) -> int:
    """Return what Muon's update allocates on a rank.

    These are the update directions of all matrices in bfloat16, and the larger of two working sets: the matrices that
    the rank orthogonalizes in one batch, or the buffers that ranks send and receive. Mirrors muon.py and
    matrix_assignment.py.
    """
    weights = muon_weights(setup)
    if not weights:
        return 0
    local = setup.local_numel(weights)
    share = local // setup.layout.replicate if setup.is_sharded else 0
    exchanged = 2 * local if setup.ranks > 1 else 0
    counts: dict[tuple[int, ...], int] = {}
    for weight in weights:
        count, *sides = weight.matrices
        counts[tuple(sorted(sides))] = counts.get(tuple(sorted(sides)), 0) + count
    working = 0
    for (m, n), count in counts.items():
        batch = min(-(-count // setup.ranks), max(1, MUON_BATCH_ELEMENTS // (m * n)))
        working = max(working, batch * (3 * m * n + 2 * m * m))
    directions = 0 if setup.config.parallel.fsdp_cpu_offload else setup.local_numel(weights)
    return 2 * (directions + share + max(working, exchanged))
