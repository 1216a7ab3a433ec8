"""Run tasks with the package's own engine, open_lm.evaluate.icl: no llm-foundry, and several times as fast."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from open_lm.config.sections import ParallelConfig
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime, init_runtime, run_on_master
from open_lm.errors import ConfigError, join_problems
from open_lm.evaluate.checkpoints import examples_folder, load_checkpoint, model_name
from open_lm.evaluate.icl import (
    EvalSettings,
    EvaluatorOptions,
    IclEvaluator,
    Outcome,
    Ranks,
    ResultStore,
    evaluate_tasks,
)
from open_lm.evaluate.icl.report import recorded_name, training_position
from open_lm.evaluate.icl.store import stored_facts, weights_hash
from open_lm.evaluate.icl.task_types import parse_options


def start_ranks(device: str) -> Runtime:
    """Join the process group, if several processes were started, and select this rank's device.

    Raises:
        ConfigError: cuda without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu")
    runtime = init_runtime(ParallelConfig())
    is_master = runtime.is_master
    logging.basicConfig(level=logging.INFO if is_master else logging.WARNING, format="%(message)s", force=True)
    return replace(runtime, device=torch.device("cpu")) if device == "cpu" else runtime


def check_tasks(settings: EvalSettings) -> None:
    """Raise ConfigError for tasks that this engine does not support, all together."""
    problems = []
    for task in settings.tasks:
        if task.is_hub:
            problems.append(
                f"task {task.label}: the native engine reads .jsonl files, not hf://; use --engine llm-foundry"
            )
        try:
            parse_options(task.label, task.kind, task.config)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(join_problems(problems))


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the model that the command line sets."""
    return {key: value for key, value in vars(args).items() if key in args.given_flags and value is not None}


def evaluate_checkpoint(
    args: argparse.Namespace,
    settings: EvalSettings,
    checkpoint: str,
    runtime: Runtime,
    report: Callable[[Outcome], None],
) -> tuple[list[Outcome], dict[str, Any]]:
    """Evaluate a checkpoint; return the outcomes and what the JSON result says about the evaluation. Collective."""
    start = time.monotonic()
    tokenizer = choose_tokenizer(checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer)
    model = load_checkpoint(checkpoint, args.model, model_flags(args), runtime.device)
    settings.check_fit(tokenizer, model.vocab_size, model.seq_len, model="the model", file=args.eval_yaml[0])
    precision = args.precision or settings.precision
    if precision == "amp_fp16" and runtime.device.type == "cpu":
        raise ConfigError("precision amp_fp16 needs a CUDA device; use --precision amp_bf16 or fp32 on a CPU")
    weights = run_on_master(lambda: weights_hash(model))
    options = EvaluatorOptions(
        device=runtime.device,
        autocast=get_autocast("amp" if precision == "amp_fp16" else precision, runtime.device.type),
        ranks=Ranks(runtime.rank, runtime.world_size),
        max_examples=args.max_examples,
        special_tokens=args.add_special_tokens,
    )
    facts = stored_facts(model, weights, precision)
    store = None if args.no_cache else ResultStore(examples_folder(checkpoint), facts)
    evaluator = IclEvaluator(tokenizer, options, store)
    seq_len = settings.max_seq_len or model.seq_len
    outcomes = evaluate_tasks(evaluator, model, settings.tasks, seq_len, report)
    return outcomes, {
        "engine": "native",
        "checkpoint": checkpoint,
        **run_on_master(lambda: training_position(checkpoint, model.seq_len)),
        "weights_sha256": weights,
        "model": model_name(checkpoint, args.model),
        "num_params": sum(p.numel() for p in model.parameters()),
        "tokenizer": recorded_name(tokenizer.name),
        "tokenizer_sha256": tokenizer.fingerprint,
        "eval_yaml": args.eval_yaml,
        "seq_len": seq_len,
        "max_examples": args.max_examples,
        "precision": precision,
        "device": str(runtime.device),
        "processes": runtime.world_size,
        "seconds": round(time.monotonic() - start, 1),
        "versions": {"torch": torch.__version__},
    }
