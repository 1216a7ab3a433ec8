"""Load exported folders with transformers where this package cannot be imported; print what they compute as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("open_lm") is None, "the package can be imported"
results = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = tokenizer(["Some text", "Text"], padding=True, padding_side="left", return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=8, do_sample=False)
    without_cache = model.generate(**ids, max_new_tokens=8, do_sample=False, use_cache=False)
    results.append(
        {
            "class": type(model).__name__,
            "ids": ids["input_ids"].tolist(),
            "mask": ids["attention_mask"].tolist(),
            "logits": model(**ids).logits.tolist(),
            "generated": generated.tolist(),
            "cache_is_exact": torch.equal(generated, without_cache),
            "ends": [model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id],
            "pads": [model.config.pad_token_id, model.generation_config.pad_token_id, tokenizer.pad_token_id],
        }
    )
print(json.dumps(results))
