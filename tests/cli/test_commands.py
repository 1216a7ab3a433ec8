"""Test the console command `open-lm` and its registry."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from open_lm.cli.commands import COMMANDS, GROUPS
from open_lm.cli.main import help_text
from open_lm.cli.programs import parser_of

ROOT = Path(__file__).resolve().parents[2]
OPEN_LM = [sys.executable, "-m", "open_lm"]


def open_lm(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run([*OPEN_LM, *words], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_registered_command_exists_and_is_listed() -> None:
    registered = [command.name for commands in GROUPS.values() for command in commands]
    assert list(COMMANDS) == registered
    for command in COMMANDS.values():
        path = ROOT.joinpath(*command.full_module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command
        assert f"\n  {command.name} " in help_text() and command.help in help_text()
        assert command.also is None or command.also in registered
    assert all(len(line) <= 110 for line in help_text().split("\n"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_its_name(name: str) -> None:
    parser = parser_of(COMMANDS[name])
    assert parser.format_usage().startswith(f"usage: open-lm {name} "), parser.format_usage()
    assert parser.description


@pytest.mark.processes
def test_help_imports_nothing_slow() -> None:
    """The time of `open-lm --help` is that of starting Python: no third-party package is imported."""
    code = "import sys; sys.argv = ['open-lm', '--help']\ntry:\n    from open_lm.cli.main import main; main()\n"
    code += "finally:\n    print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(help_text())
    imported = set(result.stdout.splitlines()[-1].split())
    assert not imported & {"torch", "numpy", "yaml", "fsspec", "boto3", "transformers", "orjson", "argparse"}


@pytest.mark.processes
def test_help_of_the_converter_as_a_module_imports_nothing_slow() -> None:
    """`python -m` imports its package first, which imports transformers in every other program."""
    command = [sys.executable, "-X", "importtime", "-m", "open_lm.hf.convert", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "transformers"}


@pytest.mark.processes
def test_parsers_import_neither_torch_nor_transformers() -> None:
    """So `--help` of every command and mistakes in flags are answered within a second."""
    code = "import sys\nfrom open_lm.cli.commands import COMMANDS\nfrom open_lm.cli.programs import parser_of\n"
    code += "for name, command in COMMANDS.items():\n    parser_of(command)\n"
    code += "    print(name, *{'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == list(COMMANDS)


@pytest.mark.processes
def test_exit_codes_and_errors_pass_through() -> None:
    result = open_lm("train", "--modell", "x")
    assert result.returncode == 2 and "did you mean --model?" in result.stderr and "Traceback" not in result.stderr
    result = open_lm("trian")
    assert (result.returncode, result.stderr) == (
        2, "error: unknown command 'trian'; did you mean train? see open-lm --help\n",
    )  # fmt: skip
    result = open_lm()
    assert result.returncode == 2 and result.stderr == f"{help_text()}\nerror: expected a command\n"
    assert open_lm("--version").stdout == "open_lm 1.0.0\n"


@pytest.mark.processes
def test_trains_and_launches_by_the_names_of_commands(tmp_path: Path) -> None:
    flags = ["--dataset-type", "synthetic", "--model", "open_lm_test_tiny", "--train-num-samples", "128"]
    flags += ["--global-batch-size", "2", "--warmup", "1", "--log-every-n-steps", "1", "--logs", str(tmp_path)]
    flags += ["--workers", "1", "--report", "none"]  # a worker process is spawned from the module of the command
    result = open_lm("train", *flags, "--name", "run", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").exists() and "Train Epoch: 0" in result.stdout + result.stderr
    result = open_lm("launch", "--nproc-per-node", "2", "--dry-run", "train", *flags)
    assert f"-m open_lm.main {' '.join(flags)}" in result.stdout


@pytest.mark.processes
def test_console_script_is_declared() -> None:
    declared = re.search(r'"console_scripts": \["open-lm = ([\w.:]+)"\]', (ROOT / "setup.py").read_text())
    assert declared is not None and declared[1] == "open_lm.cli.main:main"
    (entry,) = entry_points(group="console_scripts", name="open-lm") or [None]  # absent in older installations
    assert entry is None or entry.value == declared[1]
