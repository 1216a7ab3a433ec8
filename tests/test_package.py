"""Test the distribution: the contents of the wheel, and its use without the checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


CORE_MODULES = (
    "numpy", "numpy.libs", "yaml", "_yaml", "braceexpand", "fsspec", "orjson", "boto3", "botocore", "s3transfer",
    "jmespath", "dateutil", "six.py", "urllib3",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the packaged files."""
    source = tmp_path_factory.mktemp("source")
    for name in ("open_lm", "datapreprocess", "model_configs", "requirements", "eval", "tests", "scripts"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """Build a wheel from a copy of the packaged files."""
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


@pytest.fixture(scope="module")
def fresh_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fresh environment in which pip has installed the wheel without its requirements."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def core_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables of a Python (with -S) that has the wheel and its core requirements, without extras."""
    site = tmp_path_factory.mktemp("core")
    zipfile.ZipFile(wheel).extractall(site)
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parents[1]
    for name in CORE_MODULES:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    return {**os.environ, "PYTHONPATH": str(site)}


def test_distribution_name_and_version() -> None:
    import open_lm

    assert version("open_lm") == open_lm.__version__ == "1.0.0"


@pytest.mark.processes
def test_version_flag(core_environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-m", "open_lm.main", "--version"]
    result = subprocess.run(command, env=core_environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "open_lm 1.0.0\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("open_lm.main --dataset-type synthetic --train-num-samples 100 --model open_lm_test_tiny", "torch", "train"),
        ("open_lm.utils.torchrun --nproc-per-node 1 x.py", "torch", "train"),
        ("open_lm.utils.convert_checkpoint step_1 --output out", "torch", "train"),
        ("open_lm.datapreprocess.make_2048 --input-files a.jsonl --output-dir o --tok t.json", "tokenizers", ""),
        ("open_lm.datapreprocess.ray.tokenize_shuffle --input . --output o --tok t.json", "tokenizers", ""),
        (
            "open_lm.datapreprocess.make_2048 --input-files a.jsonl --output-dir o --tok a/b",
            "huggingface-hub",
            "",
        ),
        (
            "open_lm.datapreprocess.make_2048 --input-files a.jsonl --output-dir o --tok t.model",
            "sentencepiece",
            "",
        ),
        ("open_lm.utils.inspect_shards fsspec+s3://bucket/data", "s3fs", "s3fs"),
    ],
)
def test_missing_optional_package_is_one_line_with_the_extra(
    command: str, package: str, extra: str, core_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("t.json", "t.model"):
        (tmp_path / name).write_text("{}")
    result = subprocess.run(
        [sys.executable, "-S", "-m", *command.split()],
        env=core_environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    message = re.escape(f"the package {package} is not installed; install it with: pip install ")
    assert result.returncode == 2, result.stderr
    assert re.search(rf'{message}"open_lm\[{extra or "(train|preprocess)"}\]"', result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_missing_package_that_is_no_requirement_is_a_bug() -> None:
    from open_lm.errors import missing_package

    assert missing_package("no_such_package") is None
    assert missing_package("huggingface_hub") is not None  # the distribution's name has a dash


@pytest.mark.processes
def test_console_command_of_an_installed_wheel(fresh_environment: Path, tmp_path: Path) -> None:
    """The list of commands needs no other package. It has all commands of the checkout."""
    from open_lm.cli.main import help_text

    command = str(fresh_environment / "bin" / "open-lm")
    result = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == f"{help_text()}\n"
    result = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "open_lm 1.0.0\n"


@pytest.mark.processes
@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "chat", "launch", "preprocess", "doctor", "plan"])
def test_help_of_commands_without_extras(name: str, core_environment: dict[str, str], tmp_path: Path) -> None:
    """What used to be a script of the repository works from a wheel too."""
    command = [sys.executable, "-S", "-m", "open_lm", name, "--help"]
    result = subprocess.run(command, env=core_environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"usage: open-lm {name} "), result.stderr


@pytest.mark.processes
def test_programs_that_import_the_package_find_its_types(fresh_environment: Path, tmp_path: Path) -> None:
    consumer = tmp_path / "consumer.py"
    consumer.write_text("from open_lm.system.names import user_path\n\nnumber: int = user_path('~/data')\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(fresh_environment / "bin/python")]
    flags = ["--config-file", "", "--cache-dir", str(tmp_path / "cache"), str(consumer)]
    result = subprocess.run([*mypy, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = 'Incompatible types in assignment (expression has type "str", variable has type "int")'
    assert expected in result.stdout and "1 error" in result.stdout, result.stdout + result.stderr


@pytest.mark.processes
def test_all_extra_resolves_with_plain_pip(wheel: Path, fresh_environment: Path, tmp_path: Path) -> None:
    """Plain pip must find the versions without backtracking, within two minutes of CPU time."""
    limit = tmp_path / "constraints.txt"
    limit.write_text("torch==2.13.0\n")  # the release of a build for CPUs, which needs no CUDA packages

    def limit_time() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    pip = [sys.executable, "-m", "pip", "--python", str(fresh_environment / "bin/python"), "install", "--dry-run"]
    result = subprocess.run(
        [*pip, "-c", str(limit), f"{wheel}[all]"], capture_output=True, text=True, check=False, preexec_fn=limit_time
    )
    output = result.stdout + result.stderr
    if result.returncode == 1 and "Failed to establish a new connection" in output:
        pytest.skip("no connection to a package registry")
    assert result.returncode == 0, output[-3000:]
    assert "looking at multiple versions" not in output, output[-3000:]
    assert "Would install" in output


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").iterdir()), ids=lambda path: path.name)
def test_requirements_name_no_registry(path: Path) -> None:
    assert not re.search(r"://(?!…)|--(extra-)?index-url|--find-links|^-[if] ", path.read_text(), re.MULTILINE)


@pytest.mark.processes
def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    # Under `make test` this is a nested make, which would print the directory.
    command = ["make", "--no-print-directory", "help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert targets is not None
    assert [line.split()[0] for line in result.stdout.splitlines()] == targets.group(1).split()


def test_wheel_contains_only_the_open_lm_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"open_lm", "open_lm-1.0.0.dist-info"}
    configs = {name.rpartition("/")[2] for name in names if name.startswith("open_lm/model_configs/")}
    assert configs == {path.name for path in (ROOT / "model_configs").glob("*.*")}
    for name in ("make_2048.py", "ray/tokenize_shuffle.py", "metadata/rpj_lm_data.yaml"):
        assert f"open_lm/datapreprocess/{name}" in names


def test_wheel_contains_every_file_of_the_package(source: Path, wheel: Path) -> None:
    """Templates, recipes, task lists and other data files are found by a rule, not by a list."""
    folders = [source / "open_lm", source / "datapreprocess", source / "model_configs"]
    files = {path.relative_to(source) for folder in folders for path in folder.rglob("*") if path.is_file()}
    expected = {str(path if path.parts[0] == "open_lm" else "open_lm" / path) for path in files}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("open_lm/")} == expected
    for name in ("evaluate/icl/suites/light.yaml", "cli/tested_versions.txt", "finetune/chat_page.html", "py.typed"):
        assert f"open_lm/{name}" in names


def test_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("open_lm-1.0.0.dist-info/METADATA").decode()
        entry_points = archive.read("open_lm-1.0.0.dist-info/entry_points.txt").decode()
    assert "Classifier: Typing :: Typed" in text and "Keywords: language model" in text
    assert re.search(r"^License(-Expression)?: MIT$", text, re.MULTILINE) and "Requires-Python: " in text
    assert "open-lm = open_lm.cli.main:main" in entry_points
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.processes
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
