"""Write the data of ladder_tiny.sh: a byte tokenizer, training text, and held-out passages for validation.

    python scripts/e2e/ladder_data.py FOLDER [--data FILE ...] [--text-mb 8] [--valid-kb 96]

Documents are cut into passages of at most 8,000 characters. Those of at least 200 are shuffled. Without --data, the
text is from the Python installation (see scripts/python_docs.py).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from posttrain_data import write_rows, write_tokenizer  # noqa: E402
from python_docs import documents  # noqa: E402

from open_lm.datapreprocess.inputs import find_inputs  # noqa: E402
from open_lm.datapreprocess.readers import Piece, PieceReader, ReadOptions  # noqa: E402
from open_lm.errors import DataError, run_cli  # noqa: E402
from open_lm.system.names import user_file, user_path  # noqa: E402

MIN_CHARACTERS, MAX_CHARACTERS = 200, 8000  # of a passage


def texts_of(files: Sequence[str], key: str) -> Iterator[str]:
    """Yield the documents of text files in any format of the preprocessor."""
    for item in find_inputs(files):
        for block in PieceReader(Piece(item.url), ReadOptions(content_key=key)):
            yield from (document for document in block.documents if isinstance(document, str))


def write_data(folder: Path, files: Sequence[str], key: str, text_mb: float, valid_kb: float) -> None:
    """Write all files. The same arguments and input give the same files.

    Raises:
        DataError: too little text.
    """
    source = texts_of(files, key) if files else (str(item["text"]) for item in documents(int(2e6 * text_mb)))
    passages = (text[at : at + MAX_CHARACTERS] for text in source for at in range(0, len(text), MAX_CHARACTERS))
    texts = [passage for passage in passages if len(passage) >= MIN_CHARACTERS]
    random.Random(0).shuffle(texts)
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    num_valid = next((number for number in range(len(sizes)) if sum(sizes[:number]) >= 1e3 * valid_kb), len(sizes))
    end = next((number for number in range(num_valid, len(sizes)) if sum(sizes[num_valid:number]) >= 1e6 * text_mb), -1)
    end = len(sizes) if end < 0 else end
    train_bytes = sum(sizes[num_valid:end])
    if train_bytes < 1e3 * valid_kb:
        raise DataError(
            f"--data: found {sum(sizes) / 1e3:,.0f} kB of text, expected more than twice --valid-kb {valid_kb:g}"
        )
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "valid.jsonl", ({"text": text} for text in texts[:num_valid]))
    write_rows(folder / "train.jsonl", ({"text": text} for text in texts[num_valid:end]))
    print(f"{train_bytes / 1e6:.1f} MB of training text ({end - num_valid:,} passages), "
          f"{sum(sizes[:num_valid]) / 1e3:.0f} kB for validation ({num_valid:,} passages)")  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="ladder_data.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("folder", type=user_file, help="folder to write")
    add("--data", type=user_path, nargs="+", default=[], help="files or folders with text, in any format of preprocess")
    add("--key", default="text", help="key or column of the text (default: %(default)s)")
    add("--text-mb", type=float, default=8, help="maximum megabytes of training text (default: %(default)s)")
    add("--valid-kb", type=float, default=96, help="kilobytes of validation text (default: %(default)s)")
    args = parser.parse_args(argv)
    write_data(args.folder, args.data, args.key, args.text_mb, args.valid_kb)


if __name__ == "__main__":
    sys.exit(run_cli(main))
