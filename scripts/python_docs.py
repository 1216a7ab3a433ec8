"""Gather text from the local Python installation: its documentation, docstrings and long comments.

    python scripts/python_docs.py --output-dir raw --max-mb 4

Writes train-00.jsonl.zst … and valid.jsonl.zst. Each line is a JSON object with "text" and "meta".
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

from open_lm.errors import DataError, run_cli
from open_lm.storage import atomic_write, split_lines, write_text
from open_lm.system.names import user_path

TRAIN_FILES, VALID_FRACTION = 4, 0.05
MIN_DOCUMENT_CHARS = 400
MIN_COMMENT_LINES = 3
END_OF_TEXT = "<|endoftext|>"


def documents(max_bytes: int) -> Iterator[dict[str, object]]:
    """Yield the language topics, then one document per module of the standard library, up to `max_bytes` of text."""
    total = 0
    for source, text in _all_texts():
        if len(text) < MIN_DOCUMENT_CHARS:
            continue
        total += len(text.encode())
        if total > max_bytes:
            return
        yield {"text": text, "meta": {"source": source}}


def _all_texts() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics

        yield from ((f"topic/{name}", text.strip()) for name, text in sorted(topics.items()))
    except ImportError:  # some distributions package the topics separately
        pass
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.parts):
            yield path.relative_to(library).as_posix(), module_text(path)


def module_text(path: Path) -> str:
    """Return the docstrings and multi-line comments of a module in order, or "" if it cannot be parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        pieces = _docstrings(tree) + _comments(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
        return ""
    return "\n\n".join(text for _, text in sorted(pieces))


def _docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    pieces = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "")
                pieces.append((getattr(node, "lineno", 0), f"{name}\n{text}" if name else text))
    return pieces


def _comments(source: str) -> list[tuple[int, str]]:
    pieces: list[tuple[int, str]] = []
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if token.start[0] != last + 1:
            _close_block(pieces, block, last)
            block = []
        block.append(token.string.lstrip("#").strip())
        last = token.start[0]
    _close_block(pieces, block, last)
    return pieces


def _close_block(pieces: list[tuple[int, str]], block: list[str], last_line: int) -> None:
    if len(block) >= MIN_COMMENT_LINES:
        pieces.append((last_line - len(block) + 1, "\n".join(block)))


def gather(output_dir: str, max_mb: float) -> dict[str, int]:
    """Write the shuffled documents, and return the number of text bytes and of documents in each split."""
    by_hash = sorted(documents(int(max_mb * 1e6)), key=lambda item: hashlib.sha256(str(item["meta"]).encode()).digest())
    num_valid = max(1, int(len(by_hash) * VALID_FRACTION))
    if len(by_hash) < 2 * TRAIN_FILES:
        raise DataError(
            f"found only {len(by_hash)} documents in the Python installation, expected at least {2 * TRAIN_FILES}; "
            "install the standard library's source files"
        )
    outputs = {"valid.jsonl.zst": by_hash[:num_valid]}
    for index in range(TRAIN_FILES):
        outputs[f"train-{index:02d}.jsonl.zst"] = by_hash[num_valid + index :: TRAIN_FILES]
    counts = {"train_bytes": 0, "train_documents": 0, "valid_bytes": 0, "valid_documents": 0}
    for name, items in outputs.items():
        split = name.partition("-")[0].partition(".")[0]
        text = "".join(json.dumps(item, allow_nan=False) + "\n" for item in items)
        with atomic_write(f"{output_dir}/{name}", "wb") as file:
            file.write(zstandard.compress(text.encode()))
        counts[f"{split}_bytes"] += sum(len(str(item["text"]).encode()) for item in items)
        counts[f"{split}_documents"] += len(items)
    return counts


def train_tokenizer(files: Sequence[Path], target: Path, vocab_size: int) -> int:
    """Train a byte-level BPE on .jsonl.zst files, write it as tokenizer.json, and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for path in files:
            for line in split_lines(zstandard.decompress(path.read_bytes()).decode()):
                yield json.loads(line)["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    write_text(target, tokenizer.to_str(pretty=True))
    return int(tokenizer.get_vocab_size())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=user_path, required=True, help="folder for the .jsonl.zst files")
    parser.add_argument("--max-mb", type=float, default=4, help="maximum megabytes of text (default: %(default)s)")
    args = parser.parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    print(json.dumps(gather(args.output_dir, args.max_mb), allow_nan=False))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
