"""The facts about a data set as plain text of at most 100 columns."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
_BAR, _NAME, _LABEL = 30, 36, 16
_MAX_LISTED = 5


def size(num_bytes: int | None) -> str:
    """Bytes with the unit that suits them (powers of 1000)."""
    if num_bytes is None:
        return "?"
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def count(value: Any) -> str:
    """A number with thousands separators; "?" for one that is not known."""
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else "?"


def shortened(text: str, width: int) -> str:
    """Text whose middle is left out where it is too long."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def bar(share: float) -> str:
    """A share of one as a bar; whatever is there is at least a thin mark."""
    return "#" * round(share * _BAR) or ("." if share else "")


def labelled(label: str, text: str) -> str:
    """A line of a list of facts, continued below its own text."""
    return textwrap.fill(
        text, WIDTH, initial_indent=f"  {label:<{_LABEL}}", subsequent_indent=" " * (_LABEL + 2), break_on_hyphens=False
    )


def visible(text: str) -> str:
    """Text without characters that would act on a terminal: they are shown as escapes."""
    plain = text.expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in plain)


def render(facts: Mapping[str, Any]) -> str:
    """All facts, one paragraph for each sort."""
    paragraphs = [_folders(facts["folders"], facts["total"])]
    paragraphs += [_data_set(item) for item in facts["data_sets"]]
    for name, show in (("sources", _sources), ("members", _members), ("documents", _documents)):
        if facts[name]:
            paragraphs.append(show(facts[name]))
    paragraphs += [_sample(sample) for sample in facts["samples"] if "problem" not in sample]
    if facts["verified"]:
        paragraphs.append(_verified(facts["verified"], len(facts["problems"])))
    if facts["manifests"]:
        paragraphs.append("\n".join(_manifest(item) for item in facts["manifests"]))
    if facts["notes"]:
        paragraphs.append(_items("Notes", facts["notes"]))
    return "\n\n".join(paragraphs)


