"""Compare the time that the native evaluation engine and llm-foundry take for the same tasks, model and predictions.

    python scripts/bench/bench_icl.py --data-dir FOLDER --tokenizer gpt-neox-20b.json

Both engines evaluate a model with random weights on 100 HellaSwag, 60 ARC-easy (3-shot), 60 LAMBADA, 100 COPA and 273
Winograd examples, in one process and on one device. The times include building the prompts, but not imports and loading
the model. Runs in the environment of llm-foundry (`make install-eval`) and restarts itself there. The exit code is 1 if
a prediction differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = (  # label, file, type, shots, examples
    ("hellaswag", "hellaswag", "multiple_choice", 0, 100),
    ("arc_easy", "arc_easy", "multiple_choice", 3, 60),
    ("lambada", "lambada_openai", "language_modeling", 0, 60),
    ("copa", "copa", "multiple_choice", 0, 100),
    ("winograd", "winograd_wsc", "schema", 0, 273),
)


@dataclass
class Timing:
    """The result of an engine: seconds, CPU seconds and predictions by task; peak memory of the process in GiB."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, list[int]] = field(default_factory=dict)
    peak_gib: float = 0.0


def main(argv: list[str]) -> int:
    from open_lm.system.names import user_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=user_path, required=True, help="folder of the tasks' .jsonl files")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="file of the tokenizer")
    parser.add_argument(
        "--model", type=user_path, default="open_lm_11m", help="model configuration (default: %(default)s)"
    )
    parser.add_argument("--engine", choices=("both", "native"), default="both", help="default: %(default)s")
    parser.add_argument("--share", type=float, default=1.0, help="use this share of the examples of each task")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(REPOSITORY / "scripts" / "checks"))
    if args.engine == "both":
        from check_icl_agreement import restart_in_eval_environment

        restart_in_eval_environment()
    with tempfile.TemporaryDirectory() as folder:
        return compare(args, folder)


def compare(args: argparse.Namespace, folder: str) -> int:
    """Run the engines, print the table and return the exit code."""
    import torch

    from open_lm.hf import load_hf_tokenizer
    from open_lm.model.transformer import create_model
    from open_lm.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(0)
    model = create_model(SimpleNamespace(model=args.model)).eval()
    tokenizer = load_tokenizer(args.tokenizer)
    tasks = write_tasks(args, folder)
    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    ours = run_native(model, tokenizer, tasks, folder)  # first, so that its peak memory is its own
    theirs = run_llm_foundry(model, load_hf_tokenizer(tokenizer), tasks, folder) if args.engine == "both" else Timing()
    print(f"{'task':12} {'examples':>8} {'native s':>9} {'llm-foundry s':>14} {'ratio':>6} {'CPU ratio':>10}")
    different = 0
    for label in [*ours.seconds, "all"]:
        mine, other = total(ours.seconds, label), total(theirs.seconds, label)
        cpu_ratio = total(theirs.cpu_seconds, label) / total(ours.cpu_seconds, label)
        pairs = zip(ours.predictions.get(label, []), theirs.predictions.get(label, []), strict=args.engine == "both")
        different += sum(a != b for a, b in pairs)
        count = sum(map(len, ours.predictions.values())) if label == "all" else len(ours.predictions[label])
        print(f"{label:12} {count:8} {mine:9.2f} {other:14.2f} {other / mine:6.1f} {cpu_ratio:10.1f}")
    print(
        f"CPU seconds: native {total(ours.cpu_seconds, 'all'):.1f}, llm-foundry {total(theirs.cpu_seconds, 'all'):.1f}"
    )
    print(f"other predictions: {different}")
    print(f"peak memory: native {ours.peak_gib:.2f} GiB, with llm-foundry {theirs.peak_gib:.2f} GiB")
    return 1 if different else 0


def total(values: dict[str, float], label: str) -> float:
    """Return the value of a task, or the sum of all for the label "all"."""
    return sum(values.values()) if label == "all" else values.get(label, 0.0)


def write_tasks(args: argparse.Namespace, folder: str) -> list[Any]:
    """Write the first examples of each file to `folder` and return the tasks."""
    from open_lm.evaluate.icl.tasks import Task, first_examples

    tasks = []
    for label, file, kind, shots, count in TASKS:
        config = {"label": label, "icl_task_type": kind}
        whole = Task(label, kind, [shots], str(Path(args.data_dir) / f"{file}.jsonl"), config)
        lines = first_examples(whole, max(1, round(count * args.share)))
        data = Path(folder) / f"{file}.jsonl"
        data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        tasks.append(Task(label, kind, [shots], str(data), {**config, "dataset_uri": str(data)}))
    return tasks


def run_native(model: Any, tokenizer: Any, tasks: list[Any], folder: str) -> Timing:
    from open_lm.evaluate.icl import EvaluatorOptions, IclEvaluator, ResultStore

    store = ResultStore(str(Path(folder) / "results"), {})
    evaluator, timing = IclEvaluator(tokenizer, EvaluatorOptions(), store), Timing()
    for task in tasks:
        start, cpu_start = time.perf_counter(), time.process_time()
        outcome = evaluator.evaluate_task(model, task, task.shots[0], model.seq_len)
        timing.seconds[task.label] = time.perf_counter() - start
        timing.cpu_seconds[task.label] = time.process_time() - cpu_start
        records = store.read(outcome.examples_file)
        ordered = [records[index] for index in sorted(records)]
        timing.predictions[task.label] = [int(r["prediction"] if "prediction" in r else r["correct"]) for r in ordered]
    timing.peak_gib = peak_gib()
    return timing


def run_llm_foundry(model: Any, hf_tokenizer: Any, tasks: list[Any], folder: str) -> Timing:
    from open_lm.evaluate.engines.foundry import run_tasks, start_processes
    from open_lm.evaluate.icl import EvalSettings, Outcome
    from open_lm.hf import OpenLMForCausalLM

    settings, timing = EvalSettings(tasks), Timing()
    hf_model = OpenLMForCausalLM.from_open_lm(model)
    os.environ["HF_DATASETS_CACHE"] = folder
    device = start_processes("cpu", settings)

    def report(outcome: Outcome) -> None:
        timing.seconds[outcome.task] = outcome.seconds
        timing.cpu_seconds[outcome.task] = time.process_time() - sum(timing.cpu_seconds.values()) - cpu_start
        timing.predictions[outcome.task] = list(predictions)
        predictions.clear()

    cpu_start = time.process_time()
    with recorded_predictions() as predictions:
        run_tasks(hf_model, hf_tokenizer, settings, device, report=report)
    timing.peak_gib = peak_gib()
    return timing


@contextmanager
def recorded_predictions() -> Iterator[list[int]]:
    """Yield a list to which llm-foundry's metrics append their prediction for each example."""
    from llmfoundry.eval import metrics

    predictions: list[int] = []
    classes = (metrics.InContextLearningMultipleChoiceAccuracy, metrics.InContextLearningLMAccuracy)
    originals = [cls.update for cls in classes]

    def recording(original: Any) -> Any:
        def update(*args: Any, **kwargs: Any) -> Any:
            results = original(*args, **kwargs)
            predictions.extend(int(x) for x in results.get("selected_choice_idx", results["result"]))
            return results

        return update

    for cls, original in zip(classes, originals, strict=True):
        cls.update = recording(original)
    try:
        yield predictions
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.update = original


def peak_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(main(sys.argv[1:]))
