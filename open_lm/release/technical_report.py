"""Write the technical report of a run as Markdown, with SVG charts, and as PDF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_lm import storage
from open_lm.release import layout, markdown
from open_lm.release.charts import Chart, curve, draw_pdf, latin, to_svg
from open_lm.release.context import Context
from open_lm.release.model_card import environmental_facts, limits, training_facts
from open_lm.release.results import (
    LOSS_COLUMNS,
    SCORE_COLUMNS,
    final_validation,
    loss_row,
    score_row,
    task_scores,
)
from open_lm.report.records import Sample

_CURVES = (
    ("train/loss", "loss", "Training loss", "nats per token"),
    ("train/grad_norm", "gradient_norm", "Gradient norm", ""),
    ("train/lr", "learning_rate", "Learning rate", ""),
    ("train/tokens_per_second", "tokens_per_second", "Speed", "tokens per second"),
)
_MAX_SAMPLES = 12
_CHART_WIDTH = 0.75  # of the width of the text
_HEADING_SPACE = 35  # mm; with less, a heading starts on the next page


@dataclass(frozen=True)
class Table:
    """A table: columns and rows of texts. Columns without names have no heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


Block = str | Table | Bullets | Code | Chart


@dataclass(frozen=True)
class Section:
    """A section of the report: a title and blocks; a str is a paragraph."""

    title: str
    blocks: Sequence[Block]


def write_report(context: Context) -> None:
    """Write report/technical_report.md, its charts, and report/technical_report.pdf."""
    title = f"Technical report: {context.name}"
    sections = [section for section in _sections(context) if section.blocks]
    folder = context.bundle / layout.REPORT
    for chart in (block for section in sections for block in section.blocks if isinstance(block, Chart)):
        storage.write_text(folder / f"{chart.name}.svg", to_svg(chart))
    storage.write_text(context.bundle / layout.REPORT_MARKDOWN, _markdown(title, context, sections))
    storage.write_bytes(context.bundle / layout.REPORT_PDF, _pdf(title, context, sections))


# ------------------------------------------------------------------------------------------------------------ content
def _sections(context: Context) -> Iterable[Section]:
    run = context.run
    yield Section("Summary", [_summary(context)])
    yield Section("Model and training", [Table(("", ""), training_facts(context)), *_changes(context)])
    yield Section("Data", _data(context))
    yield Section("Course of the training", [*_training_charts(context), *_events(context)])
    yield Section("Validation", _validation(context))
    yield Section("Tasks", _tasks(context))
    yield Section("Samples", _samples(run.samples))
    yield Section("Computation and energy", [Table(("", ""), rows)] if (rows := environmental_facts(context)) else [])
    yield Section("Problems of the run", [Bullets(items)] if (items := _problems(context)) else [])
    yield Section("Limits", [Bullets(limits(context))])


def _summary(context: Context) -> str:
    summary = context.run.summary
    sentences = ["All numbers of this report come from the files of the run."]
    if summary.parameters:
        sentences.append(f"The model has {summary.parameters:,} parameters.")
    if summary.tokens and summary.step:
        sentences.append(f"It was trained on {summary.tokens:,} tokens in {summary.step:,} steps.")
    if summary.first_loss is not None and summary.last_loss is not None:
        losses = f"{summary.first_loss:.3f} to {summary.last_loss:.3f}"
        sentences.append(f"The training loss changed from {losses} nats per token.")
    if summary.tokens_per_second:
        sentences.append(f"The median speed was {summary.tokens_per_second:,.0f} tokens per second.")
    return " ".join(sentences)


def _changes(context: Context) -> list[Block]:
    changes = context.run.changes
    if not changes:
        return []
    rows = [[item.name, context.redactor.text(" -> ".join(str(value) for value in item.values))] for item in changes]
    return ["Settings that changed between starts of the run:", Table(("setting", "values"), rows)]


def _data(context: Context) -> list[Block]:
    rows = [
        [context.redactor.text(source.name), "" if source.seen_tokens is None else f"{source.seen_tokens:,}",
         "" if source.passes is None else f"{source.passes:.3g}", source.fingerprint[:16]]
        for source in context.run.sources
    ]  # fmt: skip
    text = f"{layout.DATA_CARD} describes the data in detail."
    return [Table(("source", "tokens seen", "passes", "fingerprint"), rows), text] if rows else [text]


def _training_charts(context: Context) -> list[Block]:
    charts: list[Block] = []
    for metric, name, title, unit in _CURVES:
        steps, values = context.run.metrics.get(metric)
        line = curve(title, steps.astype(np.float64), values.astype(np.float64))
        if len(line.x) > 1:
            charts.append(Chart(name, title, "optimizer step", unit, [line]))
    return charts


def _events(context: Context) -> list[Block]:
    events = [f"step {event.step:,}: {event.text}" for event in context.run.events]
    return ["Events:", Bullets([context.redactor.text(text) for text in events])] if events else []


