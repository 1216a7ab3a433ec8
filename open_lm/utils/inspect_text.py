"""Format the report about a data set as plain text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.storage.strict_json import to_json

WIDTH = 100
_BAR, _NAME, _LABEL = 30, 36, 18
_MAX_LISTED = 5


def size(num_bytes: int | None) -> str:
    """Return a size with a suitable unit (powers of 1000), "?" if unknown."""
    if num_bytes is None:
        return "?"
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def count(value: Any) -> str:
    """Return a number with thousands separators, "?" if unknown."""
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else "?"


def shortened(text: str, width: int) -> str:
    """Return `text`, shortened in the middle if it is longer than `width`."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def bar(share: float) -> str:
    """Return a share as a bar; a share above 0 has at least a dot."""
    return "#" * round(share * _BAR) or ("." if share else "")


def labeled_line(label: str, text: str) -> str:
    """Return a line with a label, wrapped with a hanging indent."""
    return textwrap.fill(
        text, WIDTH, initial_indent=f"  {label:<{_LABEL}}", subsequent_indent=" " * (_LABEL + 2), break_on_hyphens=False
    )


def visible(text: str) -> str:
    """Return text with control characters replaced by escapes."""
    plain = text.expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in plain)


def render(facts: Mapping[str, Any]) -> str:
    """Return the report as text, with a paragraph per topic."""
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
    return "\n".join(lines + ([row("total", total, "")] if len(folders) > 1 else []))


def _data_set(item: Mapping[str, Any]) -> str:
    settings, counts, tail = item["settings"], item["counts"], item["tail"]
    lines = [textwrap.fill(f"Data set {item['root']}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    if not item["whole"]:
        lines.append(labeled_line("incomplete", "only some of its shards were selected; the lines below describe all"))
    tool = item["tool"]
    if tool:
        lines.append(labeled_line("created by", f"{tool.get('name', '?')} {tool.get('version', '?')}"))
    fingerprint = str(settings.get("tokenizer_fingerprint") or "")
    lines.append(labeled_line("tokenizer", ", ".join([
        str(settings.get("tokenizer") or "none"), *([f"fingerprint {fingerprint[:12]}…"] if fingerprint else []),
        f"{count(settings.get('vocab_size'))} ids, end of text {count(settings.get('eot_id'))}",
    ])))  # fmt: skip
    order = f"seed {settings.get('seed', '?')}, shuffled: {_yes(settings.get('shuffle'))}"
    shape = f"seq_len {count(settings.get('seq_len'))}, members {settings.get('format', '?')}"
    lines.append(labeled_line("sequences", f"{shape}, {order}"))
    files = f"{count(item['inputs']['files'])} files, {size(item['inputs']['bytes'])}"
    lines.append(labeled_line("inputs", f"{files}, content key {settings.get('content_key', '?')}"))
    if counts:
        lines.append(labeled_line("counts", ", ".join(f"{count(value)} {name}" for name, value in counts.items())))
    if tail:
        lines.append(labeled_line("tail", _tail(tail)))
    if item["mixture"]:
        lines.append(labeled_line("mixture", to_json(item["mixture"], ensure_ascii=False)))
    lines.append(labeled_line("bad documents", _kinds(item["bad_documents"])))
    lines += [labeled_line("", f"- {_place(bad)}") for bad in item["bad_documents_first"][:_MAX_LISTED]]
    if item["rejects"]:
        lines.append(labeled_line("", f"complete list: {item['rejects']}"))
    if item["broken_files"]:
        lines.append(labeled_line("broken files", count(len(item["broken_files"]))))
        lines += [labeled_line("", f"- {_place(broken)}") for broken in item["broken_files"][:_MAX_LISTED]]
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
        text += f" and {count(tail.get('pads'))} padding ids in member {tail.get('key')} of {tail.get('shard')}"
    return text


def _sources(sources: Mapping[str, Any]) -> str:
    lines = [f"Sources (tokens, from {sources['from']})"]
    for name, item in sources["shares"].items():
        numbers = f"{count(item['tokens']):>17} {item['share']:>7.2%}"
        lines.append(f"  {shortened(name, _NAME):<{_NAME}} {numbers}  {bar(item['share'])}".rstrip())
    return "\n".join(lines)


def _coverage(item: Mapping[str, Any]) -> str:
    """Return the share of the shards that was read."""
    return f"{count(item['shards_read'])} of {count(item['shards'])} shards"


def _members(item: Mapping[str, Any]) -> str:
    lengths = item["lengths"]
    shown = [f"{count(int(length))} in {count(number)} members" for length, number in lengths.items()][:_MAX_LISTED]
    ids = ", ".join(shown) or "no readable member"
    ids += f" and {len(lengths) - _MAX_LISTED:,} other lengths" if len(lengths) > _MAX_LISTED else ""
    lines = [f"Members and token ids (in {_coverage(item)}, {count(item['sequences'])} sequences)"]
    lines.append(labeled_line("formats", _kinds(item["kinds"])))
    lines.append(labeled_line("ids per member", ids))
    lines.append(labeled_line("padding ids", count(item["pads"])))
    of = f" of {count(item['vocab_size'])} in the vocabulary" if item["vocab_size"] else ""
    lines.append(
        labeled_line("used ids", f"{count(item['distinct_ids'])} distinct{of}, largest {count(item['largest_id'])}")
    )
    return "\n".join(lines)


def _documents(item: Mapping[str, Any]) -> str:
    heading = (
        f"Document lengths in tokens, including the end-of-text id (in {_coverage(item)}). A document that continues "
        "in another sequence is counted as one piece per sequence."
    )
    lines = [textwrap.fill(heading, WIDTH)]
    ends = (
        f"{count(item['ended'])} end with an end-of-text id, {count(item['pieces'] - item['ended'])} at the end of a "
        "sequence"
    )
    lines.append(labeled_line("pieces", f"{count(item['pieces'])}: {ends}"))
    lines.append(labeled_line("tokens per piece", f"mean {item['mean']:,.1f}, maximum {count(item['longest'])}"))
    most = max(item["histogram"].values())
    for low, number in item["histogram"].items():
        span = f"{int(low):,}" if int(low) == 1 else f"{int(low):,} to {2 * int(low) - 1:,}"
        lines.append(f"  {span:>27} {count(number):>13} {number / item['pieces']:>7.2%}  {bar(number / most)}".rstrip())
    return "\n".join(lines)


def _sample(sample: Mapping[str, Any]) -> str:
    where = f"Sample: sequence {sample['position']:,} of {sample['shard']}"
    lines = [textwrap.fill(where, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    lines.append(f"  member {sample['key']}, {count(sample['tokens'])} tokens, {count(sample['pads'])} padding ids")
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
        lines.append(f"  [[{count(sample['pads'])} padding ids]]")
    return "\n".join(lines)


def _verified(item: Mapping[str, Any], problems: int) -> str:
    result = "no problems found" if not problems else f"{problems:,} problems found"
    read = f"{count(item['shards'])} shards, {count(item['sequences'])} sequences, {size(item['bytes'])}"
    text = f"Verified {read}: {result}"
    return "\n".join([text, *([_items("Not checked", item["unchecked"])] if item["unchecked"] else [])])


def _manifest(item: Mapping[str, Any]) -> str:
    return _items(
        f"Wrote {item['manifest']}: {count(item['shards'])} shards, {count(item['sequences'])} sequences",
        item["changes"],
    )
