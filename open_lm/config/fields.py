"""Flags, as described by the fields of the settings sections. Imports no torch.

The name of a field is the name of its flag (`train_data` is `--train-data`), its annotation is the type, and its
metadata hold the help text and the choices.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from open_lm.config.registry import Registry

S = TypeVar("S", bound="Section")


def flag(
    default: Any, help: str, *, choices: Sequence[str] | Registry | None = None, entries: Registry | None = None
) -> Any:
    """Declare a field with its default and help text.

    Args:
        default: the value without the flag.
        help: the help text. The entries of a registry, with their own help texts, are appended.
        choices: the accepted values, or the registry that names them.
        entries: a registry that the help text lists, for values that combine several of its names.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "entries": entries})


def no_effect(default: Any, reason: str) -> Any:
    """Declare a field that existing scripts may set, with the reason why it has no effect."""
    return field(default=default, metadata={"help": f"no effect: {reason}", "no_effect": reason})


@dataclass(frozen=True)
class FieldSpec:
    """The flag of one field."""

    name: str
    kind: type  # str, int, float or bool
    many: bool  # takes one or more values
    optional: bool  # None is a legal value
    choices: tuple[str, ...] | None
    registry: Registry | None  # that the choices come from
    default: Any
    help: str
    no_effect: str | None  # the reason why it has no effect

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """A frozen group of settings."""

    title: ClassVar[str] = ""

    @classmethod
    def specs(cls) -> Iterator[FieldSpec]:
        """Yield the flags of the section, in the order of its fields."""
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            yield _field_spec(item, hints[item.name])

    @classmethod
    def from_object(cls: type[S], obj: object) -> S:
        """Return this section with the attributes of `obj`, such as an argparse Namespace, and defaults for others."""
        if isinstance(obj, cls):
            return obj
        return cls(**{item.name: getattr(obj, item.name) for item in fields(cls) if hasattr(obj, item.name)})


def _field_spec(item: Field[Any], annotation: Any) -> FieldSpec:
    optional = False
    if get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (arm for arm in get_args(annotation) if arm is not type(None))
        optional = True
    many = get_origin(annotation) is list
    if many:
        (annotation,) = get_args(annotation)
    choices, help_text = item.metadata.get("choices"), item.metadata["help"]
    registry = choices if isinstance(choices, Registry) else item.metadata.get("entries")
    if registry is not None and registry.summary():
        help_text += f": {registry.summary()}"
    return FieldSpec(
        name=item.name,
        kind=annotation,
        many=many,
        optional=optional,
        choices=None if choices is None else tuple(choices),
        registry=choices if isinstance(choices, Registry) else None,
        default=None if item.default is MISSING else item.default,
        help=help_text,
        no_effect=item.metadata.get("no_effect"),
    )
