"""Measure how much open_lm.hf differs from the golden models and from the native model.

Also a program (`python hf_golden_check.py FOLDER`), so that a second environment can run the same check.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VARIANTS = (
    *("default", "gain_only_qknorm", "geglu_llama_rotary", "gelu_no_wb", "head_rotary"),
    *("lp_qknorm_dclm", "nope_lp", "rms_swiglu_torch", "tied_postembed"),
)
PROMPT_LENGTHS = (20, 9)
NEW_TOKENS = 8


@dataclass
class Shape:
    model: str


def check(folder: Path) -> dict[str, Any]:
    """Compare logits with those of one golden variant, and cached and padded calls with a plain call."""
    from transformers import AutoModelForCausalLM

    import open_lm.hf as open_lm_hf
    from open_lm.model.transformer import create_model

    golden = torch.load(folder / "golden.pt", weights_only=True)
    ids = golden["input_ids"][:, :-1]
    native = create_model(Shape(str(folder / "config.json")))
    native.load_state_dict(torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"])
    with tempfile.TemporaryDirectory() as saved:
        open_lm_hf.OpenLMForCausalLM.from_open_lm(native.eval()).save_pretrained(saved)
        model = AutoModelForCausalLM.from_pretrained(saved).eval()
        half_precision = AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(ids).logits
        start = model(ids[:, :40], use_cache=True)
        continued = model(ids[:, 40:], past_key_values=start.past_key_values, use_cache=True).logits
        padded, mask = left_padded(ids)
        shifted = model(padded, attention_mask=mask).logits[1, -PROMPT_LENGTHS[1] :]
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    cached = model.generate(padded, **settings, pad_token_id=0)
    plain = model.generate(padded, **settings, pad_token_id=0, use_cache=False)
    return {
        "golden": float((logits - golden["logits"]).abs().max()),
        "cache": float((continued - logits[:, 40:]).abs().max()),
        "padding": float((shifted - logits[1, : PROMPT_LENGTHS[1]]).abs().max()),
        "cached_generation_is_plain": torch.equal(cached, plain),
        "generation_is_greedy": [
            cached[row, padded.shape[1] :].tolist() == greedy(native, ids[row, :length])
            for row, length in enumerate(PROMPT_LENGTHS)
        ],
        "frequencies_stay_float32": all(b.dtype == torch.float32 for b in half_precision.buffers()),
        "weights_are_prefixed": all(name.startswith("model.") for name in model.state_dict()),
    }


def assert_equivalent(found: dict[str, Any]) -> None:
    """Check what `check` returns."""
    assert max(found.pop("golden"), found.pop("cache"), found.pop("padding")) < 1e-5
    assert found.pop("generation_is_greedy") == [True, True]
    assert all(found.values()), found


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded prompts of PROMPT_LENGTHS and their mask, both (B,T) int64."""
    longest = max(PROMPT_LENGTHS)
    padded, mask = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.int64)
    for row, length in enumerate(PROMPT_LENGTHS):
        padded[row, longest - length :] = ids[row, :length]
        mask[row, longest - length :] = 1
    return padded, mask


@torch.no_grad()
def greedy(native: Any, prompt: torch.Tensor) -> list[int]:
    """Return the most likely continuation of the native model, computed without a cache."""
    ids = prompt[None]
    for _ in range(NEW_TOKENS):
        ids = torch.cat((ids, native(ids)[0][:, -1:].argmax(-1)), dim=1)
    return [int(i) for i in ids[0, len(prompt) :]]


if __name__ == "__main__":
    print(json.dumps({folder.name: check(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}))
