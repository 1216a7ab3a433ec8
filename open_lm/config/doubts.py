"""Find settings that are valid but probably not meant. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.config.sections import Config, ModelConfig
from open_lm.system.names import is_pattern, split_joined


def doubtful_settings(config: Config, architecture: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each doubtful setting. `architecture` holds the contents of the model's JSON file."""
    data, validation = config.data, config.validation
    doubts = []
    if data.train_data_mix_weights is None:  # else each shard is meant to be a source
        doubts.append(_doubtful_sources("--train-data", data.train_data or [], "source"))
        doubts.append(_doubtful_sources("--train-text", data.train_text or [], "source", suffix=""))
    doubts.append(_doubtful_sources("--val-data", validation.val_data or [], "validation set"))
    doubts.append(_doubtful_heads(config.model.model, architecture))
    doubts.append(_doubtful_base_heads(config.model, architecture))
    if config.precision.fp8 and not config.model.torchcompile:
        doubts.append(
            "--fp8 without --torchcompile: scaling and rounding then run as separate operators and take longer than "
            "8-bit products save; add --torchcompile"
        )
    return [doubt for doubt in doubts if doubt]


def _doubtful_sources(flag: str, values: Sequence[str], kind: str, suffix: str = ".tar") -> str:
    """Describe values that are single files of one data set, as a shell makes them from an unquoted glob."""
    groups: dict[str, list[str]] = {}
    for value in values:
        if value.endswith(suffix) and len(split_joined(value)) == 1 and not is_pattern(value):
            folder, slash, name = value.rpartition("/")
            groups.setdefault(folder + slash + re.sub(r"\d+", "*", name), []).append(value)
    pattern, shards = max(groups.items(), key=lambda item: len(item[1]), default=("", []))
    if len(shards) < 2:
        return ""
    names = ", ".join(shard.rpartition("/")[2] for shard in shards[:3]) + (", …" if len(shards) > 3 else "")
    found = "shards" if suffix else "files"
    return (
        f"{flag}: {len(shards)} of {len(values)} values are {found} that differ only in their number ({names}), and "
        f"each is a separate {kind}; to read them as one {kind}, quote a pattern such as {flag} '{pattern}'"
    )


def _doubtful_heads(model: str, architecture: Mapping[str, Any]) -> str:
    width, heads = architecture.get("hidden_dim", 0), architecture.get("n_heads", 1)
    if width % heads == 0 or architecture.get("head_dim") is not None:
        return ""
    head_width = width // heads
    return (
        f"--model {model}: hidden_dim {width} is not divisible by n_heads {heads}: a head is {head_width} wide, so "
        f"attention is {heads * head_width} wide, not {width}"
    )


def _doubtful_base_heads(model: ModelConfig, architecture: Mapping[str, Any]) -> str:
    """Describe the head width that --mup assumes for the base model, if it is another one than this model's."""
    width, heads = architecture.get("hidden_dim", 0), architecture.get("n_heads", 1)
    is_on, base_width = (architecture.get(name, getattr(model, name)) for name in ("mup", "mup_base_width"))
    is_set = architecture.get("mup_base_head_dim", model.mup_base_head_dim) or architecture.get("head_dim")
    if not (is_on and base_width) or is_set or base_width // heads == width // heads:
        return ""
    return (
        f"--mup without --mup-base-head-dim: taking the base model of width {base_width} to have {heads} heads of "
        f"{base_width // heads}, as many as this model; if its heads have the width {width // heads} of this model's, "
        f"set --mup-base-head-dim {width // heads}"
    )
