"""Parameter names without the prefixes that DDP, torch.compile and activation checkpointing add."""

from __future__ import annotations

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """Strip wrapper prefixes: `module._orig_mod.layers.0._checkpoint_wrapped_module.norm.weight` ->
    `layers.0.norm.weight`."""
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix).replace("." + prefix, ".")
    return name
