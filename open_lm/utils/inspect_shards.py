"""Describe a data set of token shards, show decoded samples, verify it, or rewrite its manifests.

python -m open_lm.utils.inspect_shards preproc_data --samples 2
python -m open_lm.utils.inspect_shards s3://bucket/tokenized/ --verify

The exit code is 1 for problems with the data, and 2 for an invalid command line.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_lm.errors import ConfigError, DataError, join_problems, run_cli
from open_lm.system.cpus import available_cpus
from open_lm.system.names import shard_pattern, unescape, user_path
from open_lm.system.program import program_name

if TYPE_CHECKING:
    from open_lm.tokenizer import Tokenizer
    from open_lm.utils.data_sets import DataSet, Folder
    from open_lm.utils.shard_survey import ShardSurvey

DEFAULT_SAMPLE_SHARDS = 4


class BrokenDataSet(DataError):
    """Problems found in the inspected data."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("inspect_shards"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "paths",
        type=shard_pattern,
        nargs="+",
        metavar="FOLDER_OR_PATTERN",
        help="folders (searched recursively), manifests or shard patterns such as 'FOLDER/*.tar', local or s3://…",
    )
    add("--samples", type=int, default=0, metavar="N", help="show N random sequences (default: 0)")
    add("--seed", type=int, default=0, help="seed of the random sequences and shards (default: 0)")
    add(
        "--tokenizer",
        type=user_path,
        help="tokenizer to decode samples (default: the one of the data set; without one, show ids)",
    )
    add(
        "--sample-shards",
        default=str(DEFAULT_SAMPLE_SHARDS),
        metavar="K",
        help="measure document lengths and used token ids in K random shards, or in 'all' "
        f"(default: {DEFAULT_SAMPLE_SHARDS})",
    )
    act = parser.add_mutually_exclusive_group()
    act.add_argument(
        "--verify",
        action="store_true",
        help="read every shard; compare it with its manifest, and the totals with dataset.json",
    )
    act.add_argument(
        "--make-manifest", action="store_true", help="read every shard, rewrite manifest.jsonl and list the changes"
    )
    add(
        "--num-workers",
        type=int,
        default=available_cpus(),
        help="number of shards to read in parallel (default: the number of CPU cores, here %(default)s)",
    )
    add(
        "--tmp-dir",
        type=user_path,
        help="folder for temporary copies of remote shards (default: the system's temporary folder)",
    )
    add("--json", action="store_true", help="print the report as one JSON object")
    return parser  # fmt: skip


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Return the report that the options request, as JSON-serializable values.

    Raises:
        ConfigError: invalid options.
    """
    from open_lm.utils import data_set_checks as checks
    from open_lm.utils.data_sets import find_data_sets, find_folders

    number = _shards_to_read(args)
    folders = find_folders(args.paths)
    if args.make_manifest and any(folder.partial for folder in folders):
        raise ConfigError("--make-manifest needs complete folders; pass the folder instead of a pattern of shards")
    data_sets, problems = find_data_sets(folders)
    tokenizer, notes = _find_tokenizer(args, data_sets)
    surveys = _survey(args, folders, data_sets, tokenizer, number)
    written = _make_manifests(folders, data_sets, surveys) if args.make_manifest else []
    described = {folder.url: data_set for data_set in data_sets for folder in data_set.folders}
    vocab_size = tokenizer.vocab_size if tokenizer else None
    for folder in folders:
        problems += checks.folder_problems(folder, described.get(folder.url), surveys, vocab_size)
    for data_set in data_sets:
        problems += checks.total_problems(data_set, surveys)
    samples = list(_samples(args, folders, described, surveys, tokenizer))
    problems += [sample["problem"] for sample in samples if "problem" in sample and sample["problem"] not in problems]
    rows = [_folder_facts(folder, surveys) for folder in folders]
    if without_tokens := sum(row["tokens"] is None for row in rows):
        notes.append(f"the manifests of {without_tokens:,} folders have no token counts; --make-manifest adds them")
    read = [surveys[url] for folder in folders for url in folder.shards if url in surveys]
    complete = [survey for survey in read if not survey.fault]
    shards = sum(len(folder.shards) for folder in folders)
    vocabularies = {checks.vocab_size_of(described.get(folder.url), vocab_size) for folder in folders}
    eot_known = all(_eot_id(described.get(folder.url), tokenizer) is not None for folder in folders)
    if complete and not eot_known:
        notes.append("document lengths were not measured: the end-of-text id is unknown; pass --tokenizer")
    return {
        "folders": rows,
        "total": {key: _total([row[key] for row in rows]) for key in ("shards", "sequences", "tokens", "bytes")},
        "data_sets": [_data_set_facts(data_set) for data_set in data_sets],
        "sources": _source_facts(folders, data_sets),
        "members": _member_facts(complete, shards, max(vocabularies, key=lambda size: size or 0)),
        "documents": _document_facts(complete, shards) if eot_known else None,
        "samples": samples,
        "verified": {
            "shards": len(read), "sequences": sum(survey.num_sequences for survey in read),
            "bytes": sum(survey.num_bytes for survey in read),
            "unchecked": checks.unchecked(folders, data_sets, vocab_size),
        } if args.verify else None,
        "manifests": written,
        "notes": notes,
        "problems": problems,
    }  # fmt: skip


def _shards_to_read(args: argparse.Namespace) -> int | None:
    """Return --sample-shards as a number, None for all. Raise ConfigError for invalid options."""
    problems = []
    if args.samples < 0:
        problems.append(f"--samples must be at least 0, found {args.samples}")
    if args.num_workers < 1:
        problems.append(f"--num-workers must be at least 1, found {args.num_workers}")
    if args.sample_shards != "all" and not args.sample_shards.isdecimal():
        problems.append(f"--sample-shards must be a number or all, found {args.sample_shards!r}")
    if problems:
        raise ConfigError(join_problems(problems))
    return None if args.sample_shards == "all" else int(args.sample_shards)


def _find_tokenizer(args: argparse.Namespace, data_sets: Sequence[DataSet]) -> tuple[Tokenizer | None, list[str]]:
    """Return the tokenizer and notes about it. Only a tokenizer from dataset.json may be missing."""
    named = [data_set.settings for data_set in data_sets if data_set.settings.get("tokenizer")]
    specs = {unescape(str(settings["tokenizer"])) for settings in named}
    if not (args.tokenizer or args.samples):
        return None, []
    from open_lm.utils.data_sets import copied_tokenizer

    if not args.tokenizer and (copy := copied_tokenizer(data_sets)) is not None:
        return copy, []
    if not args.tokenizer and len(specs) != 1:
        reason = f"the data sets have several ({', '.join(sorted(specs))})" if specs else "no dataset.json names one"
        return None, [f"samples are shown as token ids, because the tokenizer is unknown: {reason}; pass --tokenizer"]
    from open_lm.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(args.tokenizer or next(iter(specs)))
    except ConfigError as error:
        if args.tokenizer:
            raise
        return None, [f"samples are shown as token ids: {error}"]
    recorded = {settings.get("tokenizer_fingerprint", tokenizer.fingerprint) for settings in named}
    if recorded <= {tokenizer.fingerprint}:
        return tokenizer, []
    expected = ", ".join(sorted(f"{str(fingerprint)[:12]}…" for fingerprint in recorded))
    return tokenizer, [
        f"the tokenizer {tokenizer.name} is not the one that tokenized the data: its fingerprint is "
        f"{tokenizer.fingerprint[:12]}…, expected {expected} by dataset.json; decoded text may be wrong"
    ]


def _eot_id(data_set: DataSet | None, tokenizer: Tokenizer | None) -> int | None:
    """Return the end-of-text id: from the data set's record, else from the tokenizer, else None."""
    eot_id = data_set.settings.get("eot_id") if data_set else None
    return eot_id if isinstance(eot_id, int) else tokenizer.eot_id if tokenizer else None


