"""The model card of an exported model: README.md with the facts that the checkpoint and the configuration state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from open_lm.checkpoint.progress import Progress
from open_lm.hf.weight_files import TensorInfo
from open_lm.model.params import Params

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- open_lm
---

# {title}

A causal language model of {parameters:,} parameters, trained with OpenLM and exported to the format of transformers.

| | |
|---|---|
{rows}

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = "path/to/this/folder"
    model = AutoModelForCausalLM.from_pretrained(folder{argument})
    tokenizer = AutoTokenizer.from_pretrained(folder{argument})
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))

{note}

## Training data, intended use and limitations

To be completed by the authors of the model.
"""
_REMOTE_CODE = (
    "The architecture is none of transformers' own. Its code is in the `*_openlm.py` files of this folder, which need "
    "torch and transformers only; read them before you pass `trust_remote_code=True`."
)
_OWN_CLASS = "The architecture is transformers' own `{name}`; no other code is needed."


def model_card(params: Params, fields: Mapping[str, Any], infos: Sequence[TensorInfo], progress: Progress) -> str:
    """Return the text of the card, with front matter for the hub."""
    is_openlm = fields["model_type"] == "openlm"
    parameters = sum(math.prod(info.shape) for info in infos)
    rows = {
        "layers": params.n_layers,
        "width": params.dim,
        "heads (keys and values)": f"{params.n_heads} ({params.n_kv_heads})",
        "sequence length": params.seq_len,
        "vocabulary": params.vocab_size,
        "dtype of the weights": fields["dtype"],
        "optimizer steps": progress.step,
        "sequences seen in training": progress.samples_seen,
    }
    return _CARD.format(
        title=fields["architectures"][0],
        parameters=parameters,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, 0)),
        argument=", trust_remote_code=True" if is_openlm else "",
        note=_REMOTE_CODE if is_openlm else _OWN_CLASS.format(name=fields["architectures"][0]),
    )
