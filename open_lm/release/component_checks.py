"""Check that the components which mof.yml claims really are in a bundle, with the texts of their licenses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import dirname, normpath
from typing import Any

from open_lm.release import components as mof
from open_lm.release import layout
from open_lm.release.components import COMPONENTS
from open_lm.release.documents import DOCUMENT_SUFFIXES, MIN_PAPER_WORDS, document_problem
from open_lm.release.file_texts import Unreadable, tar_members
from open_lm.release.licenses import is_text_of
from open_lm.release.manifest import FileRecord, is_inside
from open_lm.release.mof_file import Entry, GlobalLicense, Release
from open_lm.release.rating import resolve_license
from open_lm.release.weights_check import weights_problem
from open_lm.storage import split_lines

_MIN_WORDS = 30  # of other documents
_NOT_CONTENT = re.compile(r"(?:LICEN[CS]E|COPYING|NOTICE)(?:\..*)?|\.git(?:keep|ignore)|\.keep|Thumbs\.db|\.DS_Store")
_CODE_SUFFIXES = (".py", ".sh", ".cpp", ".cu", ".json", ".yaml", ".ipynb")
_MAX_TEXT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its files by path, read from disk."""

    folder: Path
    files: Mapping[str, FileRecord]
    _archives: dict[str, tuple[dict[str, int], dict[str, str]]] = field(default_factory=dict, repr=False)

    def tar_members(self, path: str) -> tuple[dict[str, int], dict[str, str]]:
        """Return `file_texts.tar_members` of an archive, which is read once."""
        if path not in self._archives:
            self._archives[path] = tar_members(self.folder / path)
        return self._archives[path]

    def below(self, path: str) -> list[str]:
        """Return the files of a path: itself, or those in the folder."""
        prefix = path.rstrip("/") + "/"
        return [name for name in self.files if name == path or name.startswith(prefix)]

    def read(self, path: str) -> bytes:
        """Return the first _MAX_TEXT_BYTES of a file."""
        with (self.folder / path).open("rb") as file:
            return file.read(_MAX_TEXT_BYTES)


def check_components(bundle: Bundle, release: Release) -> dict[str, str]:
    """Return, by name, why components that a release claims are not in the bundle."""
    problems = {}
    for entry in release.entries:
        problem = _component_problem(bundle, entry, release)
        if problem is not None:
            problems[entry.name] = problem
    return problems


def check_licenses(bundle: Bundle, release: Release) -> dict[str, str]:
    """Return, by name, the components whose license has no text in the bundle. Those without a license are left out."""
    problems = {}
    for entry in release.entries:
        license_id, source = resolve_license(COMPONENTS[entry.name], entry, release.licenses)
        if license_id is not None:
            own = source == "component"
            path = entry.license_path if own else release.licenses.get(source or "", GlobalLicense()).path
            if problem := license_problem(bundle, license_id, path):
                problems[entry.name] = problem
    return problems


def license_problem(bundle: Bundle, license_id: str, path: str | None) -> str | None:
    """Return why a path does not hold the text of a license; without a path, it is LICENSES/{id}.txt."""
    path = path or f"{layout.LICENSES}/{license_id}.txt"
    if not is_inside(path):
        return f"the text of {license_id} at {path!r} is outside the bundle"
    if path not in bundle.files:
        return f"the text of {license_id} is missing: {path}"
    text = bundle.read(path).decode("utf-8", "replace")
    return None if is_text_of(text, license_id) else f"{path} does not hold the text of {license_id}"


# ------------------------------------------------------------------------------------------------ components
def _component_problem(bundle: Bundle, entry: Entry, release: Release) -> str | None:
    path = (entry.component_path or "").removesuffix("/")
    if not path:
        return "mof.yml gives no component_path"
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path):
        return f"is only linked, at {path}"
    if not is_inside(path):
        return f"the component_path {path!r} is outside the bundle"
    files = bundle.below(path)
    if not files:
        return f"missing: {path}"
    contents = [name for name in files if not _NOT_CONTENT.fullmatch(PurePosixPath(name).name)]
    contents = [name for name in contents if not _is_blank(bundle, name)]
    if not contents:
        return f"{path} is empty"
    return _CHECKS.get(entry.name, _any_content)(bundle, contents, entry, release)


def _is_blank(bundle: Bundle, path: str) -> bool:
    """Return whether a file is empty, or has only white space or an empty JSON value."""
    return bundle.files[path].num_bytes < 1024 and bundle.read(path).strip() in (b"", b"{}", b"[]", b"null", b'""')


Check = Callable[[Bundle, Sequence[str], Entry, Release], "str | None"]


