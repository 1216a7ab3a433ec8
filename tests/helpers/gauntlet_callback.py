"""Compute scores with llm-foundry's callback, from the JSON of stdin; print them as JSON."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

from llmfoundry.callbacks.eval_gauntlet_callback import EvalGauntlet

data, results = json.load(sys.stdin), []
for settings in data["settings"]:
    keys, metrics, sizes = [], {}, {}
    for task, shots, scores, n in data["tasks"]:
        for category, value in scores.items():
            name = "/".join(x for x in (task, f"{shots}-shot", category) if x)
            keys.append(f"metrics/{name}/InContextLearningMultipleChoiceAccuracy")
            score = SimpleNamespace(item=lambda value=value: value)
            metric = SimpleNamespace(compute=lambda score=score: score)
            metrics[name] = {"InContextLearningMultipleChoiceAccuracy": metric}
            sizes[name] = n if not category else n // 2 + (n % 2 if category == "x" else 0)
    callback = EvalGauntlet(keys, **copy.deepcopy(settings), benchmark_sizes=sizes)
    scores = callback.eval_after_all(SimpleNamespace(eval_metrics=metrics), None)
    results.append({key.rpartition("/")[2]: value for key, value in scores.items()})
print("RESULTS" + json.dumps(results))
