"""Tokenize units of text in a process of text_pool.py, which reads JSON lines and ends when its input is closed.

The first line is {"folder", "cache", "cache_limit_bytes", "stall_s"}, each further one a unit. Each answer is a line: a
report, or {"error": [class, message]}.
"""

from __future__ import annotations

import os
import sys

import orjson

from open_lm.data.cache import Cache
from open_lm.data.text_folder import TextFolder
from open_lm.data.text_units import TextUnit, index_unit
from open_lm.errors import UserError
from open_lm.system.names import escaped, unescaped


def main() -> None:
    """Answer the requests of standard input until it is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the output of libraries out of the answers
    setup = unescaped(orjson.loads(sys.stdin.buffer.readline()))
    folder = TextFolder(setup["folder"])
    cache = Cache(setup["cache"], setup["cache_limit_bytes"], setup["stall_s"], evicts="none")
    for line in sys.stdin.buffer:
        try:
            report = index_unit(TextUnit.from_json(unescaped(orjson.loads(line))), *folder.encoding, cache)
            answer = report.to_json()
        except UserError as error:
            answer = {"error": [type(error).__name__, str(error)]}
        answers.write(orjson.dumps(escaped(answer), option=orjson.OPT_APPEND_NEWLINE))
        answers.flush()


if __name__ == "__main__":
    main()
