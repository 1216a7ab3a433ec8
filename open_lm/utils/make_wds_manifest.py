"""Make the manifest.jsonl of a folder of shards that has none: sequences, tokens, bytes and checksum of every shard.

python -m open_lm.utils.make_wds_manifest --data-dir s3://bucket/tokenized/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_lm.errors import DataError, join_problems, run_cli

if TYPE_CHECKING:
    from open_lm.data.shard_format import ManifestEntry
    from open_lm.utils.shard_survey import ShardSurvey


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="make_wds_manifest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of shards, local or s3://…")
    parser.add_argument("--manifest-filename", default="manifest.jsonl", help="name of the file made in that folder")
    parser.add_argument("--num-workers", type=int, default=2, help="shards looked through at a time (default: 2)")
    parser.add_argument("--tmp-dir", help="folder for a copy of each remote shard (default: the system's)")
    return parser


def manifest_entry(survey: ShardSurvey, old: ManifestEntry | None = None, source: str | None = None) -> ManifestEntry:
    """The manifest's line of a shard that was looked through.

    `source` is the only one of its data set, if it has but one. Where the shard is still the one of the `old` line
    (equal sha256), what else that line says is kept. A shard with broken members gets no count of tokens.
    """
    from open_lm.data.shard_format import ManifestEntry, shard_stem

    known: dict[str, Any] = {"num_bytes": survey.num_bytes, "sha256": survey.sha256}
    if not survey.bad_members:
        known = {"num_tokens": survey.num_tokens, **known}
    told = {"sources": {source: survey.num_tokens}} if source is not None and not survey.bad_members else {}
    kept = old.extra if old is not None and old.extra.get("sha256") == survey.sha256 else {}
    extra = known | {key: value for key, value in (told | kept).items() if key not in ("num_tokens", *known)}
    return ManifestEntry(shard_stem(survey.url), survey.num_sequences, extra)


def write_entries(
    url: str,
    surveys: Sequence[ShardSurvey],
    old: Mapping[str, ManifestEntry] | None = None,
    source: str | None = None,
) -> list[ManifestEntry]:
    """Write the manifest `url` whole; returns its entries. DataError lists every broken shard, then nothing is written.

    Broken members in a shard that is whole count as sequences, as in training.
    """
    from open_lm.data.shard_format import shard_stem, write_manifest

    if faults := [survey.fault for survey in surveys if survey.fault]:
        raise DataError(join_problems(faults, "No manifest was written: some shards cannot be used"))
    entries = [manifest_entry(survey, (old or {}).get(shard_stem(survey.url)), source) for survey in surveys]
    write_manifest(url, entries)
    return entries


def changes(old: Mapping[str, ManifestEntry] | None, entries: Sequence[ManifestEntry]) -> list[str]:
    """What a new manifest says otherwise than the old one, shard by shard."""
    if old is None:
        return ["there was none before"]
    new = {entry.shard: entry for entry in entries}
    lines = [f"{shard}: no longer there" for shard in old if shard not in new]
    gained: dict[str, int] = {}
    for shard, entry in new.items():
        if shard not in old:
            lines.append(f"{shard}: new")
            continue
        before = {"num_sequences": old[shard].num_sequences, **old[shard].extra}
        after = {"num_sequences": entry.num_sequences, **entry.extra}
        for name in after.keys() - before.keys():
            gained[name] = gained.get(name, 0) + 1
        for name in sorted(before):
            if name not in after:
                lines.append(f"{shard}: {name} left out, was {_shown(before[name])}")
            elif after[name] != before[name]:
                lines.append(f"{shard}: {name} {_shown(before[name])} -> {_shown(after[name])}")
    lines += [f"{name} added to {count:,} shards" for name, count in sorted(gained.items())]
    return lines or ["nothing changed"]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_manifest(data_dir: str, filename: str = "manifest.jsonl", workers: int = 2, tmp_dir: str | None = None) -> int:
    """Write the manifest of a folder; returns the number of sequences. DataError lists every broken shard.

    Broken members are told on standard error.
    """
    from open_lm import storage
    from open_lm.utils.data_sets import find_data_sets, folders_in
    from open_lm.utils.shard_survey import survey_shards

    folder = next(iter(folders_in(data_dir, recursive=False)), None)
    if folder is None or not folder.shards:
        raise DataError(f"--data-dir {data_dir}: no .tar file in this folder")
    data_sets, problems = find_data_sets([folder])
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    surveys = survey_shards(list(folder.shards), list(folder.shards.values()), workers=workers, tmp_dir=tmp_dir)
    for survey in surveys:
        if survey.bad_members:
            found = "; ".join(survey.bad_shown)
            print(f"warning: {survey.bad_members:,} members cannot be read: {found}", file=sys.stderr, flush=True)
    source = data_sets[0].only_source if data_sets else None
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
