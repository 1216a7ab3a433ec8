"""Write README.md, the model card of a bundle, with the metadata of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import yaml

from open_lm import storage
from open_lm.release import components, layout
from open_lm.release.context import JOULES_PER_KWH, Context
from open_lm.release.markdown import bullets, escape, facts_table, table
from open_lm.release.results import (
    LOSS_COLUMNS,
    SCORE_COLUMNS,
    final_validation,
    loss_row,
    metric_label,
    score_row,
    task_scores,
)

# Names of licenses on the hub are SPDX ids in lower case; it has no name for others.
_HUB_LICENSES = frozenset({
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "gpl-2.0",
    "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "odbl", "unlicense", "isc", "bsl-1.0", "wtfpl", "zlib",
})  # fmt: skip
INTENDED_USES = (
    "research on language models, such as their training, scaling, evaluation and interpretation",
    "a starting point for fine-tuning",
    "completion of text that is similar to the training data",
)
_BASE_MODEL = "It is a base model: it continues text. It was not tuned to follow instructions.\n"
_TUNED_MODEL = "The run continued the training of another model, so the limits and licenses of that model hold too.\n"
_TOKENS_PER_PARAMETER = 20  # of a compute-optimal training, Hoffmann et al. 2022 (arXiv 2203.15556)


def write_model_card(context: Context, missing: dict[str, str]) -> None:
    """Write README.md. `missing` has the components that the bundle lacks, with reasons."""
    front = yaml.safe_dump(_metadata(context), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {escape(context.name)}\n",
        _introduction(context),
        "## Use\n",
        _use(context),
        "## Intended use\n",
        f"The model is meant for\n\n{bullets(f'{use};' for use in INTENDED_USES)}",
        _BASE_MODEL if context.is_pretrained else _TUNED_MODEL,
        "No filter checks what it writes. Do not let it decide about people, and do not show its output to others "
        "without a check.\n",
        "## Limits\n",
        bullets(limits(context)),
        "## Training\n",
        facts_table(training_facts(context)),
        f"[{layout.DATA_CARD}]({layout.DATA_CARD}) describes the training data, and [the technical report]"
        f"({layout.REPORT_MARKDOWN}) the training with all measurements.\n",
        "## Evaluation\n",
        _evaluation(context),
        "## Environmental figures\n",
        facts_table(environmental_facts(context)) if context.starts else "The run recorded no environment.\n",
        "## Contents\n",
        _contents(context, missing),
    ]
    storage.write_text(context.bundle / layout.MODEL_CARD, f"---\n{front}---\n\n" + "\n".join(sections))


# ----------------------------------------------------------------------------------------------------- hub's metadata
def _metadata(context: Context) -> dict[str, Any]:
    license_id = context.license_of(components.FINAL_PARAMETERS) or ""
    fields: dict[str, Any] = {"license": license_id.lower()}
    if license_id.lower() not in _HUB_LICENSES:
        link = f"{layout.LICENSES}/{license_id}.txt"
        fields = {"license": "other", "license_name": license_id.lower(), "license_link": link}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["open_lm"]}
    if context.settings.origin:
        fields["base_model"] = context.settings.origin
    results = [_loss_entry(part.name, part.loss) for part in final_validation(context) if part.loss is not None]
    results += [_score_entry(evaluation.engine, score) for evaluation, score in task_scores(context)]
    if results:
        fields["model-index"] = [{"name": context.name, "results": results}]
    return fields


def _loss_entry(name: str, loss: float) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"type": "validation", "name": f"validation set {name}"},
        "metrics": [{"type": "loss", "name": "loss (nats per token)", "value": loss}],
    }


def _score_entry(engine: str, score: Any) -> dict[str, Any]:
    label = metric_label(score)
    name = f"{label}, {score.shots}-shot ({engine})"
    metric = {"type": label.replace(" ", "_"), "name": name, "value": score.score}
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"type": score.task, "name": score.task, "args": {"num_few_shot": score.shots}},
        "metrics": [metric],
    }


# ------------------------------------------------------------------------------------------------------------ sections
def _introduction(context: Context) -> str:
    summary = context.run.summary
    parameters = f"{summary.parameters:,} parameters" if summary.parameters else "unknown size"
    text = f"A causal language model of {parameters}"
    if summary.tokens:
        text += f", trained on {summary.tokens:,} tokens"
    text += f" with OpenLM until {context.date}"
    if context.producer:
        text += f", released by {escape(context.producer)}"
    contact = f" Contact: {escape(context.settings.contact)}." if context.settings.contact else ""
    return f"{text}.{contact}\n"


def _use(context: Context) -> str:
    config = storage.read_text(context.bundle / layout.FINAL_WEIGHTS / "config.json")
    is_remote_code = '"model_type": "openlm"' in config
    argument = ", trust_remote_code=True" if is_remote_code else ""
    note = (
        "The architecture is none of transformers' own. Its code is in the `*_openlm.py` files next to the weights; "
        "read them before you pass `trust_remote_code=True`."
        if is_remote_code
        else "The architecture is one of transformers' own; no other code is needed."
    )
    has_tokenizer = (context.bundle / layout.FINAL_WEIGHTS / "tokenizer_config.json").exists()
    lines = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        f'folder = "{layout.FINAL_WEIGHTS}"  # in this bundle',
        f"model = AutoModelForCausalLM.from_pretrained(folder{argument})",
    ]
    if has_tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained(folder{argument})",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    tokenizer = (
        f" The code has the license of OpenLM, `{layout.CODE}/LICENSE`, and a tokenizer of others that of its authors."
        if has_tokenizer
        else " The run recorded no tokenizer, so the bundle has none."
    )
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{note}{tokenizer}\n"


def limits(context: Context) -> list[str]:
    """Return sentences about what the model is not able to do, from the numbers of its run."""
    summary, architecture = context.run.summary, context.facts.architecture
    items = [
        f"It reads at most {architecture['seq_len']:,} tokens at once; it was trained on sequences of this length."
    ]
    if summary.parameters and summary.tokens:
        ratio = summary.tokens / summary.parameters
        advice = "fewer" if ratio < _TOKENS_PER_PARAMETER else "no fewer"
        items.append(
            f"It has seen {ratio:.3g} tokens per parameter, {advice} than the {_TOKENS_PER_PARAMETER} of a "
            "compute-optimal training."
        )
    scores = [score for _, score in task_scores(context)]
    if scores:
        at_chance = [score.label for score in scores if score.interval and score.interval[0] <= score.baseline]
        if at_chance:
            listed = ", ".join(map(escape, at_chance))
            items.append(f"Its 95 % interval includes random guessing, or is below it, in {listed}.")
    else:
        items.append("It was evaluated on no tasks, so nothing is known about its abilities.")
    items += [
        "It invents facts, and repeats errors, prejudices and private information of its training data.",
        "No evaluation of its safety, of bias or of memorized text was made for this card.",
    ]
    return items


def training_facts(context: Context) -> list[tuple[str, str]]:
    """Return the settings of the training and the size of the model, as names and texts."""
    settings, summary, shape = context.facts.params, context.run.summary, context.facts.architecture
    rows = [
        ("architecture", f"decoder, {shape['n_layers']} layers, width {shape['hidden_dim']}, {shape['n_heads']} heads"),
        ("normalization, feed-forward network", f"{shape['model_norm']}, {shape['ffn_type']}"),
        ("vocabulary, sequence length", f"{shape['vocab_size']:,} ids, {shape['seq_len']:,} tokens"),
        ("parameters", f"{summary.parameters:,}" if summary.parameters else ""),
        ("optimizer steps, tokens", f"{summary.step or 0:,} steps, {summary.tokens or 0:,} tokens"),
        ("batch", f"{settings.get('global_batch_size', '?')} sequences"),
        ("optimizer", f"{settings.get('optimizer', 'adamw')}, beta {settings.get('beta1')} and "
                      f"{settings.get('beta2')}, epsilon {settings.get('eps')}, weight decay {settings.get('wd')}"),
        ("learning rate", f"{settings.get('lr')}, {settings.get('lr_scheduler')}, {settings.get('warmup')} steps of "
                          "warmup"),
        ("parametrization", f"muP, base width {shape['mup_base_width']}" if shape.get("mup") else ""),
        ("precision", settings.get("precision", "")),
        ("seed", settings.get("seed", "")),
        ("last training loss", "" if summary.last_loss is None else f"{summary.last_loss:.4f} nats per token"),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def environmental_facts(context: Context) -> list[tuple[str, str]]:
    """Return devices, time, energy and computation, as environment.json of the run has them."""
    starts, summary = context.starts, context.run.summary
    if not starts:
        return []
    devices = [f"{item['ranks']} x {item['name']}" for item in starts[-1].get("devices", [])]
    progress = [start.get("progress", {}) for start in starts]
    joules = sum(float(item.get("energy_joules") or 0) for item in progress)
    methods = sorted({str(item["energy_method"]) for item in progress if item.get("energy_method")})
    seconds = sum(float(item.get("seconds") or 0) for item in progress)
    plural = "s" if len(starts) > 1 else ""
    cpu = starts[-1].get("cpu", {}).get("model", "")
    rows = [
        ("devices", ", ".join(devices)),
        ("processor", str(cpu)),
        ("time", f"{seconds / 3600:.3g} hours in {len(starts)} start{plural}" if seconds else ""),
        ("energy", f"{joules / JOULES_PER_KWH:.3g} kWh ({'; '.join(methods)})" if joules else "not recorded"),
        ("computation", f"{summary.flops:.3g} floating point operations ({summary.flops_method})"
         if summary.flops else ""),
        ("emissions", "not estimated: the source of the electricity is not recorded"),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def _evaluation(context: Context) -> str:
    losses, scores = final_validation(context), task_scores(context)
    parts = []
    if losses:
        parts.append(table(LOSS_COLUMNS, map(loss_row, losses)))
    if scores:
        parts.append(table(SCORE_COLUMNS, (score_row(score) for _, score in scores)))
    if not parts:
        return "The run evaluated neither validation sets nor tasks after its last step.\n"
    return "\n".join(parts)


def _contents(context: Context, missing: dict[str, str]) -> str:
    places = [(name, item.path) for name, item in components.COMPONENTS.items() if name not in missing]
    text = table(("component", "place"), places)
    if missing:
        text += "\nThis bundle does not have\n\n"
        text += bullets(f"{name}: {escape(reason)}" for name, reason in missing.items())
    script = context.bundle / layout.REPRODUCE
    if script.exists():
        text += f"\n[{layout.REPRODUCE}]({layout.REPRODUCE}) trains the model again and compares the weights.\n"
    return text
