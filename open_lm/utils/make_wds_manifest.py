"""Write the manifest.jsonl of a folder of shards: sequences, tokens, bytes and checksum of every shard.

python -m open_lm.utils.make_wds_manifest --data-dir s3://bucket/tokenized/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_lm.errors import DataError, join_problems, run_cli
from open_lm.system.names import user_path
from open_lm.system.program import program_name

if TYPE_CHECKING:
    from open_lm.data.shard_format import ManifestEntry
    from open_lm.utils.shard_survey import ShardSurvey


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=program_name("make_wds_manifest"), description=description)
    parser.add_argument("--data-dir", type=user_path, required=True, help="folder of shards, local or s3://…")
    parser.add_argument("--manifest-filename", default="manifest.jsonl", help="name of the manifest in that folder")
    parser.add_argument("--num-workers", type=int, default=2, help="number of shards to read in parallel (default: 2)")
    parser.add_argument(
        "--tmp-dir",
        type=user_path,
        help="folder for temporary copies of remote shards (default: the system's temporary folder)",
    )
    return parser


def manifest_entry(survey: ShardSurvey, old: ManifestEntry | None = None, source: str | None = None) -> ManifestEntry:
    """Return the manifest line of a surveyed shard.

    `source` is the source of its data set if there is only one. If the shard has not changed since the `old` line was
    written (equal sha256), the line's additional keys are kept. A shard with broken members gets no token count.
    """
    from open_lm.data.shard_format import ManifestEntry, shard_stem

    measured: dict[str, Any] = {"num_bytes": survey.num_bytes, "sha256": survey.sha256, **survey.block_sums}
    if not survey.bad_members:
        measured = {"num_tokens": survey.num_tokens, **measured}
    sources = {"sources": {source: survey.num_tokens}} if source is not None and not survey.bad_members else {}
    kept = old.extra if old is not None and old.extra.get("sha256") == survey.sha256 else {}
    extra = measured | {key: value for key, value in (sources | kept).items() if key not in ("num_tokens", *measured)}
    return ManifestEntry(shard_stem(survey.url), survey.num_sequences, extra)


def write_entries(
    url: str,
    surveys: Sequence[ShardSurvey],
    old: Mapping[str, ManifestEntry] | None = None,
    source: str | None = None,
) -> list[ManifestEntry]:
    """Write the manifest `url` and return its entries.

    Broken members of a readable shard count as sequences, as in training.

    Raises:
        DataError: lists all unusable shards; nothing is written.
    """
    from open_lm.data.shard_format import shard_stem, write_manifest

    if faults := [survey.fault for survey in surveys if survey.fault]:
        raise DataError(join_problems(faults, "No manifest was written: some shards are unusable"))
    entries = [manifest_entry(survey, (old or {}).get(shard_stem(survey.url)), source) for survey in surveys]
    write_manifest(url, entries)
    return entries


def changes(old: Mapping[str, ManifestEntry] | None, entries: Sequence[ManifestEntry]) -> list[str]:
    """Return the differences between the old and the new manifest, by shard."""
    if old is None:
        return ["there was no manifest before"]
    new = {entry.shard: entry for entry in entries}
    lines = [f"{shard}: removed" for shard in old if shard not in new]
    added: dict[str, int] = {}
    for shard, entry in new.items():
        if shard not in old:
            lines.append(f"{shard}: added")
            continue
        before = {"num_sequences": old[shard].num_sequences, **old[shard].extra}
        after = {"num_sequences": entry.num_sequences, **entry.extra}
        for name in after.keys() - before.keys():
            added[name] = added.get(name, 0) + 1
        for name in sorted(before):
            if name not in after:
                lines.append(f"{shard}: {name} removed, was {_formatted(before[name])}")
            elif after[name] != before[name]:
                lines.append(f"{shard}: {name} {_formatted(before[name])} -> {_formatted(after[name])}")
    lines += [f"{name} added to {count:,} shards" for name, count in sorted(added.items())]
    return lines or ["no changes"]


def _formatted(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_manifest(data_dir: str, filename: str = "manifest.jsonl", workers: int = 2, tmp_dir: str | None = None) -> int:
    """Write the manifest of a folder and return its number of sequences. Report broken members on standard error.

    Raises:
        DataError: lists all unusable shards.
    """
    from open_lm import storage
    from open_lm.data.manifest import compressed_note
    from open_lm.utils.data_sets import find_data_sets, folders_in
    from open_lm.utils.shard_survey import survey_shards

    folder = next(iter(folders_in(data_dir, recursive=False)), None)
    if folder is None or not folder.shards:
        note = compressed_note(storage.glob(storage.join(data_dir, "*")))
        raise DataError(f"--data-dir {data_dir}: no .tar file in this folder{note}")
    data_sets, problems = find_data_sets([folder])
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    surveys = survey_shards(list(folder.shards), list(folder.shards.values()), workers=workers, tmp_dir=tmp_dir)
    for survey in surveys:
        if survey.num_ignored:
            note = f"{survey.num_ignored:,} members are not of the kind of its sequences ({', '.join(survey.kinds)})"
            print(f"warning: {survey.url}: {note} and are not counted", file=sys.stderr, flush=True)
        if survey.bad_members:
            examples = "; ".join(survey.bad_examples)
            print(f"warning: {survey.bad_members:,} members cannot be read: {examples}", file=sys.stderr, flush=True)
    source = data_sets[0].single_source if data_sets else None
    entries = write_entries(storage.join(data_dir, filename), surveys, folder.entries, source)
    return sum(entry.num_sequences for entry in entries)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    from open_lm import storage

    args = make_parser().parse_args(argv)
    total = make_manifest(args.data_dir, args.manifest_filename, args.num_workers, args.tmp_dir)
    print(f"{storage.join(args.data_dir, args.manifest_filename)}: {total:,} sequences")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
