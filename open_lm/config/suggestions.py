"""Suggest flags for an unknown name: by spelling, by its name in other programs, or by the words of the help texts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from open_lm.config.fields import FieldSpec

_SIMILAR, _VAGUELY_SIMILAR = 0.8, 0.6  # ratios of difflib
# Names in other training programs whose words do not occur in the help texts.
_OTHER_NAMES = {
    "bf16": ("precision",),
    "checkpoint": ("resume", "pretrained"),
    "data": ("train_data",),
    "dataset": ("train_data", "dataset_manifest"),
    "dtype": ("precision",),
    "ema": ("averagers",),
    "fp16": ("precision",),
    "max_grad_norm": ("grad_clip_norm",),
    "max_steps": ("train_num_samples", "epochs"),
    "output_dir": ("logs",),
    "steps": ("train_num_samples", "epochs"),
    "wandb": ("report_to",),
}
_FILLER_WORDS = frozenset({"max", "n", "num", "number"})


def suggest(name: str, specs: Iterable[FieldSpec]) -> list[str]:
    """Return the names of up to three fields that an unknown flag or key may mean, without dashes at the start."""
    key = name.lstrip("-").replace("-", "_").lower()
    by_name = {spec.name: spec for spec in specs}
    if key in _OTHER_NAMES:
        return [name for name in _OTHER_NAMES[key] if name in by_name]
    return (
        difflib.get_close_matches(key, by_name, n=3, cutoff=_SIMILAR)
        or _with_the_words_of(key, by_name.values())
        or difflib.get_close_matches(key, by_name, n=3, cutoff=_VAGUELY_SIMILAR)
    )


def _with_the_words_of(key: str, specs: Iterable[FieldSpec]) -> list[str]:
    """Return the fields whose name and help text contain all words of `key` and say little else first.

    Empty for a single word, which too many help texts contain.
    """
    wanted = set(_words(key)) - _FILLER_WORDS
    if len(wanted) < 2:
        return []
    other_words: dict[str, int] = {}
    for spec in specs:
        if wanted <= {*_words(spec.name), *_words(spec.help)}:
            first_clause = re.split("[,;:(]", spec.help)[0]
            other_words[spec.name] = len(set(_words(first_clause)) - wanted)
    return [name for name, count in other_words.items() if count == min(other_words.values())][:3]


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case and in the singular."""
    return [word.removesuffix("s") for word in re.findall(r"[a-z0-9]+", text.lower())]
