"""Fetch text with `datasets` and keep it on disk, one saved data set per source.

    python scripts/e2e/text.py save --dataset cerebras/SlimPajama-627B --split 'train=train[:10%]' \\
        --source-key meta.redpajama_set_name --output text
    python scripts/e2e/text.py count text/train

`save` writes OUTPUT/NAME/SOURCE for each --split NAME=SPLIT: folders for `datasets.load_from_disk` and for the
preprocessor (--source SOURCE=OUTPUT/NAME/SOURCE). OUTPUT/NAME/sources.json has the documents, characters and bytes of
each source and is written last; a split that has it is kept. With --streaming only the documents of a slice such as
train[:2000] are fetched. `count` reads the saved data sets and prints the same counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, DataError, run_cli
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file, user_path

ONE_SOURCE = "all"  # name of the source of text without --source-key
UNKNOWN = "unknown"  # source of documents that do not name theirs
COUNTS_FILE = "sources.json"
_SLICE = re.compile(r"(?P<split>[\w.-]+)\[(?P<start>\d*):(?P<end>\d+)\]")
_BATCH = 1000


def source_name(value: object) -> str:
    """Return the name of a source for folders and --source."""
    return re.sub(r"[^\w.-]+", "_", value).strip("._") or UNKNOWN if isinstance(value, str) else UNKNOWN


def column_value(batch: Mapping[str, Sequence[Any]], key: str, row: int) -> Any:
    """Return a value of a batch of columns; dots reach nested fields, also those stored as JSON text."""
    name, *inner = key.split(".")
    value: Any = batch[name][row]
    for field in inner:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        value = value.get(field) if isinstance(value, dict) else None
    return value


class Counts:
    """Documents, characters and UTF-8 bytes per source, and the rows of each source."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, int]] = {}
        self.rows: dict[str, array[int]] = {}  # 8 bytes per row

    def add(self, source: str, text: str, row: int) -> None:
        counts = self.values.setdefault(source, {"documents": 0, "characters": 0, "bytes": 0})
        counts["documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
        self.rows.setdefault(source, array("q")).append(row)


def count_rows(batches: Iterable[Mapping[str, Sequence[Any]]], key: str, source_key: str | None, label: str) -> Counts:
    """Return the counts of batches of columns. Raise DataError for a document without text."""
    counts, row = Counts(), 0
    for batch in batches:
        for index, text in enumerate(batch[key]):
            if not isinstance(text, str):
                raise DataError(f"{label}: row {row} has {type(text).__name__} in column {key}, expected text")
            source = ONE_SOURCE if source_key is None else source_name(column_value(batch, source_key, index))
            counts.add(source, text, row)
            row += 1
    if row == 0:
        raise DataError(f"{label}: no documents")
    return counts


# ---------------------------------------------------------------------------------------------------------- save
def load_split(args: argparse.Namespace, split: str) -> Any:
    """Return a `datasets.Dataset` with the documents of a split.

    Raises:
        ConfigError: a data set, configuration or split that does not exist, or that cannot be reached.
    """
    import datasets

    label = f"--dataset {args.dataset}, split {split}"
    try:
        if not args.streaming:
            return datasets.load_dataset(args.dataset, args.subset, split=split, revision=args.revision)
        match = _SLICE.fullmatch(split)
        if match is None:
            raise ConfigError(f"--streaming: found split {split!r}, expected a slice by numbers, such as train[:2000]")
        start, end = int(match["start"] or 0), int(match["end"])
        stream = datasets.load_dataset(
            args.dataset, args.subset, split=match["split"], revision=args.revision, streaming=True
        )
        return datasets.Dataset.from_list(list(stream.skip(start).take(end - start)))
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{label}: cannot be loaded ({reason}); check the names and the network, or use --offline of the pipeline"
        ) from error


def check_columns(data: Any, args: argparse.Namespace, split: str) -> None:
    """Raise ConfigError if a column is missing."""
    wanted = {"--key": args.key, "--source-key": (args.source_key or args.key).partition(".")[0]}
    for flag, name in wanted.items():
        if name not in data.column_names:
            raise ConfigError(f"{flag}: {args.dataset}, split {split} has no column {name}: found {data.column_names}")


