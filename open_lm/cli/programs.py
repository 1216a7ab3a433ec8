"""What can follow `open-lm` on a command line, read from the parsers of its commands."""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from open_lm.cli.commands import COMMANDS, Command
from open_lm.config.architecture import model_names
from open_lm.evaluate.icl.task_lists import task_list_names
from open_lm.system.program import set_program_name

# Arguments that accept names in addition to paths.
NAMES: Mapping[str, Callable[[], list[str]]] = {
    "model": model_names, "model_config": model_names, "eval_yaml": task_list_names, "icl_yaml": task_list_names,
}  # fmt: skip
_PATH_METAVARS = ("PATH", "FILE", "FOLDER")
_MAX_HELP = 72  # characters of a description


@dataclass(frozen=True)
class Value:
    """The value of an argument: one of `words` (if there are any), or a path if `is_path`."""

    words: tuple[str, ...] = ()
    is_path: bool = False


@dataclass(frozen=True)
class Flag:
    """A flag with all its names. `value` is None for a switch; `many` flags take several values."""

    names: tuple[str, ...]
    help: str
    value: Value | None = None
    many: bool = False


@dataclass(frozen=True)
class Program:
    """A command or subcommand.

    Attributes:
        key: its words after `open-lm`, such as `convert import`; empty for `open-lm` itself.
        flags: its flags.
        words: what may stand for a positional argument: subcommands or choices, with their help.
        next_key: the key of the program that a word selects.
        is_path: whether a positional argument is a path.
    """

    key: str
    flags: tuple[Flag, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    next_key: Mapping[str, str] = field(default_factory=dict)
    is_path: bool = False


class _Captured(BaseException):
    """Carries the parser that was about to print its help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def all_programs() -> list[Program]:
    """Return `open-lm` itself and all its commands and their subcommands. Imports their modules."""
    listed = {name: command.help for name, command in COMMANDS.items()}
    selected = {name: name for name in COMMANDS}
    own_flags = (Flag(("-h", "--help"), "show the help and exit"), Flag(("--version",), "show the version and exit"))
    programs = [Program("", own_flags, listed, selected)]
    parsers = {name: parser_of(command) for name, command in COMMANDS.items()}
    for name, command in COMMANDS.items():
        first, *nested = _programs_of(name, parsers[name])
        if command.also is not None:
            known = {flag for item in first.flags for flag in item.names}
            others = _flags(parsers[command.also])
            first = replace(first, flags=(*first.flags, *(item for item in others if known.isdisjoint(item.names))))
        if command.wraps:
            first = replace(first, words=listed, next_key=selected, is_path=True)
        programs += [first, *nested]
    return programs


def parser_of(command: Command) -> argparse.ArgumentParser:
    """Return the parser of a command: the one that prints its help.

    Raises:
        RuntimeError: the command has printed no help through argparse.
    """

    def capture(self: argparse.ArgumentParser, file: Any = None) -> NoReturn:
        raise _Captured(self)

    original, argv = argparse.ArgumentParser.print_help, sys.argv
    argparse.ArgumentParser.print_help = capture  # type: ignore[method-assign]
    sys.argv = [argv[0], "--help"]
    set_program_name(f"open-lm {command.name}")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'open_lm", RuntimeWarning)  # the module was imported before
            runpy.run_module(command.full_module, run_name="__main__", alter_sys=True)
    except _Captured as captured:
        return captured.parser
    finally:
        argparse.ArgumentParser.print_help = original  # type: ignore[method-assign]
        sys.argv = argv
        set_program_name(None)
    raise RuntimeError(f"{command.full_module} --help: expected the help of an ArgumentParser")


def _programs_of(key: str, parser: argparse.ArgumentParser) -> Iterator[Program]:
    """Yield the program of a parser, then those of its subparsers."""
    words: dict[str, str] = {}
    subparsers: dict[str, argparse.ArgumentParser] = {}
    is_path = False
    for action in parser._get_positional_actions():
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            words |= {name: _short(helps.get(name, "")) for name in action.choices}
            subparsers |= dict(action.choices)
        else:
            value = _value(action)
            words |= dict.fromkeys(value.words, "")
            is_path = is_path or value.is_path
    yield Program(key, tuple(_flags(parser)), words, {name: f"{key} {name}" for name in subparsers}, is_path)
    for name, subparser in subparsers.items():
        yield from _programs_of(f"{key} {name}", subparser)


def _flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    formatter = parser._get_formatter()
    for action in parser._get_optional_actions():
        if action.help == argparse.SUPPRESS:
            continue
        text = _short(formatter._expand_help(action)) if action.help else ""
        value = None if action.nargs == 0 else _value(action)
        yield Flag(_names(action.option_strings), text, value, action.nargs in ("+", "*", argparse.REMAINDER))


def _names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a flag, with one of two spellings by dashes and underscores."""
    return tuple({name.replace("_", "-"): name for name in reversed(names)}.values())[::-1]


def _value(action: argparse.Action) -> Value:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    words = NAMES[action.dest]() if action.dest in NAMES else [str(choice) for choice in action.choices or ()]
    if metavar.startswith("{"):  # choices of flags that check their values later
        words = metavar.strip("{}").split(",")
    is_path = getattr(action.type, "__module__", "") == "open_lm.system.names" or metavar in _PATH_METAVARS
    return Value(tuple(words), is_path)


def _short(text: str) -> str:
    """Return the beginning of a help text, on one line."""
    text = " ".join(text.split()).partition("; ")[0].partition(" (default: ")[0]
    return text if len(text) <= _MAX_HELP else text[: _MAX_HELP - 1].rstrip() + "…"