def _any_content(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    """Reject a component that has only text files, all of which are placeholders."""
    return _document(1)(bundle, files, entry, release) if all(map(_is_document, files)) else None


def _is_document(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in DOCUMENT_SUFFIXES


def _document(min_words: int) -> Check:
    """Return the check that one of the files is a document of at least `min_words` words."""

    def check(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
        documents = [name for name in files if _is_document(name)]
        if not documents:
            return f"{entry.component_path} has no document ({', '.join(DOCUMENT_SUFFIXES)})"
        problems = [(name, document_problem(bundle.folder / name, min_words)) for name in documents]
        return None if any(problem is None for _, problem in problems) else " ".join(map(str, problems[0]))

    return check


def _results(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    """Require a number in a file of results."""
    for name in files:
        text = bundle.read(name).decode("utf-8", "replace")
        if name.endswith((".json", ".jsonl")):
            if any(_has_number(value) for value in _json_values(text)):
                return None
        elif re.search(r"\d", text):
            return None
    return f"{entry.component_path} has no results: found no number in {', '.join(files[:3])}"


def _json_values(text: str) -> Iterable[Any]:
    for part in (text, *split_lines(text)):
        try:
            yield json.loads(part)
        except (ValueError, RecursionError):
            continue


def _has_number(value: Any) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            pending += item.values() if isinstance(item, dict) else item
        elif isinstance(item, int | float) and not isinstance(item, bool):
            return True
    return False


# ------------------------------------------------------------------------------------------------ weights
def _final_weights(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    return weights_problem(bundle.folder, files)


def _intermediate_weights(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    """Require weights that differ from the final ones: a copy of these is no intermediate checkpoint."""
    folders: dict[str, list[str]] = {}
    for name in files:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    weights = {
        folder: names for folder, names in folders.items() if any(name.endswith(".safetensors") for name in names)
    }
    if not weights:
        return weights_problem(bundle.folder, files)
    if problem := next(filter(None, (weights_problem(bundle.folder, names) for names in weights.values())), None):
        return problem
    final = next((other.component_path for other in release.entries if other.name == mof.FINAL_PARAMETERS), None)
    final_hashes = _hashes(bundle, bundle.below(final.removesuffix("/")) if final else [])
    if all(_hashes(bundle, names) == final_hashes for names in weights.values()):
        return f"{entry.component_path} has the final weights only"
    return None


def _hashes(bundle: Bundle, files: Iterable[str]) -> set[str]:
    return {bundle.files[name].sha256 for name in files if name.endswith(".safetensors")}


# ------------------------------------------------------------------------------------------------ code
def _code(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    """Require source files: in the folder, or in an archive at the places that contents.json next to it names."""
    path = (entry.component_path or "").removesuffix("/")
    if path not in bundle.files or not re.search(r"\.(?:tar|tgz|tar\.\w+)$", path):
        names = {name: bundle.files[name].num_bytes for name in files}
        return None if _has_code(names) else f"{path} has no source code ({', '.join(_CODE_SUFFIXES)})"
    try:
        members, targets = bundle.tar_members(path)
        links = {name: normpath(f"{dirname(name)}/{target}") for name, target in targets.items()}
        places, top = _places(bundle, path, entry.name)
    except (Unreadable, OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"{path} cannot be read ({type(error).__name__}: {error})"
    for place in places:
        prefix = f"{top}/{place}".strip("/")
        prefix = links.get(prefix, prefix)
        found = {
            name: size
            for name, size in members.items()
            if not prefix or name == prefix or name.startswith(prefix + "/")
        }
        if not _has_code(found):
            return f"{path} has no source code at {prefix or 'its top'}"
    return None


def _places(bundle: Bundle, archive: str, component: str) -> tuple[list[str], str]:
    """Return where an archive has a component, below its top folder: everywhere, if there is no contents.json."""
    path = str(PurePosixPath(archive).parent / PurePosixPath(layout.ARCHIVE_CONTENTS).name)
    if path not in bundle.files:
        return [""], ""
    content = json.loads(bundle.read(path))
    places = [str(place) for place in content["components"][component]]
    if not places:
        raise ValueError(f"{path} names no file of {component}")
    return places, str(content["top_folder"])


def _has_code(sizes: Mapping[str, int]) -> bool:
    return any(size > 0 and name.endswith(_CODE_SUFFIXES) for name, size in sizes.items())


def _libraries(bundle: Bundle, files: Sequence[str], entry: Entry, release: Release) -> str | None:
    """Require text: a lock file, a bill of materials, or source code."""
    return None if any(re.search(rb"\w", bundle.read(name)) for name in files) else f"{entry.component_path} is empty"


_CHECKS: dict[str, Check] = {
    mof.ARCHITECTURE: _code,
    mof.TRAINING_CODE: _code,
    mof.INFERENCE_CODE: _code,
    mof.EVALUATION_CODE: _code,
    mof.PREPROCESSING_CODE: _code,
    mof.LIBRARIES: _libraries,
    mof.FINAL_PARAMETERS: _final_weights,
    mof.INTERMEDIATE_PARAMETERS: _intermediate_weights,
    mof.TECHNICAL_REPORT: _document(_MIN_WORDS),
    mof.MODEL_CARD: _document(_MIN_WORDS),
    mof.DATA_CARD: _document(_MIN_WORDS),
    mof.RESEARCH_PAPER: _document(MIN_PAPER_WORDS),
    mof.EVALUATION_RESULTS: _results,
}
