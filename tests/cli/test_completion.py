"""Test the completion of `open-lm` with the real shells."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from open_lm.cli.commands import COMMANDS
from open_lm.cli.completion import SCRIPTS
from open_lm.cli.programs import Program, all_programs
from open_lm.config.architecture import model_names
from open_lm.config.command_line import all_specs

# Print the words that bash offers for a command line, whose last word is being typed.
BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_open_lm
printf '%s\\n' "${COMPREPLY[@]}"
"""
# The functions of zsh's completion system, which work in an editor only, print their arguments here.
ZSH = """
compdef() { }
_files() { print -r -- FILES }
compset() { }
compadd() { shift; print -rl -- "$@" }
_describe() { [[ $1 == -o ]] && shift; print -rl -- "${(P@)2}" | sed 's/:.*//' }
source "$1"; shift
words=("$@") CURRENT=$#
_open_lm
true
"""


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    return all_programs()


@pytest.fixture(scope="module")
def scripts(programs: list[Program], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the file of each shell's completion, in a folder with one file and one folder."""
    folder = tmp_path_factory.mktemp("completion")
    for shell, write in SCRIPTS.items():
        (folder / shell).write_text(write(programs))
    (folder / "work" / "my folder").mkdir(parents=True)
    (folder / "work" / "data.jsonl").write_text("")
    return {shell: folder / shell for shell in SCRIPTS}


def run(command: list[str], scripts: Mapping[str, Path]) -> list[str]:
    folder = scripts["bash"].parent / "work"
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not result.stderr
    return result.stdout.splitlines()


def in_bash(line: str, scripts: Mapping[str, Path]) -> list[str]:
    words = shlex.split(line.replace("=", " = ")) + ([""] if line.endswith((" ", "=")) else [])
    return run(["bash", "-c", BASH, "bash", str(scripts["bash"]), *words], scripts)


def in_zsh(line: str, scripts: Mapping[str, Path]) -> list[str]:
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    offered = run(["zsh", "-f", "-c", ZSH, "zsh", str(scripts["zsh"]), *words], scripts)
    typed = words[-1].rpartition("=")[2]
    return [word for word in offered if word.startswith(typed) or word == "FILES"]  # zsh itself filters the words


def in_fish(line: str, scripts: Mapping[str, Path]) -> list[str]:
    command = f"source {shlex.quote(str(scripts['fish']))}; complete --do-complete {shlex.quote(line)}"
    lines = run(["fish", "--no-config", "-c", command], scripts)
    return [text.partition("\t")[0].rpartition("=")[2] for text in lines]


SHELLS: dict[str, Callable[[str, Mapping[str, Path]], list[str]]] = {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}


@pytest.mark.processes
@pytest.mark.parametrize("shell", SHELLS)
def test_completes_commands_flags_and_choices(shell: str, scripts: Mapping[str, Path]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")

    def complete(line: str) -> set[str]:
        return set(SHELLS[shell](line, scripts)) - {"", "FILES"}

    assert complete("open-lm ge") == {"generate"}
    assert set(COMMANDS) <= complete("open-lm ")
    assert complete("open-lm train --grad-ch") == {"--grad-checkpointing"}
    assert complete("open-lm train --lr 1e-3 --grad-cl") == {"--grad-clip-norm"}
    assert complete("open-lm train --model open_lm_16") == {"open_lm_160m"}
    assert complete("open-lm train --lr-scheduler=cons") >= {"const"}
    assert complete("open-lm convert ex") == {"export"}
    assert "--dtype" in complete("open-lm convert export --d")
    assert complete("open-lm convert import a b --dtype f") == {"float16", "float32"}
    assert complete("open-lm plan --strat") == {"--strategies"}
    assert complete("open-lm plan --fsdp-a") == {"--fsdp-amp"}, "the planner accepts the trainer's flags"
    assert complete("open-lm launch --nproc-per-node 2 tra") == {"train"}
    assert complete("open-lm launch --nproc-per-node 2 train --warm") == {"--warmup"}
    assert complete("open-lm completion zs") == {"zsh"}
    assert complete("open-lm evaluate --eval-yaml light me") == {"medium"}, "flags with several values"


@pytest.mark.processes
def test_completes_paths(scripts: Mapping[str, Path]) -> None:
    """bash completes paths itself if the function offers no words; fish and zsh are asked for them."""
    if shutil.which("fish"):
        assert {"data.jsonl", "my folder/"} <= set(in_fish("open-lm train --train-data ", scripts))
        assert "data.jsonl" not in in_fish("open-lm train --lr ", scripts)
    if shutil.which("zsh"):
        assert in_zsh("open-lm inspect ", scripts) == ["FILES"]
        assert in_zsh("open-lm train --lr ", scripts) == []
    typed = f"source {shlex.quote(str(scripts['bash']))}; complete -p open-lm"
    assert "-o default" in run(["bash", "-c", typed], scripts)[0]
    assert in_bash("open-lm train --train-data da", scripts) == [""]


def test_programs_have_all_flags_of_the_trainer(programs: list[Program]) -> None:
    (train,) = [program for program in programs if program.key == "train"]
    values = {flag.names[0]: flag.value for flag in train.flags}
    for spec in all_specs().values():
        value = values[spec.flag]
        assert (value is None) == (spec.kind is bool), spec.flag
        if value is not None:
            assert value.is_path == (spec.path is not None), spec.flag
            assert spec.choices is None or set(value.words) == set(spec.choices)
    model = values["--model"]
    assert model is not None and set(model.words) == set(model_names())
