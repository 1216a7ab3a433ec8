"""Parameter names without the prefixes that DDP, FSDP1, torch.compile and activation checkpointing add."""

from __future__ import annotations

WRAPPER_NAMES = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean_name(name: str) -> str:
    """Strip wrapper names: `module._orig_mod.layers.0._checkpoint_wrapped_module.norm.weight` ->
    `layers.0.norm.weight`."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPER_NAMES), last])


def is_adapter_name(name: str) -> bool:
    """Return whether a parameter belongs to a low-rank adapter (see model/adapters.py)."""
    return ".adapter.lora_" in name
