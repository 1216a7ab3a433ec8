"""Run tasks of lm-eval on the package's own engine, with the checkpoints and the result files of the other engines."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from importlib.metadata import version
from typing import Any

import torch

from open_lm.distributed.processes import shutdown
from open_lm.errors import ConfigError
from open_lm.evaluate.checkpoints import examples_folder, find_checkpoints, model_name, results_file
from open_lm.evaluate.engines.native import model_flags
from open_lm.evaluate.icl import Outcome, ResultStore
from open_lm.evaluate.icl.report import recorded_name, training_position, write_json
from open_lm.evaluate.icl.store import stored_facts
from open_lm.evaluate.lm_eval.model import OpenLM
from open_lm.evaluate.lm_eval.results import check_task_names, evaluate, other_results, outcomes_of

_MAX_NAME = 100  # characters of the names of tasks in the name of the result file


def evaluate_checkpoints(args: argparse.Namespace) -> list[Outcome]:
    """Evaluate the checkpoints of the command line; return the outcomes of the last one, on rank 0."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; use --device cpu")
    manager = check_task_names(args.tasks, args.include_path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    outcomes: list[Outcome] = []
    runtime = None
    for checkpoint in find_checkpoints(args.checkpoint, args.every):
        start = time.monotonic()
        model = OpenLM(
            checkpoint=checkpoint,
            model=args.model,
            tokenizer=args.tokenizer,
            eot_token=args.eot_token,
            allow_other_tokenizer=args.allow_other_tokenizer,
            device=None if args.device == "auto" else args.device,
            precision=args.precision or "fp32",
            add_bos_token=args.add_special_tokens or None,
            model_settings=model_flags(args),
        )
        runtime = runtime or model.runtime  # the first one owns the process group
        results = evaluate(model, args.tasks, manager, shots=args.num_fewshot, max_examples=args.max_examples)
        if results is not None:
            outcomes = _write(args, model, results, time.monotonic() - start)
        del model, results  # before the next model needs the memory
    if runtime is not None:
        shutdown(runtime)
    return outcomes


def _write(args: argparse.Namespace, model: OpenLM, results: dict[str, Any], seconds: float) -> list[Outcome]:
    """Print lm-eval's tables and write the JSON result."""
    from lm_eval.utils import make_table

    facts = stored_facts(model.model, model.weights_sha256, model.precision)
    store = None if args.no_cache else ResultStore(examples_folder(model.checkpoint), facts)
    outcomes = outcomes_of(results, model.text_tokenizer.fingerprint, store)
    output = args.output or results_file(model.checkpoint, ["lm_eval", _names(args)], args.is_partial)
    print(f"checkpoint {model.checkpoint}\n{make_table(results)}", flush=True)
    if results.get("groups"):
        print(make_table(results, "groups"), flush=True)
    write_json(output, outcomes, {**_metadata(args, model, seconds), **other_results(results)})
    print(f"results written to {output}", flush=True)
    return outcomes


def _names(args: argparse.Namespace) -> str:
    """Return the names of the tasks and the number of shots as a part of a file name."""
    name = "_".join(args.tasks).replace("/", "_")
    if len(name) > _MAX_NAME:
        name = f"{name[:_MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name if args.num_fewshot is None else f"{name}_{args.num_fewshot}shot"


def _metadata(args: argparse.Namespace, model: OpenLM, seconds: float) -> dict[str, Any]:
    """Return what the JSON result says about the evaluation."""
    return {
        "engine": "lm-eval",
        "checkpoint": model.checkpoint,
        **training_position(model.checkpoint, model.model.seq_len),
        "weights_sha256": model.weights_sha256,
        "model": model_name(model.checkpoint, args.model),
        "num_params": sum(p.numel() for p in model.model.parameters()),
        "tokenizer": recorded_name(model.text_tokenizer.name),
        "tokenizer_sha256": model.text_tokenizer.fingerprint,
        "eval_yaml": [],
        "seq_len": model.max_length,
        "max_examples": args.max_examples,
        "precision": model.precision,
        "device": str(model.device),
        "processes": model.world_size,
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__, "lm-eval": version("lm-eval")},
    }