def save_split(args: argparse.Namespace, name: str, split: str) -> dict[str, dict[str, int]]:
    """Write the data sets of a split and its counts. The folder appears when it is complete."""
    folder = Path(args.output) / name
    if (folder / COUNTS_FILE).exists():
        print(f"{folder}: already saved")
        return read_counts(folder)["sources"]
    data = load_split(args, split)
    check_columns(data, args, split)
    counts = count_rows(data.iter(_BATCH), args.key, args.source_key, f"{args.dataset}, split {split}")
    incomplete = folder.with_name(f"{name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)  # left by an interrupted call
    for source, rows in counts.rows.items():
        part = data if len(counts.rows) == 1 else data.select(rows)
        part.save_to_disk(str(incomplete / source))
    origin = {"dataset": args.dataset, "subset": args.subset, "revision": args.revision, "split": split}
    content = {**origin, "key": args.key, "source_key": args.source_key, "sources": counts.values}
    storage.write_text(incomplete / COUNTS_FILE, to_json(content, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(incomplete, folder)
    return counts.values


def save(args: argparse.Namespace) -> None:
    splits = dict(split_setting(text) for text in args.split)
    for name, split in splits.items():
        print_counts(f"{args.output}/{name} ({split})", save_split(args, name, split))


def split_setting(text: str) -> tuple[str, str]:
    name, sign, split = text.partition("=")
    if not sign or not split or source_name(name) != name:
        raise ConfigError(f"--split {text}: expected NAME=SPLIT, such as train=train[:10%]")
    return name, split


# --------------------------------------------------------------------------------------------------------- count
def read_counts(folder: Path) -> dict[str, Any]:
    """Return the content of sources.json."""
    path = folder / COUNTS_FILE
    if not path.exists():
        raise ConfigError(f"{path}: not found; expected a folder that `text.py save` has written")
    try:
        content = json.loads(storage.read_text(path))
        return {"sources": dict(content["sources"]), **content}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the counts of `text.py save` ({error}); delete {folder}") from error


def saved_batches(path: Path) -> Iterator[Mapping[str, Sequence[Any]]]:
    """Yield batches of columns of a data set that `save_to_disk` has written."""
    import datasets

    try:
        yield from datasets.load_from_disk(str(path)).iter(_BATCH)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a complete data set of save_to_disk ({error}); save it again") from error


def count(args: argparse.Namespace) -> None:
    """Count the saved documents of splits. Raise DataError if the counts differ from those of `save`."""
    for folder in args.folders:
        content = read_counts(folder)
        actual: dict[str, dict[str, int]] = {}
        for source in content["sources"]:
            counts = count_rows(saved_batches(folder / source), content["key"], None, str(folder / source))
            actual[source] = counts.values[ONE_SOURCE]
        print_counts(str(folder), actual)
        if actual != content["sources"]:
            raise DataError(f"{folder}: {COUNTS_FILE} has other counts ({content['sources']}); save it again")


def print_counts(title: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    total = sum(values["bytes"] for values in counts.values())
    rows = sorted(counts.items(), key=lambda item: -item[1]["bytes"])
    width = max(len(name) for name in (*counts, "source"))
    print(f"{title}\n  {'source':<{width}}  {'documents':>12}  {'characters':>16}  {'bytes':>16}  share")
    for name, values in rows:
        numbers = f"{values['documents']:>12,}  {values['characters']:>16,}  {values['bytes']:>16,}"
        print(f"  {name:<{width}}  {numbers}  {100 * values['bytes'] / max(total, 1):4.1f} %")


def build_parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="text.py", description=description, epilog=epilog, formatter_class=style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    saving = commands.add_parser("save", help="fetch and save text")
    add = saving.add_argument
    add("--dataset", type=user_path, required=True, help="name on the Hugging Face hub, or local folder of data files")
    add("--subset", metavar="NAME", help="subset on the hub, such as sample-10BT")
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    add("--split", action="append", required=True, metavar="NAME=SPLIT", help="split or slice to save; repeatable")
    add("--key", default="text", help="column with the text (default: %(default)s)")
    add("--source-key", metavar="COLUMN", help="column with a document's source; dots reach nested fields")
    add("--streaming", action="store_true", help="fetch only the documents of the slices")
    add("--output", type=user_path, required=True, help="folder to write")
    saving.set_defaults(call=save)
    counting = commands.add_parser("count", help="count the saved documents of each source")
    counting.add_argument("folders", type=user_file, nargs="+", metavar="FOLDER", help="folders of saved splits")
    counting.set_defaults(call=count)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
