"""Read JSON lines files of preference pairs and of prompts with answers.

A pair has `prompt`, `chosen` and `rejected`, each a text, or a list of messages with `role` and `content`. Without
`prompt`, or with a text next to lists, the prompt is the part that both conversations begin with. A row for
reinforcement learning has `prompt` and further keys, such as `answer`, which reward functions receive.

Every row gets the key `location`, "file:line", for messages about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from open_lm import storage
from open_lm.errors import DataError, join_problems
from open_lm.finetune.conversations import ASSISTANT, USER, BadConversation, parse_messages, unicode_text

LOCATION = "location"
_MAX_PROBLEMS = 10
Row = dict[str, Any]


def read_pairs(files: Sequence[str]) -> list[Row]:
    """Return the preference pairs of files: rows with prompt, chosen, rejected and location.

    Raises:
        DataError: rows that cannot be used, with file and line.
    """
    return _read(files, _pair)


def read_prompts(files: Sequence[str]) -> list[Row]:
    """Return the prompts of files: rows with prompt, location and the further keys of the files.

    Raises:
        DataError: rows that cannot be used, with file and line.
    """
    rows = _read(files, _prompt)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    problems = []
    for key in keys:
        kinds: dict[str, str] = {}
        for row in rows:
            kinds.setdefault(_kind(row.get(key)), row[LOCATION])
        if len(kinds) > 1:
            listed = ", ".join(f"{kind} ({where})" for kind, where in kinds.items())
            problems.append(f"{key!r}: found {listed}; expected one type in all rows")
    if problems:
        raise DataError(join_problems(problems, "the rows of the training data differ"))
    return rows


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Return whether a row consists of messages instead of text."""
    return isinstance(row["prompt"], list)


# ---------------------------------------------------------------------------------------------- files
def _read(files: Sequence[str], parse: Callable[[Row], Row]) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    for file in files:
        num_rows = len(rows)
        for location, line in _lines(file):
            try:
                content = json.loads(line)
                if not isinstance(content, dict):
                    raise ValueError(f"found a {type(content).__name__}, expected a JSON object")
                row = parse(content)
                for key, value in row.items():
                    unicode_text(json.dumps({key: value}, ensure_ascii=False, allow_nan=False), repr(key))
                rows.append({**row, LOCATION: location})
            except (ValueError, BadConversation) as error:
                problems.append(f"{location}: {error}")
        if len(rows) == num_rows and not problems:
            problems.append(f"{file}: has no rows; write one JSON object per line")
    if not problems:
        problems = _mixed(rows)
    if len(problems) > _MAX_PROBLEMS:
        problems = [*problems[:_MAX_PROBLEMS], f"and {len(problems) - _MAX_PROBLEMS} further rows"]
    if problems:
        raise DataError(join_problems(problems, "these rows cannot be used"))
    return rows


def _lines(file: str) -> Iterator[tuple[str, str]]:
    """Yield "file:line" and the text of each line that is not empty."""
    try:
        lines = storage.read_lines(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}); expected one JSON object per line") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file}:{number}", line


def _mixed(rows: Sequence[Row]) -> list[str]:
    """Return the problem of rows with text next to rows with messages."""
    kinds = [is_conversation(row) for row in rows]
    if not rows or len(set(kinds)) == 1:
        return []
    text, messages = rows[kinds.index(False)][LOCATION], rows[kinds.index(True)][LOCATION]
    return [f"{text} has text, but {messages} has messages; use one form in all files"]


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "a bool"
    names = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]


# ---------------------------------------------------------------------------------------------- rows
def _pair(row: Row) -> Row:
    """Return prompt, chosen and rejected. Raise ValueError if they are missing or wrong."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; found the keys {', '.join(row) or 'none'}")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in row:
            raise ValueError("prompt missing; expected prompt, chosen and rejected")
        pair = {"prompt": _text(row["prompt"], "prompt"), "chosen": chosen, "rejected": rejected}
        for key in ("chosen", "rejected"):
            _text(pair[key], key)
    else:
        pair = _conversations(row.get("prompt"), _messages(chosen, "chosen"), _messages(rejected, "rejected"))
    if pair["chosen"] == pair["rejected"]:
        raise ValueError("chosen and rejected are equal, so the pair expresses no preference; remove it")
    return pair


def _conversations(prompt: Any, chosen: list[Row], rejected: list[Row]) -> Row:
    """Return a pair of conversations, with the messages that both begin with as the prompt."""
    shared = _messages(prompt, "prompt") if isinstance(prompt, list) else []
    if not shared:
        length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        length = min(len(chosen), len(rejected)) if length is None else length
        shared, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not shared:
        raise ValueError("chosen and rejected begin with different messages; add the prompt as a list of messages")
    if isinstance(prompt, str) and prompt not in (message["content"] for message in shared):
        raise ValueError("prompt is a text that is not part of the messages of chosen and rejected")
    if shared[-1]["role"] == ASSISTANT:
        raise ValueError("the prompt ends with a message of the assistant; expected one of the user or a tool")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != ASSISTANT:
            raise ValueError(f"{key} does not end with a message of the assistant")
    return {"prompt": shared, "chosen": chosen, "rejected": rejected}


def _prompt(row: Row) -> Row:
    """Return a row with a valid prompt. Raise ValueError if it has none."""
    if "prompt" not in row:
        raise ValueError(f"prompt missing; found the keys {', '.join(row) or 'none'}")
    reserved = sorted({"prompts", "completions", "completion", "completion_ids", LOCATION} & set(row))
    if reserved:
        raise ValueError(f"the key {reserved[0]!r} is reserved; rename it")
    prompt = row["prompt"]
    messages = _messages(prompt, "prompt") if isinstance(prompt, list) else _text(prompt, "prompt")
    if isinstance(messages, list) and messages[-1]["role"] == ASSISTANT:
        raise ValueError("the prompt ends with a message of the assistant; expected one of the user or a tool")
    return {**row, "prompt": messages}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key}: found {_kind(value)}, expected text or a list of messages")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def _messages(value: Any, key: str) -> list[Row]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: found {_kind(value)}, expected a list of messages, as in the other keys")
    messages = parse_messages(value, key)
    for number, message in enumerate(messages, start=1):
        if message.role in (USER, ASSISTANT) and not message.content.strip():
            raise ValueError(f"{key}, message {number}: the content of the {message.role} is empty")
    return [message.to_json() for message in messages]