def _survey(
    args: argparse.Namespace, folders: Sequence[Folder], data_sets: Sequence[DataSet], tokenizer: Tokenizer | None,
    number: int | None,
) -> dict[str, ShardSurvey]:  # fmt: skip
    """Return surveys by shard URL: of all shards, or of those without a manifest and of `number` random ones."""
    import random

    from open_lm.utils.shard_survey import survey_shards

    sizes = {url: size for folder in folders for url, size in folder.shards.items()}
    selected = {url for folder in folders if folder.entries is None for url in folder.shards}
    if args.verify or args.make_manifest or number is None:
        selected = set(sizes)
    else:
        selected.update(random.Random(args.seed).sample(list(sizes), min(number, len(sizes))))
    described = {folder.url: data_set for data_set in data_sets for folder in data_set.folders}
    by_eot: dict[int | None, list[str]] = {}
    for folder in folders:
        urls = by_eot.setdefault(_eot_id(described.get(folder.url), tokenizer), [])
        urls += [url for url in folder.shards if url in selected]
    surveys: dict[str, ShardSurvey] = {}
    for eot_id, urls in by_eot.items():
        results = survey_shards(
            urls, [sizes[url] for url in urls], workers=args.num_workers, eot_id=eot_id, tmp_dir=args.tmp_dir
        )
        surveys |= dict(zip(urls, results, strict=True))
    return surveys


