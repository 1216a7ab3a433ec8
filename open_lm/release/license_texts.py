"""Write the texts of the licenses that a bundle uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from open_lm import storage
from open_lm.errors import ConfigError, join_problems
from open_lm.release import layout

_HOLDER, _YEAR = "{holder}", "{year}"  # places in the texts of this package
_FOLDER = Path(__file__).resolve().parent / "license_texts"


def available() -> list[str]:
    """Return the SPDX ids of the licenses whose texts this package has."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_texts(ids: Iterable[str], files: Mapping[str, Path], holder: str | None) -> dict[str, str]:
    """Return the texts of licenses by SPDX id.

    Args:
        files: files with the texts of further licenses by id; they take precedence over those of this package.
        holder: the holder of the copyright, whom some texts name.

    Raises:
        ConfigError: a text that is missing, unreadable or empty, or that needs a holder; with all problems.
    """
    texts, problems = {}, []
    for license_id in sorted(set(ids)):
        path = files.get(license_id, _FOLDER / f"{license_id}.txt")
        if not path.is_file():
            problems.append(
                f"the text of {license_id} is missing: pass it with --license-text {license_id}=FILE; this package has "
                f"those of {', '.join(available())}"
            )
            continue
        texts[license_id] = text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            problems.append(f"{path}: is empty, expected the text of {license_id}")
        if _HOLDER in text and not holder:
            problems.append(f"--producer is missing: the text of {license_id} names the holder of the copyright")
    if problems:
        raise ConfigError(join_problems(problems))
    return texts


def write_texts(bundle: Path, texts: Mapping[str, str], holder: str, year: int) -> None:
    """Write LICENSES/{id}.txt, with the holder and the year of the copyright where the texts have a place for them."""
    for license_id, text in texts.items():
        content = text.replace(_HOLDER, holder).replace(_YEAR, str(year))
        storage.write_text(bundle / layout.LICENSES / f"{license_id}.txt", content)
