"""The settings of low-rank adapters (LoRA): the flags --lora and --qlora, and the text that --lora takes.

    r=16,alpha=32,dropout=0,targets=attention,dora=false,rslora=false

Imports no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from open_lm.config.fields import Section, flag
from open_lm.errors import ConfigError, join_problems

TARGETS = ("attention", "all-linear")
QUANTIZATIONS = ("nf4",)


@dataclass(frozen=True)
class AdapterConfig(Section):
    title: ClassVar[str] = "adapters"

    lora: str | None = flag(
        None,
        "train low-rank adapters (LoRA) and no other weights: comma-separated r=RANK, alpha=A (default: 2 r), "
        f"dropout=P, targets={'|'.join(TARGETS)}, dora=true, rslora=true, such as r=16,alpha=32,targets=all-linear; "
        "requires --pretrained or --hf-model",
    )
    qlora: str | None = flag(
        None,
        "with --lora, store the matrices of the blocks in 4 bits (nf4, through bitsandbytes); for one process or "
        "data-parallel ranks without --fsdp",
        choices=QUANTIZATIONS,
    )


@dataclass(frozen=True)
class LoraSettings:
    """The settings of all adapters of a model.

    An adapter of a linear layer W (out, in) adds `scale` B A x to its output, with A (r, in) and B (out, r) (Hu et al.
    2021, https://arxiv.org/abs/2106.09685).

    Attributes:
        r: rank.
        alpha: numerator of the scale.
        dropout: share of the inputs of A that training drops.
        targets: the layers with adapters: those of attention, or all linear layers of the blocks.
        dora: train magnitude and direction of the rows separately (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        rslora: divide alpha by sqrt(r) instead of r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "attention"
    dora: bool = False
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def text(self) -> str:
        """Return the text that `parse_lora` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{key}={str(value).lower().removesuffix('.0')}" for key, value in values.items())


def _integer(text: str) -> int:
    return int(text)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _target(text: str) -> str:
    return TARGETS[TARGETS.index(text)]


# Key: (function that reads a value, condition on the value, description of valid values).
_KEYS: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "r": (_integer, lambda value: value >= 1, "an integer of 1 or more"),
    "alpha": (float, lambda value: 0 < value < math.inf, "a number above 0"),
    "dropout": (float, lambda value: 0 <= value < 1, "a share of at least 0 and less than 1"),
    "targets": (_target, lambda value: True, " or ".join(TARGETS)),
    "dora": (_boolean, lambda value: True, "true or false"),
    "rslora": (_boolean, lambda value: True, "true or false"),
}


def parse_lora(text: str) -> LoraSettings:
    """Parse the value of --lora. Raise ConfigError with all problems and the valid keys."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        key, separator, value = (word.strip() for word in item.partition("="))
        if key not in _KEYS:
            similar = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            problems.append(f"found the key {key!r}{hint}")
            continue
        read, is_valid, expected = _KEYS[key]
        try:
            parsed = read(value) if separator else None
        except (ValueError, KeyError):
            parsed = None
        if key in values:
            problems.append(f"{key} is given more than once")
        elif parsed is None or not is_valid(parsed):
            problems.append(f"{key}: found {value!r}, expected {expected}")
        values[key] = parsed
    if problems:
        valid = ", ".join(f"{key} ({expected})" for key, (_, _, expected) in _KEYS.items())
        raise ConfigError(join_problems([*problems, f"valid keys: {valid}"], f"--lora {text!r}"))
    values.setdefault("alpha", 2.0 * values.get("r", LoraSettings.r))
    return LoraSettings(**values)
