r"""Names of files as users give them: read from flags and settings, matched with files, printed and written.

Flags and settings that hold a path have one of the types `user_path`, `weights_path`, `user_file`, `shard_pattern`,
`input_pattern`, `input_list` and `source_pattern`. They replace a leading `~` by the home folder, as a shell does.
URLs, names on the hub and `pipe:` commands are returned unchanged.

A name may hold the characters of patterns (`* ? [ ] { }`). What exists under the literal name is used before the name
is taken for a pattern (`literal_prefix`).

A name may hold bytes that are not UTF-8. Python represents such a byte by a lone surrogate (`os.fsdecode`), which no
UTF-8 file can hold. Whatever is printed or written has the escape `\xNN` in its place (`escape`), so that JSON and text
files remain valid; `unescape` returns the name.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

ESCAPE_ERRORS = "open_lm_escape"  # error handler of encodings: writes the escape of `escape`
_GLOB_CHARACTERS = frozenset("*?[")
_JOIN, _LIST = "::", "@"
_MAX_NAME_BYTES = 255  # of local file systems
_UNDECODABLE = "[\udc80-\udcff]"  # bytes 0x80 to 0xff after os.fsdecode
_ESCAPED_TEXT = r"\\(?=x[0-9a-f]{2})"  # a backslash that would read as the start of an escape
_ESCAPABLE = re.compile(f"{_UNDECODABLE}|{_ESCAPED_TEXT}")
_ESCAPABLE_IN_LINE = re.compile(f"{_UNDECODABLE}|{_ESCAPED_TEXT}|[\x00-\x1f\x7f]")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


# ---------------------------------------------------------------------------------------------- types of flags
def user_path(text: str) -> str:
    """Return a path with the home folder in place of a leading `~` or `~user`; other text unchanged."""
    return os.path.expanduser(text) if text.startswith("~") else text


def weights_path(text: str) -> str:
    """Return a `user_path` without the prefix `params::`, by which some programs mark a checkpoint of weights only."""
    return user_path(text.removeprefix("params::"))


def user_file(text: str) -> Path:
    """Return the `user_path` of a local file or folder."""
    return Path(user_path(text))


def shard_pattern(text: str) -> str:
    """Return shard patterns joined by `::`, each as a `user_path`."""
    return _JOIN.join(map(user_path, split_joined(text)))


def input_pattern(text: str) -> str:
    """Return a path or pattern, or `@FILE`, with a `user_path`."""
    return _LIST + user_path(list_file(text)) if is_list(text) else user_path(text)


def input_list(text: str) -> list[str]:
    """Return the comma-separated paths or patterns of a text, each as an `input_pattern`."""
    parts = (part if exists(user_path(part)) else part.strip() for part in _split(text, ","))
    return [input_pattern(part) for part in parts if part]


def source_pattern(text: str) -> str:
    """Return NAME=PATTERN with an `input_pattern`."""
    name, sign, pattern = text.partition("=")
    return name + sign + input_pattern(pattern)


# ---------------------------------------------------------------------------------------------- literal names
def local_path(url: str | os.PathLike[str]) -> str:
    """Return a local path without `file://`."""
    text = os.fspath(url)
    return text[len("file://") :] if text.lower().startswith("file://") else text


def exists(path: str) -> bool:
    """Return whether a local file or folder has this literal name; False for a URL or a command."""
    return os.path.exists(local_path(path))


def is_list(text: str) -> bool:
    """Return whether an input is `@FILE`, a list of inputs, and no existing name."""
    return text.startswith(_LIST) and not exists(text)


def list_file(text: str) -> str:
    """Return the file of `@FILE`."""
    return text.removeprefix(_LIST)


def split_joined(text: str) -> list[str]:
    """Return the patterns that `::` joins."""
    return _split(text, _JOIN)


def _split(text: str, separator: str) -> list[str]:
    """Return the parts of a text between separators. The name of an existing folder or file may hold a separator."""
    words, parts, start = text.split(separator), [], 0
    while start < len(words):
        part, start = words[start], start + 1
        while end := _end_of_name(part, words, start, separator):
            part, start = separator.join([part, *words[start:end]]), end
        parts.append(part)
    return parts


def _end_of_name(part: str, words: Sequence[str], start: int, separator: str) -> int:
    """Return the end of the words, from `start` on, that complete `part` to an existing name; 0 if none do."""
    name = part
    for number in range(start, len(words)):
        head, slash, _ = words[number].partition("/")
        name += separator + head
        if exists(user_path(name)):
            return number + 1
        if slash or len(name) - name.rfind("/") > _MAX_NAME_BYTES:
            break
    return 0


def is_glob(text: str) -> bool:
    """Return whether a text holds `*`, `?` or `[` and is not an existing name."""
    return not _GLOB_CHARACTERS.isdisjoint(text) and not exists(text)


def is_pattern(text: str) -> bool:
    """Return whether a text is a glob or holds braces, and is not an existing name."""
    return is_glob(text) or ("{" in text and not exists(text))


def literal_prefix(path: str) -> str:
    """Return the longest leading part of a local path that exists, up to a `/` or the end; the rest is a pattern."""
    end = len(path)
    while end > 0 and not exists(path[:end]):
        end = path.rfind("/", 0, end)
    return path[: max(end, 0)]


def glob_paths(pattern: str) -> list[str]:
    """Return the local files and folders that match a pattern.

    Its `literal_prefix` has no special meaning, unless it leads to no match.
    """
    prefix = literal_prefix(pattern)
    literal = glob.escape(prefix) + pattern[len(prefix) :]
    return glob.glob(literal, recursive=True) or (glob.glob(pattern, recursive=True) if literal != pattern else [])


# ---------------------------------------------------------------------------------------------- print and write
def escape(name: str) -> str:
    r"""Return a name with `\xNN` for each byte that is not UTF-8, and for a backslash that would read as such."""
    return _ESCAPABLE.sub(_escape_character, name)


def escape_line(name: str) -> str:
    """Return `escape` of a name for a file with one entry per line: control characters are escaped too."""
    return _ESCAPABLE_IN_LINE.sub(_escape_character, name)


def unescape(text: str) -> str:
    """Return the name of which `text` is the `escape` or `escape_line`."""
    return _ESCAPE.sub(lambda match: os.fsdecode(bytes.fromhex(match[1])), text)


def escaped(value: Any) -> Any:
    """Return a JSON value with `escape` applied to its strings and keys."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list | tuple) else value


