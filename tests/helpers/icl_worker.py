"""Functions that test_icl_engine.py runs on several ranks; their results can be serialized as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, Outcome, Ranks, Task
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.parallel.parallelize import parallelize
from open_lm.tokenizer import JsonTokenizer

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "seq_len": 96}
KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"has_categories": True},
    "schema": {},
    "language_modeling": {},
    "generation_task_with_answers": {},
}
WORDS = "red blue green one two three four big small cat dog house tree walks runs sees the a to in"


def byte_tokenizer() -> JsonTokenizer:
    """Return a tokenizer with one id per byte, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{character: i for i, character in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return JsonTokenizer(tokenizer.to_str(), "bytes")


def tasks_in(folder: Path) -> list[Task]:
    """Return the tasks whose data `write_tasks` has written."""
    return [
        Task(kind, kind, [0, 2], str(folder / f"{kind}.jsonl"), {"label": kind, **options})
        for kind, options in KINDS.items()
    ]


def write_tasks(folder: Path, count: int = 13) -> list[Task]:
    """Write small data of every type of task and return the tasks."""
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> str:
        words = WORDS.split()
        return " ".join(words[int(i)] for i in torch.randint(0, len(words), (length,), generator=generator))

    def rows(kind: str) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for i in range(count):
            gold, category = i % 3, "xy"[i % 2]
            if kind == "multiple_choice":
                choices = [text(1 + i % 3), text(2), text(1)]
                out.append({"query": text(3 + i % 4), "choices": choices, "gold": gold, "category": category})
            elif kind == "schema":
                start = text(2)
                options = [f"{start} {text(1)}", f"{start} {text(2)}", text(2)]
                out.append({"context_options": options, "continuation": text(2), "gold": gold})
            elif kind == "language_modeling":
                out.append({"context": text(4 + i % 5), "continuation": text(1 + i % 2)})
            else:
                out.append({"context": text(3 + i % 5), "answer": text(1), "aliases": [text(1), "e"]})
        return out

    for kind in KINDS:
        (folder / f"{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(kind)))
    return tasks_in(folder)


def new_model(**changes: Any) -> Transformer:
    """Return a small model whose weights are large enough that its choices differ by more than rounding."""
    model = Transformer(Params(**{**SHAPE, **changes}))
    set_weights(model)
    return model.eval()


def set_weights(model: nn.Module) -> None:
    init_weights(model, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)


def evaluate_all(evaluator: IclEvaluator, model: nn.Module, tasks: list[Task]) -> list[Outcome]:
    return [evaluator.evaluate_task(model, task, shots, SHAPE["seq_len"]) for task in tasks for shots in task.shots]


def evaluate_live_model(settings: dict[str, Any], folder: str) -> list[Any]:
    """Evaluate a model in the layout of `settings` and return the score and the metrics of each task."""
    cfg = ParallelConfig(**settings)
    runtime = init_runtime(cfg)
    layout = build_layout(runtime, cfg)
    with torch.device("meta"):
        model = Transformer(Params(**SHAPE))
    live = parallelize(model, layout, cfg, device=runtime.device, initialise=set_weights)
    weights = [value.detach().clone() for value in live.parameters()]
    state = torch.random.get_rng_state()
    options = EvaluatorOptions(ranks=Ranks.of_layout(layout), batch_tokens=128)
    outcomes = evaluate_all(IclEvaluator(byte_tokenizer(), options), live, tasks_in(Path(folder)))
    assert live.training and torch.equal(torch.random.get_rng_state(), state)
    for before, after in zip(weights, live.parameters(), strict=True):
        difference: Any = (after.detach() - before).abs().max()
        assert float(getattr(difference, "full_tensor", lambda d=difference: d)()) == 0
    shutdown(runtime)
    return [[outcome.task, outcome.shots, outcome.score, outcome.metrics, outcome.n] for outcome in outcomes]
