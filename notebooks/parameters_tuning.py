# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choose the shape of a model
#
# The shapes of open models, with the parameters that the planner computes from their configurations. A new model of a
# given size is a compromise between them. Nothing here needs a GPU or torch.

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd

from open_lm.config.architecture import CONFIG_DIR
from open_lm.config.sections import ModelConfig
from open_lm.planner.shapes import shape_of


def describe(name: str) -> dict[str, object]:
    """Return the shape of a model: name of a configuration, or path of a .json file."""
    shape = shape_of(ModelConfig(model=name))
    embedding = sum(weight.size for weight in shape.weights if weight.role in ("embedding", "head"))
    return {
        "model": shape.name,
        "parameters, millions": round(shape.num_params / 1e6, 1),
        "without embedding and head": round((shape.num_params - embedding) / 1e6, 1),
        "embedding and head, %": round(100 * embedding / shape.num_params, 1),
        "width D": shape.dim,
        "layers L": shape.n_layers,
        "D / L": round(shape.dim / shape.n_layers, 1),
        "heads": shape.n_heads,
        "key heads": shape.n_kv_heads,
        "head width": shape.head_dim,
        "FFN width / D": round(shape.ffn_dim / shape.dim, 2),
        "FFN": shape.ffn_type,
        "norm": shape.model_norm,
        "vocabulary": shape.vocab_size,
        "sequence": shape.seq_len,
        "tied": shape.weight_tying,
        "GFLOP per token": round(shape.flops_per_token / 1e9, 2),
    }


OPEN_MODELS = [
    "open_lm_160m", "open_lm_411m", "open_lm_1b", "tinyllama_1b", "gemma_2b", "phi_2", "open_lm_3b", "open_llama_3b",
    "open_lm_7b", "llama2_7b", "mistral_7b",
]  # fmt: skip
pd.DataFrame([describe(name) for name in OPEN_MODELS]).set_index("model")

# %% [markdown]
# Most models have heads of 64 or 128 features, a feed-forward network of 2.7 to 8 D, and 40 to 130 features of width
# per layer. Below 500 million parameters, the embedding is a large share: tying it to the head saves half of that.
#
# ## LF_LLM-269M
#
# 16 layers of width 1,024 with 16 heads, and SwiGLU with 4 D. The name counts the parameters without the embedding.

# %%
pd.DataFrame([describe("lf_llm_269m")]).set_index("model").transpose()

# %% [markdown]
# ## Variants
#
# The same budget with other ratios. Each variant is a configuration that `--model` accepts once it is in a file.

# %%
base = json.loads((CONFIG_DIR / "lf_llm_269m.json").read_text())
CHANGES = {
    "as it is": {},
    "deeper and narrower": {"hidden_dim": 768, "n_layers": 28, "n_heads": 12, "ffn_dim": 3072},
    "FFN of 8/3 D, more layers": {"ffn_dim": 2816, "n_layers": 21},
    "head not tied": {"weight_tying": False},
    "4 key heads": {"n_kv_heads": 4},
}
rows = []
with tempfile.TemporaryDirectory() as folder:
    for name, change in CHANGES.items():
        path = Path(folder) / "variant.json"
        path.write_text(json.dumps({**base, **change}))
        rows.append({**describe(str(path)), "model": name})
pd.DataFrame(rows).set_index("model")

# %% [markdown]
# `python -m open_lm.plan --model lf_llm_269m --devices 8 --device A100` predicts memory, speed and time of a training.
