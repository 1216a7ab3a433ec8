"""Read and write mof.yml, the description of a release in the schema of the Model Openness Tool."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from open_lm import storage
from open_lm.errors import DataError, join_problems
from open_lm.release.components import COMPONENTS, KINDS

FRAMEWORK = {"name": "Model Openness Framework", "version": "1.0", "date": "2024-12-15"}
DISTRIBUTION = "distribution"
LICENSE_SCOPES = (DISTRIBUTION, *KINDS)
MAX_BYTES = 256 * 1024  # a complete file has about 8 KB
_CHOICES = {
    "type": ("", "language", "vision", "image", "audio", "video", "3d", "code", "multimodal", "other"),
    "architecture": (
        *("", "transformer", "transformer decoder", "transformer encoder-decoder", "decoder", "encoder", "diffusion"),
        *("RNN", "CNN", "LSTM", "NeRF", "hybrid", "undisclosed", "other"),
    ),
    "treatment": ("pre-trained", "instruct fine-tuned", "chat fine-tuned"),
}
_REQUIRED = ("name", "license", "producer", "components")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class GlobalLicense:
    """The license of all components of a kind, or of the distribution: SPDX id and path of its text."""

    name: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Entry:
    """A component that a release claims to include.

    Attributes:
        name: a name of `components.COMPONENTS`.
        description: what it holds.
        license: SPDX id, or "unlicensed"; None: that of its kind, else of the distribution.
        license_path, component_path: paths or URLs of the license's text and of the component. In a bundle they are
            relative to its folder.
    """

    name: str
    description: str | None = None
    license: str | None = None
    license_path: str | None = None
    component_path: str | None = None


@dataclass(frozen=True)
class Release:
    """The content of mof.yml. `licenses` has the keys of LICENSE_SCOPES; texts that are None are left out."""

    name: str
    producer: str
    entries: Sequence[Entry]
    licenses: Mapping[str, GlobalLicense] = field(default_factory=dict)
    version: str | None = None
    date: str | None = None
    type: str | None = None
    architecture: str | None = None
    treatment: str | None = None
    origin: str | None = None
    contact: str | None = None
    repository: str | None = None
    huggingface: str | None = None


_TEXTS = tuple(item.name for item in fields(Release) if item.name not in ("name", "producer", "entries", "licenses"))
_ENTRY_TEXTS = tuple(item.name for item in fields(Entry))


class _Loader(yaml.SafeLoader):
    """A safe loader without dates, which the schema has as text, that rejects repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found the key {key_node.value!r} twice", key_node.start_mark
                    )
                keys.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    character: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_mof(path: str | os.PathLike[str]) -> Release:
    """Read mof.yml.

    Raises:
        DataError: the file is missing, longer than MAX_BYTES, not YAML, or does not have the schema; with all problems.
    """
    content = _load(Path(path))
    checker = _Checker()
    release = checker.release(content)
    if checker.problems:
        raise DataError(f"{path}: {join_problems(checker.problems, 'not a release in the schema of mof.yml')}")
    return release


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a release file such as mof.yml"
        ) from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: found more than {MAX_BYTES:,} bytes; expected a release file such as mof.yml")
    try:
        return yaml.load(raw.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found a byte that is not UTF-8 at position {error.start}; expected YAML") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise DataError(f"{path}: found too many nested levels; expected a release file such as mof.yml") from None


class _Checker:
    """Convert parsed YAML to a Release and collect the problems. Of a release with problems nothing is used."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def release(self, content: Any) -> Release:
        document = self._mapping(content, "the file")
        self._framework(document.get("framework"))
        where = "release"
        release = self._mapping(document.get(where), where)
        self.problems += [f"{where}.{key} is missing" for key in _REQUIRED if key not in release and release]
        texts = {key: self._text(release, key, where) for key in _TEXTS}
        for key, choices in _CHOICES.items():
            value = texts[key]
            if value is not None and value not in choices:
                expected = ", ".join(repr(choice) for choice in choices)
                self.problems.append(f"{where}.{key}: found {value!r}, expected one of {expected}")
        self._date(texts["date"], f"{where}.date")
        name, producer = (self._text(release, key, where) for key in ("name", "producer"))
        if name == "":
            self.problems.append(f"{where}.name: found an empty text, expected the name of the release")
        return Release(
            name or "", producer or "", self._entries(release.get("components", [])),
            self._licenses(release.get("license", {})), **texts,
        )  # fmt: skip

    def _framework(self, value: Any) -> None:
        framework = self._mapping(value, "framework")
        for key in FRAMEWORK:
            if framework and key not in framework:
                self.problems.append(f"framework.{key} is missing")
        name = self._text(framework, "name", "framework")
        self._text(framework, "version", "framework")
        self._date(self._text(framework, "date", "framework"), "framework.date")
        if name is not None and name != FRAMEWORK["name"]:
            self.problems.append(f"framework.name: found {name!r}, expected {FRAMEWORK['name']!r}")

    def _licenses(self, value: Any) -> dict[str, GlobalLicense]:
        if value is None or value == []:  # an empty mapping in the notation of PHP
            return {}
        licenses = {}
        where = "release.license"
        for scope, content in self._mapping(value, where).items():
            if scope not in LICENSE_SCOPES:
                self.problems.append(f"{where}: found the key {scope!r}, expected {', '.join(LICENSE_SCOPES)}")
            elif content is not None:
                license_of = self._mapping(content, f"{where}.{scope}")
                texts = {key: self._text(license_of, key, f"{where}.{scope}", null=True) for key in ("name", "path")}
                licenses[scope] = GlobalLicense(**texts)
        return licenses

    def _entries(self, value: Any) -> list[Entry]:
        where = "release.components"
        if not isinstance(value, list):
            self.problems.append(f"{where}: found {_kind(value)}, expected a list")
            return []
        entries: list[Entry] = []
        for number, content in enumerate(value, start=1):
            place = f"{where}, entry {number}"
            item = self._mapping(content, place)
            texts = {key: self._text(item, key, place) for key in _ENTRY_TEXTS}
            name = texts.pop("name")
            if name is None:
                self.problems += [f"{place}: name is missing"] if item else []
            elif name not in COMPONENTS:
                self.problems.append(f"{place}: found the component {name!r}, expected one of {', '.join(COMPONENTS)}")
            elif any(entry.name == name for entry in entries):
                self.problems.append(f"{place}: found the component {name!r} a second time")
            else:
                entries.append(Entry(name, **texts))
        return entries

    def _mapping(self, value: Any, where: str) -> dict[Any, Any]:
        if isinstance(value, dict) and value:
            return value
        if not (isinstance(value, dict) and where.startswith("release.license")):
            self.problems.append(f"{where}: found {_kind(value)}, expected a mapping")
        return {}

    def _text(self, mapping: Mapping[Any, Any], key: str, where: str, null: bool = False) -> str | None:
        value = mapping.get(key)
        if isinstance(value, str) or (value is None and (null or key not in mapping)):
            return value
        hint = "; put it in quotes" if isinstance(value, int | float) else ""
        self.problems.append(f"{where}.{key}: found {_kind(value)}, expected text{hint}")
        return None

    def _date(self, value: str | None, where: str) -> None:
        if value is None:
            return
        try:
            if not _DATE.fullmatch(value):
                raise ValueError
            date.fromisoformat(value)
        except ValueError:
            self.problems.append(f"{where}: found {value!r}, expected a date as YYYY-MM-DD")


def _kind(value: Any) -> str:
    """Return a short description of a value of YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list) and not value:
        return f"an empty {'mapping' if isinstance(value, dict) else 'list'}"
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    return names.get(type(value)) or repr(value)


def mof_content(release: Release) -> dict[str, Any]:
    """Return a release as the content of mof.yml. The order of keys is that of the schema's sample."""
    licenses = {scope: release.licenses.get(scope, GlobalLicense()) for scope in LICENSE_SCOPES}
    texts = {key: getattr(release, key) for key in _TEXTS}
    return {
        "framework": dict(FRAMEWORK),
        "release": {
            "name": release.name,
            "producer": release.producer,
            **{key: value for key, value in texts.items() if value is not None},
            "license": {scope: {"name": item.name, "path": item.path} for scope, item in licenses.items()},
            "components": [
                {key: getattr(entry, key) for key in _ENTRY_TEXTS if getattr(entry, key) is not None}
                for entry in release.entries
            ],
        },
    }


def write_mof(path: str | os.PathLike[str], release: Release) -> None:
    """Write mof.yml atomically. Raise DataError if the release does not have the schema."""
    content = mof_content(release)
    checker = _Checker()
    checker.release(content)
    if checker.problems:
        raise DataError(f"{path}: {join_problems(checker.problems, 'the release does not have the schema of mof.yml')}")
    storage.write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110))
