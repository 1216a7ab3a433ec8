"""The documentation: the site builds without a broken link, and the documented path of a batch is true."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)\s]*\)")
MAX_FILES, MAX_LINES = 14, 4000


def batch_path() -> list[Path]:
    """Return the files of the numbered list in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return [ROOT / name for name in re.findall(r"^\d+\. `(open_lm/[\w/]+\.py)`", text, flags=re.MULTILINE)]


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports, at its top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_path_of_a_batch_is_short_and_connected() -> None:
    files = batch_path()
    assert files[0].name == "main.py" and len(files) <= MAX_FILES
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= MAX_LINES
    reached = {module_name(files[0]), *imported_modules(ROOT / "open_lm" / "training" / "build.py")}
    for path in files:
        assert module_name(path) in reached, f"no earlier file of the list imports {module_name(path)}"
        reached |= imported_modules(path)


@pytest.mark.processes
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("docs", "open_lm", "datapreprocess", "zensical.toml"):
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
    assert "create_model" in page and "get_data" in page


def test_links_in_markdown_files_lead_somewhere() -> None:
    """Links of the pages outside the site, which its build does not check, and of docs/ to files in the repository."""
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/**/*.md")]:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r'= "([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert pages == listed
