"""The sections of the report about data, settings and provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from open_lm.config.command_line import all_specs
from open_lm.report import formats
from open_lm.report.collect import differing_settings
from open_lm.report.formats import MISSING, big, percent
from open_lm.report.markup import Column, Html, details, join, paragraph, table, tag
from open_lm.report.records import SETTINGS_OF_A_PROCESS, MixtureSource, Run
from open_lm.report.summary_section import energy_remark
from open_lm.system.names import setting_text

_MAX_SHARDS_TEXT = 400  # characters of a value in a table
_UNITS = {"train_num_samples": "sequences"}  # the flag counts tokens
_MAX_CHECKPOINTS = 30


def _titled(runs: Sequence[Run], run: Run, *blocks: Any) -> list[Html]:
    """Return blocks about a run, below its name if there are several."""
    return [*([tag("h3", run.name)] if len(runs) > 1 else []), *blocks]


# ---------------------------------------------------------------------------------------------- data
def data(runs: Sequence[Run]) -> list[Html]:
    """Return the sources of the training data: tokens planned, seen and stored."""
    blocks: list[Html] = []
    for run in runs:
        if run.sources:
            blocks += _titled(runs, run, _mixture(run))
    return blocks or [paragraph("The runs have no record of training data.")]


def _mixture(run: Run) -> Html:
    planned = run.summary.planned_tokens
    seen = sum(source.seen_tokens or 0 for source in run.sources)
    columns = [
        *(Column("source"), Column("planned share", True), Column("seen share", True), Column("share seen")),
        *(Column(name, True) for name in ("planned tokens", "tokens seen", "tokens stored", "passes", "shards")),
    ]
    rows = [_source_row(source, planned, seen) for source in run.sources]
    known = [source.seen_tokens for source in run.sources if source.seen_tokens is not None]
    if len(rows) > 1:
        rows.append(["all sources", "", "", "", big(planned), big(sum(known)) if known else MISSING, "", "", ""])
    note = ""
    if planned and known and sum(known) < planned:
        note = paragraph(f"The run has seen {percent(sum(known) / planned, 0)} of the planned tokens.", class_="note")
    return join(table(columns, rows, "Sources of the training data"), _parts(run.sources), note)


def _parts(sources: Sequence[MixtureSource]) -> Html:
    """Return the tokens of the sources that were preprocessed to one data set; nothing if each data set has one."""
    rows = [
        [source.name, name, big(tokens), percent(tokens / total if total else None)]
        for source in sources
        for total in [sum(source.parts.values())]
        for name, tokens in source.parts.items()
    ]
    columns = [Column("data set"), Column("source"), Column("tokens", True), Column("share", True)]
    return table(columns, rows, "Sources within a data set, as preprocessed") if rows else Html("")


def _source_row(source: MixtureSource, planned: int | None, seen: int) -> list[Any]:
    share = source.seen_tokens / seen if source.seen_tokens is not None and seen else None
    expected = None if planned is None or source.planned_share is None else planned * source.planned_share
    return [
        *(source.name, percent(source.planned_share), percent(share), _bar(share, source.planned_share)),
        *(big(expected), big(source.seen_tokens), big(source.stored_tokens)),
        *(MISSING if source.passes is None else f"{source.passes:.2f}", source.num_shards or MISSING),
    ]


def _bar(share: float | None, planned: float | None) -> Html:
    """Return a drawing of the seen share, with a tick at the planned one."""
    if share is None:
        return Html("")
    lines = [
        tag("line", class_="track", x1=0, x2=100, y1=5, y2=5),
        tag("line", class_="interval", x1=0, x2=f"{100 * share:.2f}", y1=5, y2=5, style="stroke-width:5"),
    ]
    if planned is not None:
        lines.append(tag("line", class_="baseline", x1=f"{100 * planned:.2f}", x2=f"{100 * planned:.2f}", y1=0, y2=10))
    return tag("svg", *lines, class_="range", viewBox="-3 0 106 10", aria_hidden="true")


# ---------------------------------------------------------------------------------------------- settings
def settings(runs: Sequence[Run]) -> list[Html]:
    """Return the settings that changed between starts, those that differ between runs, and all of them."""
    blocks: list[Html] = []
    if len(runs) > 1:
        blocks.append(tag("h3", "Differences between the runs"))
        changes = differing_settings([run.settings for run in runs])
        columns = [Column("setting"), *(Column(run.name) for run in runs)]
        rows = [(_name(change.name), *map(_value, change.values)) for change in changes]
        blocks.append(table(columns, rows, "Settings that differ") if rows else paragraph("All settings are equal."))
    for run in runs:
        if run.changes:
            blocks += [tag("h3", f"Changes between the starts of {run.name}"), _changes(run)]
        elif len([start for start in run.starts if start.settings]) > 1:
            blocks.append(paragraph(f"{run.name} was resumed with unchanged settings ({len(run.starts)} starts)."))
    blocks += [_not_default(runs, run) for run in runs if run.settings]
    for run in runs:
        if run.architecture:
            rows = [(tag("code", key), _short(value)) for key, value in run.architecture.items()]
            content = table([Column("key"), Column("value")], rows, f"Architecture of {run.name}")
            blocks.append(details(f"Architecture of {run.name} (model.json)", content))
        if run.settings:
            rows = [(_name(name), _value(value)) for name, value in sorted(run.settings.items())]
            content = table([Column("setting"), Column("value")], rows, f"All settings of {run.name}")
            blocks.append(details(f"All {len(rows)} settings of {run.name} (params.txt)", content))
    return blocks or [paragraph("The run has no params.txt.")]


def _changes(run: Run) -> Html:
    starts = [start for start in run.starts if start.settings]
    headings = [
        f"start {i}: {s.time.replace(',', ' ')}{'' if s.step is None else f', from step {s.step:,}'}"
        for i, s in enumerate(starts, 1)
    ]
    rows = [(_name(change.name), *map(_value, change.values)) for change in run.changes]
    return table(
        [Column("setting"), *map(Column, headings)], rows, f"Settings that changed between the starts of {run.name}"
    )


def _not_default(runs: Sequence[Run], run: Run) -> Html:
    """Return the flags of a training run that do not have their default; nothing for runs of other programs."""
    defaults = {name: setting_text(spec.default) for name, spec in all_specs().items()}
    if not {"global_batch_size", "lr_scheduler"} <= run.settings.keys():
        return Html("")
    rows = [
        (_name(name), _value(value))
        for name, value in sorted(run.settings.items())
        if name in defaults and name not in SETTINGS_OF_A_PROCESS and value != defaults[name]
    ]
    content = table([Column("setting"), Column("value")], rows, f"Settings of {run.name} that are not the defaults")
    if len(runs) > 1:
        return details(f"{len(rows)} settings of {run.name} that are not the defaults", content)
    return join(tag("h3", "Settings that are not the defaults"), content)


def _name(setting: str) -> Html:
    """Return the name of a setting, with its unit if that is not the unit of the flag."""
    return join(tag("code", setting), f" ({unit})" if (unit := _UNITS.get(setting)) else "")


def _value(value: str | None) -> str:
    return MISSING if value in (None, "None", "") else _short(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHARDS_TEXT else f"{text[:_MAX_SHARDS_TEXT]} … ({len(text):,} characters)"


# ---------------------------------------------------------------------------------------------- provenance
def provenance(runs: Sequence[Run]) -> list[Html]:
    """Return fingerprints of data and code, package versions, devices, energy, and the checkpoints."""
    blocks: list[Html] = []
    for run in runs:
        rows = [(name, value) for name, value in _facts(run) if value not in (None, "")]
        content = table(
            [Column("what"), Column("value")],
            [(n, tag("span", v, class_="mono")) for n, v in rows],
            f"Origin of {run.name}",
        )
        blocks += _titled(runs, run, content, *_starts(run), *_data_sets(run), *_packages(run), *_checkpoints(run))
        blocks.append(details("Files that the report has read", paragraph(", ".join(run.files) or "none")))
    return blocks


def _facts(run: Run) -> Iterable[tuple[str, Any]]:
    starts = run.environment_starts
    last: Mapping[str, Any] = starts[-1] if starts else {}
    code, system, cpu, libraries = (_mapping(last.get(key)) for key in ("code", "system", "cpu", "libraries"))
    summary, energy = run.summary, run.summary.energy
    yield "Run", run.url
    yield "Devices", summary.devices
    if "world_size" in last:
        yield "Ranks", f"{last['world_size']} (nodes: {last.get('nodes', 'unknown')})"
    yield "CPU", _join([cpu.get("model"), f"{cpu['available']} available" if "available" in cpu else None])
    python = f"Python {system['python']}" if "python" in system else None
    yield "System", _join([system.get("name"), system.get("machine"), python])
    yield "Libraries", _join([f"{name} {version}" for name, version in libraries.items()])
    yield "Code: commit", _commit(code)
    yield "Code: sha256 of the source", code.get("fingerprint")
    yield "Code: sha256 of the copy in code/", run.code_sha256
    yield "Data: fingerprint", _mapping(last.get("data")).get("fingerprint")
    yield "Compute", f"{formats.flops(summary.flops)} ({summary.flops_method})" if summary.flops else None
    yield "Energy", f"{formats.energy(energy.kwh)} ({energy_remark(energy)})" if energy else None


def _commit(code: Mapping[str, Any]) -> str | None:
    if "commit" not in code:
        return None
    changed = (
        f", with changes (sha256 of the difference: {code.get('diff_sha256', 'unknown')})"
        if code.get("modified")
        else ""
    )
    return f"{code['commit']}{changed}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _join(parts: Iterable[Any]) -> str | None:
    return ", ".join(str(part) for part in parts if part) or None


def _starts(run: Run) -> list[Html]:
    """Return what each start of the run did, by environment.json."""
    records = run.environment_starts
    if not records:
        return []
    columns = [
        Column("start"),
        *(Column(n, True) for n in ("from step", "to step", "tokens", "time", "compute", "energy")),
    ]
    rows = []
    for record in records:
        progress = _mapping(record.get("progress"))
        joules = progress.get("energy_joules")
        rows.append((
            *(record.get("time", "unknown"), record.get("step", MISSING), progress.get("step", MISSING)),
            *(big(progress.get("tokens")), formats.duration(progress.get("seconds"))),
            formats.flops(progress.get("flops")),
            formats.energy(joules / 3.6e6 if isinstance(joules, int | float) else None),
        ))  # fmt: skip
    return [tag("h3", "Starts"), table(columns, rows, f"Starts of {run.name}")]


def _data_sets(run: Run) -> list[Html]:
    """Return the fingerprints of the sources, and how their data sets were made."""
    known = [source for source in run.sources if source.fingerprint]
    if not known:
        return []
    columns = [Column("source"), Column("shards", True), Column("fingerprint"), Column("data set")]
    rows = []
    for source in known:
        digests = ", ".join(str(dataset.get("digest", "")) for dataset in source.datasets)
        rows.append((source.name, source.num_shards, _mono(source.fingerprint), _mono(digests or "no dataset.json")))
    blocks = [tag("h3", "Data sets"), table(columns, rows, "Fingerprints of the data sets")]
    for source in known:
        for dataset in source.datasets:
            settings = _mapping(dataset.get("settings"))
            made: list[tuple[Any, Any]] = [(tag("code", key), _short(value)) for key, value in settings.items()]
            made.append(("sha256 of the inputs", _mono(dataset.get("inputs", ""))))
            content = table([Column("setting"), Column("value")], made, f"How {source.name} was made")
            blocks.append(details(f"How {source.name} was made (dataset.json)", content))
    return blocks


def _mono(text: Any) -> Html:
    return tag("span", text, class_="mono")


def _packages(run: Run) -> list[Html]:
    starts = run.environment_starts
    versions = _mapping(starts[-1].get("packages")) if starts else {}
    if not versions:
        return []
    rows = [(name, version) for name, version in sorted(versions.items())]
    return [
        details(
            f"{len(rows)} package versions", table([Column("package"), Column("version")], rows, "Package versions")
        )
    ]


def _checkpoints(run: Run) -> list[Html]:
    if not run.checkpoints:
        return []
    columns = [Column("checkpoint"), Column("size", True), Column("written")]
    rows = [
        (f"{c.name}{'' if c.is_complete else ' (incomplete)'}", formats.size(c.num_bytes), _time(c.modified))
        for c in run.checkpoints[-_MAX_CHECKPOINTS:]
    ]
    hidden = len(run.checkpoints) - len(rows)
    count = len(run.checkpoints)
    note = paragraph(f"{hidden} earlier ones are not listed.", class_="note") if hidden > 0 else None
    return [
        details(f"{count} {'checkpoint' if count == 1 else 'checkpoints'}", table(columns, rows, "Checkpoints"), note)
    ]


def _time(seconds: float | None) -> str:
    return MISSING if not seconds else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
