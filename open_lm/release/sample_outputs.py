"""Write the text samples of a run, as records and for readers."""

from __future__ import annotations

from open_lm import storage
from open_lm.release import layout, markdown
from open_lm.release.context import Context


def write_samples(context: Context) -> bool:
    """Write samples/samples.jsonl and samples/README.md; return whether the run has samples."""
    source = context.facts.folder / "samples.jsonl"
    if not context.run.samples or not source.is_file():
        return False
    storage.copy(source, context.bundle / layout.SAMPLES / "samples.jsonl")
    parts = [f"# Samples of {markdown.escape(context.name)}\n"]
    step = None
    for sample in context.run.samples:
        if sample.step != step:
            step = sample.step
            parts.append(f"## Step {step:,}\n")
        how = "the most likely tokens" if sample.temperature == 0 else f"temperature {sample.temperature:g}"
        parts += [f"Prompt and continuation, {how}:\n", markdown.code_block(sample.prompt),
                  markdown.code_block(sample.text)]  # fmt: skip
    storage.write_text(context.bundle / layout.SAMPLES / "README.md", "\n".join(parts))
    return True
