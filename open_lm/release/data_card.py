"""Write DATA_CARD.md and data/README.md: the origin, composition and preprocessing of a run's data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm import storage
from open_lm.release import components, layout, reproduce
from open_lm.release.context import Context
from open_lm.release.datasets import DataFolder
from open_lm.release.markdown import bullets, code_block, escape, facts_table, table

_COUNTS = {
    "documents": "documents", "characters": "characters", "tokens": "tokens", "sequences": "sequences",
    "shards": "shards", "bytes": "bytes of shards", "pads": "padding ids", "bad_documents": "rejected documents",
    "special_token_documents": "documents with the text of special tokens",
}  # fmt: skip
_SETTINGS = (
    "seq_len", "vocab_size", "eot_id", "bos_id", "content_key", "separator", "shuffle", "seed", "split_documents",
    "drop_tail", "special_tokens_in_text", "tokenizer_fingerprint",
)  # fmt: skip
_MAX_INPUTS = 50


def write_data_card(context: Context, evaluation_problems: Sequence[str]) -> None:
    """Write DATA_CARD.md. `evaluation_problems` are the evaluation data that the bundle lacks, with reasons."""
    sections = [
        f"# Data of {escape(context.name)}\n",
        _licenses(context),
        "## Mixture\n",
        _mixture(context),
        *(_folder(context, folder) for folder in context.folders),
        "## Evaluation data\n",
        _evaluation_data(context, evaluation_problems),
        "## Limits\n",
        bullets(_limits(context)),
    ]
    storage.write_text(context.bundle / layout.DATA_CARD, "\n".join(sections))


def _licenses(context: Context) -> str:
    license_id = context.license_of(components.DATASETS)
    return (
        f"The records in this bundle (manifests, settings, checksums) have the license {license_id}. That covers the "
        "texts themselves only as far as their authors permit it: check the licenses of the raw files.\n"
    )


def _mixture(context: Context) -> str:
    if not context.run.sources:
        return "The run recorded no sources of its training data.\n"
    rows = [
        [
            context.redactor.text(source.name),
            "" if source.planned_share is None else f"{100 * source.planned_share:.2f} %",
            "" if source.seen_tokens is None else f"{source.seen_tokens:,}",
            "" if source.stored_tokens is None else f"{source.stored_tokens:,}",
            "" if source.passes is None else f"{source.passes:.3g}",
        ]
        for source in context.run.sources
    ]
    return table(("source", "planned share", "tokens seen", "tokens stored", "passes"), rows)


def _folder(context: Context, folder: DataFolder) -> str:
    title = f"## Data set {folder.number}\n"
    source = context.redactor.text(str(folder.source["name"]))
    text = f"Of the source `{source}`; fingerprint `{folder.source['fingerprint']}`.\n"
    if folder.record is None:
        return f"{title}\n{text}\nIts folder has no readable dataset.json, so its origin is unknown.\n"
    settings, counts = folder.record["settings"], folder.record.get("counts", {})
    parts = [title, text, facts_table((label, f"{counts[key]:,}") for key, label in _COUNTS.items() if key in counts)]
    parts += ["### Origin\n", _inputs(context, folder.record)]
    if len(folder.record.get("sources", {})) > 1:
        rows = [
            [name, *(f"{item.get(key, 0):,}" for key in ("files", "documents", "tokens"))]
            for name, item in folder.record["sources"].items()
        ]
        parts.append(table(("part", "files", "documents", "tokens"), rows))
    parts += ["### Preprocessing\n", facts_table((key, str(settings[key])) for key in _SETTINGS if key in settings)]
    if rejected := folder.record.get("bad_documents"):
        parts.append(
            "Rejected documents: " + ", ".join(f"{count:,} {kind}" for kind, count in rejected.items()) + ".\n"
        )
    return "\n".join(parts)


def _inputs(context: Context, record: Mapping[str, Any]) -> str:
    inputs = record.get("inputs") or []
    if not inputs:
        return "dataset.json lists no raw files.\n"
    shown = inputs[:_MAX_INPUTS]
    rows = [
        [context.redactor.text(item["url"]).rpartition("/")[2], f"{item['num_bytes']:,}",
         item.get("sha256") or f"of pieces: {item.get('sha256_of_pieces', 'unknown')}"]
        for item in shown
    ]  # fmt: skip
    rest = f"\nand {len(inputs) - len(shown):,} more in dataset.json.\n" if len(inputs) > len(shown) else ""
    return table(("raw file", "bytes", "SHA-256"), rows) + rest


def _evaluation_data(context: Context, problems: Sequence[str]) -> str:
    folder = context.bundle / layout.EVALUATION_DATA
    tasks = sorted(path.name for path in (folder / "tasks").glob("*.jsonl"))
    sets = sorted(path.name for path in (folder / "validation").glob("*"))
    items = [f"`{layout.EVALUATION_DATA}/tasks`: {', '.join(tasks)}"] if tasks else []
    patterns = context.facts.setting("val_data") or []
    items += [
        f"`{layout.EVALUATION_DATA}/validation/{number:02}`: `{context.redactor.text(pattern)}`"
        for number, pattern in enumerate(patterns, start=1)
        if f"{number:02}" in sets
    ]
    items += [f"not included: {escape(context.redactor.text(problem))}" for problem in problems]
    if not items:
        return "The run used no evaluation data.\n"
    return bullets(items) + "\nTasks and texts of others keep the licenses of their authors.\n"


def _limits(context: Context) -> list[str]:
    items = ["No filter for personal data, harmful content or text of the evaluation tasks is recorded in these files."]
    if any(folder.record is not None and folder.record.get("bad_documents") for folder in context.folders):
        items.append("Documents that could not be read were left out, see above.")
    return items


# ------------------------------------------------------------------------------------------------------- instructions
def write_instructions(context: Context) -> bool:
    """Write data/README.md; return whether each data set is in the bundle or can be rebuilt and compared."""
    complete = bool(context.folders)
    parts = [
        f"# Training data of {escape(context.name)}\n",
        "Each folder has the manifest of the shards, with their SHA-256, and dataset.json, which records the raw files "
        "with checksums and all settings. The commands need the code in "
        f"`{layout.ARCHIVE}`; `{layout.REPRODUCE}` runs them, if the bundle has it.\n",
    ]
    for folder in context.folders:
        reason = reproduce.raw_obstacle(folder)
        complete = complete and (folder.included or reason is None)
        parts.append(f"## {folder.place}\n")
        if folder.included:
            parts.append("The shards are in the folder.\n")
        if reason is not None:
            parts.append(f"Instructions that make these shards from raw text are not available: {reason}.\n")
            continue
        command = reproduce.preprocessing(folder)
        text = f"python -m {command.module} {shlex.join(command.flags)} \\\n    {command.input_words('HERE')} "
        text += f"{command.output_flag} shards --tokenizer HERE/tokenizer"
        parts += [
            f"Get the raw files that dataset.json lists, check their SHA-256, and run this in their folder, with the "
            f"path of {folder.place} for HERE:\n",
            code_block(text),
        ]
        parts.append("Then compare manifest.jsonl of the new shards with the one here: they must be equal.\n")
    if not context.folders:
        parts.append("The run recorded no training data.\n")
    storage.write_text(context.bundle / layout.DATA / "README.md", "\n".join(parts))
    return complete