def _validation(context: Context) -> list[Block]:
    losses = final_validation(context)
    blocks: list[Block] = [Table(LOSS_COLUMNS, [loss_row(part) for part in losses])] if losses else []
    points: dict[str, list[tuple[float, float]]] = {}
    for validation in context.run.validations:
        for part in validation.sets:
            if validation.tokens is not None and part.loss is not None and validation.average is None:
                points.setdefault(context.redactor.text(part.name), []).append((validation.tokens, part.loss))
    curves = [curve(name, *np.array(pairs, np.float64).T) for name, pairs in points.items() if len(pairs) > 1]
    if curves:
        blocks.append(Chart("validation_loss", "Validation loss", "tokens", "nats per token", curves))
    return blocks


def _tasks(context: Context) -> list[Block]:
    scores = task_scores(context)
    blocks: list[Block] = [Table(SCORE_COLUMNS, [score_row(score) for _, score in scores])] if scores else []
    live = [(item.step, item.average) for item in context.run.evaluations if item.is_live and item.average is not None]
    if len(live) > 1:
        line = curve("average", *np.array(live, np.float64).T)
        blocks.append(Chart("task_average", "Average score of the tasks", "optimizer step", "", [line]))
    return blocks


def _samples(samples: Sequence[Sample]) -> list[Block]:
    """Return the samples of the first and of the last step."""
    steps = sorted({sample.step for sample in samples})
    blocks: list[Block] = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        chosen = [sample for sample in samples if sample.step == step][:_MAX_SAMPLES]
        blocks.append(f"Step {step:,}. The first line is the prompt, after the mark >; the continuation follows.")
        blocks += [Code(f"> {sample.prompt}\n{sample.text}\n(temperature {sample.temperature:g})") for sample in chosen]
    return blocks


def _problems(context: Context) -> list[str]:
    return [
        context.redactor.text(f"{problem.title} ({problem.where}): {problem.detail}")
        for problem in context.run.problems
    ]


# ----------------------------------------------------------------------------------------------------------- Markdown
def _markdown(title: str, context: Context, sections: Sequence[Section]) -> str:
    parts = [f"# {markdown.escape(title)}\n", f"{markdown.escape(context.producer)} {context.date}".strip() + "\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n".join(parts)


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return markdown.escape(block) + "\n"
    if isinstance(block, Table):
        return markdown.table(block.columns, block.rows)
    if isinstance(block, Bullets):
        return markdown.bullets(map(markdown.escape, block.items))
    if isinstance(block, Code):
        return markdown.code_block(block.text)
    return f"![{block.title}]({block.name}.svg)\n"


# ---------------------------------------------------------------------------------------------------------------- PDF
def _pdf(title: str, context: Context, sections: Sequence[Section]) -> bytes:
    """Return the report as PDF. The same run gives the same bytes."""
    from fpdf import FPDF

    pdf = FPDF(format="A4")
    pdf.set_creation_date(context.end_time)
    pdf.set_title(latin(title))
    pdf.set_author(latin(context.producer))
    pdf.set_lang("en")
    pdf.set_auto_page_break(True, margin=18)
    pdf.add_page()
    _paragraph(pdf, title, 18, "B")
    _paragraph(pdf, f"{context.producer} {context.date}".strip(), 10)
    for section in sections:
        pdf.ln(3)
        if pdf.will_page_break(_HEADING_SPACE):
            pdf.add_page()
        pdf.start_section(latin(section.title))
        _paragraph(pdf, section.title, 13, "B")
        for block in section.blocks:
            _pdf_block(pdf, block)
    return bytes(pdf.output())


def _paragraph(pdf: Any, text: str, size: float, style: str = "", family: str = "helvetica") -> None:
    pdf.set_font(family, style=style, size=size)
    pdf.multi_cell(
        0,
        size * 0.5,
        latin(text),
        new_x="LMARGIN",
        new_y="NEXT",
        align="L",
        wrapmode="CHAR" if family == "courier" else "WORD",
    )
    pdf.ln(1.5)


def _pdf_block(pdf: Any, block: Block) -> None:
    if isinstance(block, str):
        _paragraph(pdf, block, 10)
    elif isinstance(block, Bullets):
        for item in block.items:
            _paragraph(pdf, f"- {item}", 10)
    elif isinstance(block, Code):
        _paragraph(pdf, block.text, 8, family="courier")
    elif isinstance(block, Table):
        _pdf_table(pdf, block)
    else:
        width = pdf.epw * _CHART_WIDTH
        if pdf.will_page_break(width * 0.5):
            pdf.add_page()
        pdf.set_y(pdf.get_y() + draw_pdf(block, pdf, pdf.l_margin, pdf.get_y(), width) + 3)


def _pdf_table(pdf: Any, block: Table) -> None:
    pdf.set_font("helvetica", size=8)
    has_heading = any(block.columns)
    rows = [block.columns, *block.rows] if has_heading else block.rows
    widths = None if has_heading else (1, 2)
    with pdf.table(
        first_row_as_headings=has_heading, line_height=4.5, text_align="LEFT", wrapmode="CHAR", col_widths=widths
    ) as table:
        for row in rows:
            cells = table.row()
            for cell in row:
                cells.cell(latin(str(cell)))
    pdf.ln(2)


def has_measurements(context: Context) -> bool:
    """Return whether the run has anything to report: metrics or results."""
    return len(context.run.metrics) > 0 or bool(context.run.validations or context.run.evaluations)
