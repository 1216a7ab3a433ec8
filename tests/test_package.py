"""Test the distribution: the contents of the wheel, and its use without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the packaged files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("open_lm", "datapreprocess", "model_configs", "requirements", "eval", "tests", "scripts"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_distribution_name_and_version() -> None:
    assert version("open_lm") == "1.0.0"


def test_wheel_contains_only_the_open_lm_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"open_lm", "open_lm-1.0.0.dist-info"}
    configs = {name.rpartition("/")[2] for name in names if name.startswith("open_lm/model_configs/")}
    assert configs == {path.name for path in (ROOT / "model_configs").glob("*.*")}
    for name in ("make_2048.py", "ray/tokenize_shuffle.py", "metadata/rpj_lm_data.yaml"):
        assert f"open_lm/datapreprocess/{name}" in names


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import open_lm.datapreprocess.ray.tokenize_shuffle as cluster_command, open_lm.model_configs, torch\n"
        "from open_lm.config.command_line import parse_args\n"
        "from open_lm.model.transformer import create_model\n"
        "with torch.device('meta'):\n"
        "    model = create_model(parse_args(['--model', 'open_lm_7b']))\n"
        "assert all(module.__file__.startswith(sys.path[0]) for module in (cluster_command, open_lm.model_configs))\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "6889676800", result.stderr