def _items(heading: str, items: Sequence[str]) -> str:
    wrapped = [textwrap.fill(item, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
               for item in items]  # fmt: skip
    return "\n".join([heading, *wrapped])


def _folders(folders: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> str:
    def row(name: str, item: Mapping[str, Any], manifest: str) -> str:
        numbers = f"{count(item['shards']):>8} {count(item['sequences']):>13} {count(item['tokens']):>17}"
        return f"{shortened(name, _NAME):<{_NAME}} {numbers} {size(item['bytes']):>11}  {manifest}".rstrip()

    lines = [f"{'folder':<{_NAME}} {'shards':>8} {'sequences':>13} {'tokens':>17} {'size':>11}  manifest"]
    lines += [row(item["folder"], item, item["manifest"]) for item in folders]
    return "\n".join(lines + ([row("sum", total, "")] if len(folders) > 1 else []))


def _data_set(item: Mapping[str, Any]) -> str:
    settings, counts, tail = item["settings"], item["counts"], item["tail"]
    lines = [textwrap.fill(f"Data set {item['root']}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    if not item["whole"]:
        lines.append(labelled("part", "what follows is about all of it; only a part of it is shown here"))
    tool = item["tool"]
    if tool:
        lines.append(labelled("made by", f"{tool.get('name', '?')} {tool.get('version', '?')}"))
    fingerprint = str(settings.get("tokenizer_fingerprint") or "")
    lines.append(labelled("tokenizer", ", ".join([
        str(settings.get("tokenizer") or "none"), *([f"fingerprint {fingerprint[:12]}…"] if fingerprint else []),
        f"{count(settings.get('vocab_size'))} ids, end of text {count(settings.get('eot_id'))}",
    ])))  # fmt: skip
    made = f"seed {settings.get('seed', '?')}, shuffled: {_yes(settings.get('shuffle'))}"
    shape = f"seq_len {count(settings.get('seq_len'))}, members {settings.get('format', '?')}"
    lines.append(labelled("sequences", f"{shape}, {made}"))
    files = f"{count(item['inputs']['files'])} files, {size(item['inputs']['bytes'])}"
    lines.append(labelled("inputs", f"{files}, content key {settings.get('content_key', '?')}"))
    if counts:
        lines.append(labelled("counts", ", ".join(f"{count(value)} {name}" for name, value in counts.items())))
    if tail:
        lines.append(labelled("tail", _tail(tail)))
    if item["mixture"]:
        lines.append(labelled("mixture", json.dumps(item["mixture"], ensure_ascii=False)))
    lines.append(labelled("bad documents", _kinds(item["bad_documents"])))
    lines += [labelled("", f"- {_place(bad)}") for bad in item["bad_documents_first"][:_MAX_LISTED]]
    if item["rejects"]:
        lines.append(labelled("", f"all of them: {item['rejects']}"))
    if item["broken_files"]:
        lines.append(labelled("broken files", count(len(item["broken_files"]))))
        lines += [labelled("", f"- {_place(broken)}") for broken in item["broken_files"][:_MAX_LISTED]]
    return "\n".join(lines)


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, "?")


def _place(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    line = f" line {item['line']}" if item.get("line") else ""
    return f"{item.get('url', '?')}{line}: {item.get('kind', '?')} {item.get('detail', '')}".rstrip()


def _kinds(kinds: Mapping[str, Any]) -> str:
    return ", ".join(f"{count(number)} {kind}" for kind, number in kinds.items()) or "none"


def _tail(tail: Mapping[str, Any]) -> str:
    text = f"{tail.get('fate', '?')}, {count(tail.get('tokens'))} tokens"
    if tail.get("fate") == "padded":
        text += f" and {count(tail.get('pads'))} pads in member {tail.get('key')} of {tail.get('shard')}"
    return text


def _sources(sources: Mapping[str, Any]) -> str:
    lines = [f"Sources (tokens, from {sources['from']})"]
    for name, item in sources["shares"].items():
        numbers = f"{count(item['tokens']):>17} {item['share']:>7.2%}"
        lines.append(f"  {shortened(name, _NAME):<{_NAME}} {numbers}  {bar(item['share'])}".rstrip())
    return "\n".join(lines)


def _looked(item: Mapping[str, Any]) -> str:
    return f"{count(item['shards_read'])} of {count(item['shards'])} shards"


def _members(item: Mapping[str, Any]) -> str:
    lengths = item["lengths"]
    shown = [f"{count(int(length))} in {count(number)} members" for length, number in lengths.items()][:_MAX_LISTED]
    ids = ", ".join(shown) or "none can be read"
    ids += f" and {len(lengths) - _MAX_LISTED:,} other lengths" if len(lengths) > _MAX_LISTED else ""
    lines = [f"Members and ids (in {_looked(item)}, {count(item['sequences'])} sequences)"]
    lines.append(labelled("kinds", _kinds(item["kinds"])))
    lines.append(labelled("ids in a member", ids))
    lines.append(labelled("pads", count(item["pads"])))
    of = f" of {count(item['vocab_size'])} in the vocabulary" if item["vocab_size"] else ""
    lines.append(
        labelled("used ids", f"{count(item['distinct_ids'])} distinct{of}, largest {count(item['largest_id'])}")
    )
    return "\n".join(lines)


def _documents(item: Mapping[str, Any]) -> str:
    heading = (
        f"Lengths of documents in tokens, end-of-text id included (in {_looked(item)}). End-of-text ids and ends of "
        "sequences divide them: a document that the end of a sequence cuts is counted as pieces."
    )
    lines = [textwrap.fill(heading, WIDTH)]
    ends = (
        f"{count(item['ended'])} end in an end-of-text id, {count(item['pieces'] - item['ended'])} at a sequence's end"
    )
    lines.append(labelled("pieces", f"{count(item['pieces'])}: {ends}"))
    lines.append(labelled("tokens", f"{item['mean']:,.1f} in the mean piece, {count(item['longest'])} in the longest"))
    most = max(item["histogram"].values())
    for low, number in item["histogram"].items():
        span = f"{int(low):,}" if int(low) == 1 else f"{int(low):,} to {2 * int(low) - 1:,}"
        lines.append(f"  {span:>27} {count(number):>13} {number / item['pieces']:>7.2%}  {bar(number / most)}".rstrip())
    return "\n".join(lines)


def _sample(sample: Mapping[str, Any]) -> str:
    where = f"Sample: sequence {sample['position']:,} of {sample['shard']}"
    lines = [textwrap.fill(where, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    lines.append(f"  member {sample['key']}, {count(sample['tokens'])} tokens, {count(sample['pads'])} pads")
    for piece in sample["pieces"]:
        text = piece["text"] if "text" in piece else " ".join(map(str, piece["ids"]))
        if "note" in piece:
            lines.append(f"  [[{piece['note']}]]")
        wrapper = textwrap.TextWrapper(
            WIDTH, initial_indent="  | ", subsequent_indent="  | ", replace_whitespace=False,
            drop_whitespace="ids" in piece,
        )  # fmt: skip
        for line in visible(text).split("\n"):
            lines += [part.rstrip() for part in wrapper.wrap(line)] or ["  |"]
        if piece["ended"]:
            lines.append("  [[end of text]]")
    if sample["pads"]:
        lines.append(f"  [[{count(sample['pads'])} pads]]")
    return "\n".join(lines)


def _verified(item: Mapping[str, Any], problems: int) -> str:
    verdict = "all is well" if not problems else f"problems: {problems:,}"
    read = f"{count(item['shards'])} shards, {count(item['sequences'])} sequences, {size(item['bytes'])}"
    text = f"Verified: {read}: {verdict}"
    return "\n".join([text, *([_items("Not checked", item["unchecked"])] if item["unchecked"] else [])])


def _manifest(item: Mapping[str, Any]) -> str:
    return _items(
        f"Made {item['manifest']}: {count(item['shards'])} shards, {count(item['sequences'])} sequences",
        item["changes"],
    )
