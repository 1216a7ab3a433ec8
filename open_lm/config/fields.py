"""Flags, as described by the fields of the settings sections. Imports no torch.

The name of a field is the name of its flag (`train_data` is `--train-data`), its annotation is the type, and its
metadata hold the help text and the choices.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from open_lm.config.registry import Registry

S = TypeVar("S", bound="Section")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Registry | None = None,
    entries: Registry | None = None,
    path: Callable[[str], str] | None = None,
    advice: str = "",
) -> Any:
    """Declare a field with its default and help text.

    Args:
        default: the value without the flag.
        help: the help text. The entries of a registry, with their own help texts, are appended.
        choices: the accepted values, or the registry that names them.
        entries: a registry that the help text lists, for values that combine several of its names.
        path: for a flag that takes paths, its type in open_lm/system/names.py, such as `user_path`.
        advice: what to do instead, for the error of a value that is not among the choices.
    """
    metadata = {"help": help, "choices": choices, "entries": entries, "path": path, "advice": advice}
    return field(default=default, metadata=metadata)


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
    default: Any
    metadata: Mapping[str, Any]  # the arguments of `flag` or `no_effect`

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def no_effect(self) -> str | None:
        """The reason why the flag has no effect."""
        return self.metadata.get("no_effect")

    @property
    def path(self) -> Callable[[str], str] | None:
        """The function of open_lm/system/names.py that reads a value of a flag that takes paths."""
        return self.metadata.get("path")

    @property
    def advice(self) -> str:
        """What to do instead of setting a value that is not among the choices."""
        return self.metadata.get("advice", "")

    @property
    def registry(self) -> Registry | None:
        """The registry that the choices come from."""
        choices = self.metadata.get("choices")
        return choices if isinstance(choices, Registry) else None

    @property
    def choices(self) -> tuple[str, ...] | None:
        choices = self.metadata.get("choices")
        return None if choices is None else tuple(choices)

    @property
    def help(self) -> str:
        text: str = self.metadata["help"]
        registry = self.metadata.get("entries") if self.registry is None else self.registry
        summary = "" if registry is None else registry.summary()
        return f"{text}: {summary}" if summary else text


@dataclass(frozen=True)
class Section:
    """A frozen group of settings."""

    title: ClassVar[str] = ""

    @classmethod
    @functools.cache
    def specs(cls) -> tuple[FieldSpec, ...]:
        """Return the flags of the section, in the order of its fields."""
        hints = typing.get_type_hints(cls)
        return tuple(_field_spec(item, hints[item.name]) for item in fields(cls))

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
    default = None if item.default is MISSING else item.default
    return FieldSpec(item.name, annotation, many, optional, default, item.metadata)
