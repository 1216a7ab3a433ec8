"""Seed, save and restore this process's random generators, and enable deterministic algorithms."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed this rank's random generators (Python, numpy, torch)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Make torch use only deterministic algorithms (--deterministic). Call before any work on the device.

    Results are then bitwise equal in every run on the same devices. An operation without a deterministic
    implementation raises a RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS workspaces depend on other streams
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # benchmarking may choose another kernel in every run
    # Uninitialized memory is never read, so filling it only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def rng_state() -> dict[str, Any]:
    """Return the state of this rank's generators (Python, numpy, torch, all CUDA devices), as values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore this rank's generators to a state returned by `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu().clone())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu().clone() for device_state in state["cuda"]])


def rng_state_to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a state from `rng_state` to tensors.

    Words are int64, a cached normal sample is float64 (empty if there is none), states of torch's generators are uint8.
    """
    version, words, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]  # numpy's global generator is always MT19937
    tensors = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([position, *keys]),
        "numpy_gauss": torch.tensor([cached] if has_gauss else [], dtype=torch.float64),
        "torch": state["torch"],
    }
    return {**tensors, **{f"cuda_{number}": device_state for number, device_state in enumerate(state["cuda"])}}


def rng_state_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert tensors from `rng_state_to_tensors` back to the state that `rng_state` returned."""
    version, *words = tensors["python"].tolist()
    position, *keys = tensors["numpy"].tolist()
    python_gauss, numpy_gauss = tensors["python_gauss"].tolist(), tensors["numpy_gauss"].tolist()
    cuda = sorted((name for name in tensors if name.startswith("cuda_")), key=lambda name: int(name[len("cuda_") :]))
    return {
        "python": [version, words, python_gauss[0] if python_gauss else None],
        "numpy": ["MT19937", keys, position, int(bool(numpy_gauss)), numpy_gauss[0] if numpy_gauss else 0.0],
        "torch": tensors["torch"],
        "cuda": [tensors[name] for name in cuda],
    }
