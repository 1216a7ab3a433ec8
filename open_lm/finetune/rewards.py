"""Reward functions of reinforcement learning: built in, or from a Python file of the user.

A reward function has the interface of TRL: `reward(prompts, completions, **columns)` returns one number per
completion, or None where it does not apply. `prompts` and `completions` are texts, or lists of messages; `columns` has
a list for each further key of the data, such as `answer`. Unused arguments go to `**columns`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from open_lm.config.registry import REWARDS
from open_lm.errors import ConfigError, DataError
from open_lm.finetune.preference_data import LOCATION
from open_lm.system.names import user_path

Reward = Callable[..., list[float | None]]
_MARKED = re.compile(r"####\s*(-?[$]?\s*[\d,]*\.?\d+|[$]\s*-[\d,]*\.?\d+)")
_FORMAT = re.compile(r"[^#]*####\s*-?[$]?[\d,]*\.?\d+\s*")
_THINK = re.compile(r"\s*<think>(?:(?!</?think>).)+</think>\s*(?:(?!</?think>).)*\S\s*", re.DOTALL)
_MAX_SHOWN = 200
_FILE_NUMBERS = itertools.count()


# ---------------------------------------------------------------------------------------------- built in
@REWARDS.register("exact_match", help="1 if the number after the last #### equals that of the row's answer, else 0")
def exact_match(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """Compare final answers as the GSM8K data set marks them (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168).

    `answer` is a number, its text, or a solution that ends with "#### number".
    """
    expected = [_number(str(text)) if "####" in str(text) else _number(f"#### {text}") for text in answer]
    wrong = [text for text, number in zip(answer, expected, strict=True) if number is None]
    if wrong:
        raise ValueError(f'answer {wrong[0]!r} is not a number and does not end with "#### number"')
    found = [_number(completion_text(completion)) for completion in completions]
    return [float(number is not None and number == right) for number, right in zip(found, expected, strict=True)]


@REWARDS.register("answer_format", help="1 if the completion ends with its only '#### number', else 0")
def answer_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Reward the form of GSM8K's solutions, with any number."""
    return [float(_FORMAT.fullmatch(completion_text(completion)) is not None) for completion in completions]


@REWARDS.register("think_format", help="1 for <think>…</think> followed by an answer, else 0")
def think_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Reward the form of DeepSeek-R1's completions (Guo et al. 2025, https://arxiv.org/abs/2501.12948)."""
    return [float(_THINK.fullmatch(completion_text(completion)) is not None) for completion in completions]


def completion_text(completion: Any) -> str:
    """Return the text of a completion, or of its messages, one per line."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def _number(text: str) -> float | None:
    """Return the number after the last "####"; None if there is none."""
    found = _MARKED.findall(text)
    if not found:
        return None
    return float(re.sub(r"[$,\s]", "", found[-1]))


# ---------------------------------------------------------------------------------------------- of the user
def load_rewards(specs: Sequence[str]) -> list[Reward]:
    """Return the reward functions of --reward: names of built-in ones, or FILE.py:function.

    Raises:
        ConfigError: an unknown name, a file that is missing or fails, or no such function in it.
    """
    return [_checked(_load(spec), spec) for spec in specs]


def _load(spec: str) -> Reward:
    file, colon, name = spec.rpartition(":")
    if not file.endswith(".py"):
        if colon or "/" in spec or spec.endswith(".py"):
            raise ConfigError(f"--reward {spec}: expected FILE.py:function, or one of {', '.join(REWARDS)}")
        reward: Reward = REWARDS.get(spec)
        return reward
    path = Path(user_path(file))
    if not path.is_file():
        raise ConfigError(f"--reward {spec}: found no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"open_lm_reward_{next(_FILE_NUMBERS)}_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"--reward {spec}: {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        where = _line_of(error, str(path))
        raise ConfigError(f"--reward {spec}: {where}: importing it raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"--reward {spec}: {path} has no function {name!r}; found {', '.join(names) or 'none'}")
    return function


def _checked(reward: Reward, spec: str) -> Reward:
    """Return a reward function whose errors and wrong results name the file, the line and the row of the data."""
    file = user_path(spec.rpartition(":")[0]) or None

    def checked(**arguments: Any) -> list[float | None]:
        locations = arguments.pop(LOCATION, None) or ["?"] * len(arguments["completions"])
        try:
            result = reward(**arguments)
            values = list(result) if isinstance(result, Iterable) else None
        except Exception as error:
            row, cause = _failing_row(reward, arguments, error)
            shown = completion_text(arguments["completions"][row])[:_MAX_SHOWN]
            raise DataError(
                f"--reward {spec}: {_line_of(cause, file)}: raised {type(cause).__name__}: {cause} for the row "
                f"{locations[row]} and the completion {shown!r}; correct the function or the row"
            ) from error
        if values is None:
            raise DataError(f"--reward {spec}: returned {type(result).__name__}; return a list of numbers")
        if len(values) != len(locations):
            raise DataError(
                f"--reward {spec}: returned {len(values)} rewards for {len(locations)} completions; return one each"
            )
        rewards = [_finite(value) for value in values]
        for value, number, location in zip(values, rewards, locations, strict=True):
            if value is not None and number is None:
                raise DataError(f"--reward {spec}: returned {value!r} for the row {location}; expected a finite number")
        return rewards

    checked.__name__ = spec.rpartition(":")[2]
    return checked


def _finite(value: Any) -> float | None:
    """Return a number, also one of NumPy, as a float; None for others, infinity and NaN."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an int above the range of floats
        return None
    return number if math.isfinite(number) else None


def _failing_row(reward: Reward, arguments: Mapping[str, Any], error: Exception) -> tuple[int, Exception]:
    """Return the first row for which a reward function raises if it gets one row at a time, and its error."""
    num_rows = len(arguments["completions"])
    columns = {key for key, value in arguments.items() if isinstance(value, list) and len(value) == num_rows}
    for row in range(num_rows):
        try:
            reward(**{key: [value[row]] if key in columns else value for key, value in arguments.items()})
        except Exception as cause:
            return row, cause
    return 0, error


def _line_of(error: BaseException, file: str | None) -> str:
    """Return "file:line" of the innermost frame of an error, in `file` if it is part of the traceback."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if frame.filename == file] or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}"
