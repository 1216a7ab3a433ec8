"""The notebooks: the .ipynb files are generated from the .py files, and both run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="the extra notebooks is not installed")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_generated_notebook_has_the_cells_of_its_source(path: Path) -> None:
    source, generated = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    cells, expected = ([(cell.cell_type, cell.source) for cell in book.cells] for book in (generated, source))
    assert cells == expected, f"generate it again: make notebooks (or jupytext --to ipynb --update {path.name})"


def test_every_notebook_has_a_source_and_no_path_of_a_machine() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES} != set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(tmp|home|root)/", text), path.name