def _make_manifests(
    folders: Sequence[Folder], data_sets: Sequence[DataSet], surveys: Mapping[str, ShardSurvey]
) -> list[dict[str, Any]]:
    """Rewrite the manifests of all folders and update `folders`. If any shard is broken, write no manifest at all."""
    from open_lm import storage
    from open_lm.data.manifest import MANIFEST_NAME
    from open_lm.utils.make_wds_manifest import changes, write_entries

    sources = {folder.url: data_set.single_source for data_set in data_sets for folder in data_set.folders}
    if faults := [survey.fault for survey in surveys.values() if survey.fault]:
        raise BrokenDataSet(join_problems(faults, "No manifest was written: some shards are unusable"))
    written = []
    for folder in folders:
        if not folder.shards:
            raise DataError(f"{folder.url}: this folder has a {MANIFEST_NAME} but no shards; no manifest can be made")
        url, old = storage.join(folder.url, MANIFEST_NAME), folder.entries
        entries = write_entries(url, [surveys[shard] for shard in folder.shards], old, sources.get(folder.url))
        differences = [f"the old manifest was unusable: {folder.fault}"] if folder.fault else changes(old, entries)
        folder.entries, folder.fault = {entry.shard: entry for entry in entries}, ""
        total = sum(entry.num_sequences for entry in entries)
        written.append({"manifest": url, "shards": len(entries), "sequences": total, "changes": differences})
    return written


# --- the parts of the report -------------------------------------------------------------------------------------


