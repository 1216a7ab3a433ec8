"""Parameter names without what data parallelism, compilation and recomputation put into them."""

from __future__ import annotations

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """`layers.0.norm.weight` from `module._orig_mod.layers.0._checkpoint_wrapped_module.norm.weight`."""
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix).replace("." + prefix, ".")
    return name