def unescaped(value: Any) -> Any:
    """Return the value of which `value` is the result of `escaped`."""
    if isinstance(value, str):
        return unescape(value)
    if isinstance(value, dict):
        return {unescaped(key): unescaped(item) for key, item in value.items()}
    return [unescaped(item) for item in value] if isinstance(value, list) else value


def printable(text: str) -> str:
    r"""Return a text that UTF-8 can hold: with `\xNN` for bytes that are not UTF-8."""
    return text.encode("utf-8", ESCAPE_ERRORS).decode("utf-8")


def setting_text(value: Any) -> str:
    """Return str(value). Names in a list keep their bytes that are not UTF-8, so that `escape` finds them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return str(value)


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) and re.search(_UNDECODABLE, value) else repr(value)


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """Return a short, unique label for each of several paths or URLs, with characters that all loggers accept.

    The label is the name of the folder of the shards or the manifest, or their own name if several of the names are in
    the same folder. Parent folders are prepended until the label differs from those of earlier names.
    """
    folders = [name.rpartition("/")[0] for name in dict.fromkeys(names)]
    labels: dict[str, str] = {}
    for name in dict.fromkeys(names):
        words = [re.sub(r"[^\w.-]+", "_", word) for word in re.split("[/:]+", name) if word]
        if len(words) > 1 and folders.count(name.rpartition("/")[0]) == 1:
            words.pop()
        else:
            words[-1] = words[-1].partition(".")[0] or words[-1]
        choices = ["-".join(words[-count:]) for count in range(1, len(words) + 1)]
        choices += [f"{words[-1]}-{number}" for number in range(2, len(folders) + 2)]
        labels[name] = next(choice for choice in choices if choice not in labels.values())
    return labels


def set_name(val_data: Sequence[str]) -> str:
    """Return the name of a validation set: that of its shards, without folders and suffixes."""
    return PurePath(" ".join(val_data)).name.partition(".")[0]


def _escape_character(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]) & 0xFF:02x}"


def _encode_escapes(error: UnicodeError) -> tuple[str, int]:
    """Handle characters that an encoding lacks: escape bytes of names like `escape`, others like backslashreplace."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(
        f"\\x{ord(char) & 0xFF:02x}"
        if re.match(_UNDECODABLE, char)
        else char.encode("ascii", "backslashreplace").decode()
        for char in characters
    ), error.end


codecs.register_error(ESCAPE_ERRORS, _encode_escapes)