def _samples(
    args: argparse.Namespace, folders: Sequence[Folder], described: Mapping[str, DataSet],
    surveys: Mapping[str, ShardSurvey], tokenizer: Tokenizer | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    from open_lm.utils.shard_samples import choose_positions, read_samples

    counts: dict[str, int] = {}
    eot_ids: dict[str, int | None] = {}
    for folder in folders:
        for url in folder.shards:
            source = surveys.get(url) or folder.entry(url)
            counts[url] = source.num_sequences if source else 0
            eot_ids[url] = _eot_id(described.get(folder.url), tokenizer)
    for url, positions in choose_positions(counts, args.samples, args.seed).items():
        yield from read_samples(url, positions, tokenizer, eot_ids[url], args.tmp_dir)


def _total(values: Sequence[int | None]) -> int | None:
    return None if None in values else sum(value for value in values if value is not None)


def _folder_facts(folder: Folder, surveys: Mapping[str, ShardSurvey]) -> dict[str, Any]:
    """Return shards, sequences, tokens and bytes of a folder: from its manifest, else from the surveys."""
    sequences, tokens = 0, []
    for url in folder.shards:
        entry, survey = folder.entry(url), surveys.get(url)
        counted = survey.num_tokens if survey and not survey.fault else None
        if entry is not None:
            sequences += entry.num_sequences
            num_tokens = entry.extra.get("num_tokens", counted)
            tokens.append(num_tokens if isinstance(num_tokens, int) else None)
        elif survey is not None:
            sequences += survey.num_sequences
            tokens.append(survey.num_tokens)
    sizes = [size if size >= 0 else None for size in folder.shards.values()]
    return {
        "folder": folder.url, "shards": len(folder.shards), "sequences": sequences, "tokens": _total(tokens),
        "bytes": _total(sizes), "manifest": "yes" if folder.entries is not None else "broken" if folder.fault else "no",
        "missing": folder.missing, "unlisted": folder.unlisted, "part": folder.partial,
    }  # fmt: skip


def _data_set_facts(data_set: DataSet) -> dict[str, Any]:
    from open_lm import storage
    from open_lm.utils.data_sets import REJECTS_NAME, as_dict

    record = data_set.record
    lists = {name: record[name] if isinstance(record.get(name), list) else []
             for name in ("inputs", "bad_documents_first", "broken_files")}  # fmt: skip
    sizes = [as_dict(item).get("num_bytes") for item in lists["inputs"]]
    parents = [*(folder.url for folder in data_set.folders if folder.has_rejects), data_set.root]
    rejects = next(filter(storage.exists, (storage.join(url, REJECTS_NAME) for url in parents)), None)
    return {
        "root": data_set.root, "whole": data_set.complete, "folders": [folder.url for folder in data_set.folders],
        "tool": as_dict(record.get("tool")), "settings": data_set.settings,
        "inputs": {"files": len(sizes), "bytes": _total([size if isinstance(size, int) else None for size in sizes])},
        "counts": as_dict(record.get("counts")), "tail": as_dict(record.get("tail")), "mixture": record.get("mixture"),
        "bad_documents": as_dict(record.get("bad_documents")), "bad_documents_first": lists["bad_documents_first"],
        "broken_files": lists["broken_files"], "rejects": rejects,
    }  # fmt: skip


def _source_facts(folders: Sequence[Folder], data_sets: Sequence[DataSet]) -> dict[str, Any] | None:
    """Return tokens by source: from the manifests if all lines have sources, else from complete data sets' records."""
    from open_lm.utils.data_sets import as_dict

    tokens: Counter[str] = Counter()
    lines = [folder.entry(url) for folder in folders for url in folder.shards]
    tables = [as_dict(line.extra.get("sources")) if line else {} for line in lines]
    origin = "manifest.jsonl"
    if not tables or not all(tables):
        origin = "dataset.json"
        tables = [
            {name: as_dict(source).get("tokens") for name, source in as_dict(data_set.record.get("sources")).items()}
            for data_set in data_sets if data_set.complete
        ]  # fmt: skip
    for table in tables:
        tokens.update({name: number for name, number in table.items() if isinstance(number, int)})
    total = sum(tokens.values())
    if not total:
        return None
    shares = {name: {"tokens": number, "share": number / total} for name, number in tokens.most_common()}
    return {"from": origin, "shares": shares}


def _member_facts(surveys: Sequence[ShardSurvey], shards: int, vocab_size: int | None) -> dict[str, Any] | None:
    import numpy as np

    if not surveys:
        return None
    kinds: Counter[str] = sum((survey.kinds for survey in surveys), Counter())
    lengths: Counter[int] = sum((survey.lengths for survey in surveys), Counter())
    largest = [survey.max_id for survey in surveys if survey.max_id is not None]
    return {
        "shards_read": len(surveys), "shards": shards, "sequences": sum(survey.num_sequences for survey in surveys),
        "kinds": dict(kinds), "lengths": {str(length): number for length, number in lengths.most_common()},
        "pads": sum(survey.num_pads for survey in surveys), "vocab_size": vocab_size,
        "distinct_ids": len(np.unique(np.concatenate([survey.used_ids for survey in surveys]))),
        "largest_id": max(largest, default=None),
    }  # fmt: skip


def _document_facts(surveys: Sequence[ShardSurvey], shards: int) -> dict[str, Any] | None:
    bins: Counter[int] = sum((survey.piece_bins for survey in surveys), Counter())
    if not bins:
        return None
    pieces = sum(bins.values())
    return {
        "shards_read": len(surveys), "shards": shards, "pieces": pieces,
        "ended": sum(survey.ended_pieces for survey in surveys),
        "mean": sum(survey.num_tokens for survey in surveys) / pieces,
        "longest": max(survey.longest_piece for survey in surveys),
        "histogram": {str(1 << number): bins[number] for number in range(min(bins), max(bins) + 1)},
    }  # fmt: skip


# --- the command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report. Raise BrokenDataSet with all problems of the data."""
    args = make_parser().parse_args(argv)
    from open_lm.storage.strict_json import to_json
    from open_lm.utils.inspect_text import render

    facts = inspect(args)
    print(to_json(facts, indent=2, ensure_ascii=False) if args.json else render(facts), flush=True)
    if facts["problems"]:
        raise BrokenDataSet(join_problems(facts["problems"], "The data set has problems"))


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    broken = False

    def run(arguments: list[str]) -> None:
        nonlocal broken
        try:
            main(arguments)
        except BrokenDataSet:
            broken = True
            raise

    code = run_cli(run, argv)
    return 1 if broken else code


if __name__ == "__main__":
    sys.exit(command())
