"""Sizes that bound the memory of a training step. The trainer uses them, and the planner predicts memory from them."""

from __future__ import annotations

LOSS_CHUNK_TOKENS = 2048  # tokens whose logits the loss computes at once; fewer on a CPU (kernels/linear_loss.py)
MUON_BATCH_ELEMENTS = 1 << 26  # matrix elements that Muon orthogonalizes in one batch (optim/muon.py)
