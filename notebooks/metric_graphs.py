# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Metrics of a training run
#
# Loss, validation loss, accuracy of the tasks inside training, and samples before and after. The environment variable
# `OPEN_LM_RUN` names the run folder; the default is the newest run of the end-to-end pipeline in `temp_data/`.

# %%
import html
import os
import sys
from pathlib import Path

import pandas as pd
from IPython.display import HTML, SVG

root = next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "scripts" / "e2e").is_dir())
sys.path.insert(0, str(root / "scripts" / "e2e"))
import plots  # noqa: E402

runs = sorted((root / "temp_data" / "runs").glob("*/metrics.jsonl"), key=os.path.getmtime)
run = Path(os.environ["OPEN_LM_RUN"]) if "OPEN_LM_RUN" in os.environ else runs[-1].parent
print(run.name)

# %% [markdown]
# ## Training metrics, training and validation loss, accuracy of the tasks
#
# A dashed line is the score of random guessing; vertical lines are 95 % intervals.

# %%
SVG(plots.figure([run]))

# %% [markdown]
# ## The same as numbers

# %%
metrics = pd.DataFrame(plots.read_rows(run / "metrics.jsonl")).groupby("step").first()
validation = [name for name in metrics if name.startswith("val/") and name.endswith("loss")]
columns = ["train/loss", *validation, "train/grad_norm", "train/lr", "train/tokens_per_second"]
metrics[columns].iloc[:: max(1, len(metrics) // 12)]

# %%
moments = plots.read_rows(run / "icl.jsonl") if (run / "icl.jsonl").exists() else []
scores = [{"step": moment["step"], **task} for moment in moments for task in moment["tasks"]]
pd.DataFrame(scores, columns=["step", "task", "shots", "score", "baseline", "n"]).round(3)

# %% [markdown]
# ## Samples
#
# Green is the prompt, blue is generated text.

# %%
samples = plots.read_rows(run / "samples.jsonl") if (run / "samples.jsonl").exists() else []
steps = sorted({sample["step"] for sample in samples})
parts = []
for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
    parts.append(f"<h4>Step {step:,}</h4>")
    for sample in samples:
        if sample["step"] == step:
            prompt, text = html.escape(sample["prompt"]), html.escape(sample["text"])
            parts.append(f'<p><span style="color:green">{prompt}</span><span style="color:blue">{text}</span></p>')
HTML("".join(parts))
