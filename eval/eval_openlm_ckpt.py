"""Evaluate a checkpoint on in-context-learning tasks with llm-foundry.

    python eval_openlm_ckpt.py --eval-yaml in_memory_hf_eval.yaml --model-config ../model_configs/open_lm_1b.json \
        --checkpoint ../logs/NAME/checkpoints/epoch_2.pt --data-dir FOLDER

Several devices: torchrun --nproc-per-node N eval_openlm_ckpt.py … (each has the whole model and a part of the
examples). llm-foundry needs an environment of its own, .venv-eval (`make install-eval`); started elsewhere, the
program goes there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icl_run import Outcome
    from icl_tasks import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON_VARIABLE = "OPEN_LM_EVAL_PYTHON"
SENT_VARIABLE = "OPEN_LM_EVAL_SENT"  # set once the program has gone to the other environment


def go_to_eval_environment(argv: list[str]) -> None:
    """Start this program anew with .venv-eval's python, unless llm-foundry is here already."""
    if importlib.util.find_spec("llmfoundry") is not None:
        return
    python = os.environ.get(PYTHON_VARIABLE) or str(REPOSITORY / ".venv-eval" / "bin" / "python")
    if SENT_VARIABLE in os.environ:
        sys.exit(_say(f"{sys.executable} has no llm-foundry; make the environment anew with `make install-eval`"))
    if not os.access(python, os.X_OK):
        sys.exit(
            _say(
                f"evaluation needs llm-foundry, and there is no {python}; run `make install-eval` in {REPOSITORY} "
                f"(about 6.5 GB), or set {PYTHON_VARIABLE} to the python of an environment with requirements/eval.txt"
            )
        )
    sys.stdout.flush()
    os.execve(python, [python, __file__, *argv], {**os.environ, SENT_VARIABLE: "1"})


def _say(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    from open_lm.config.command_line import add_model_args
    from open_lm.tokenizer import DEFAULT_TOKENIZER

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", required=True, help="epoch_N.pt, step_N folder, an averager's file or bare weights"
    )
    parser.add_argument("--eval-yaml", required=True, nargs="+", help="YAML files with the tasks")
    parser.add_argument("--model", help="name of a model configuration, or the path of its .json file")
    parser.add_argument("--model-config", help="the same, under the name the README has always used")
    parser.add_argument(
        "--tokenizer", default=DEFAULT_TOKENIZER, help="hub name, folder, tokenizer .json or sentencepiece .model file"
    )
    parser.add_argument("--eot-token", help="the tokenizer's end-of-text token, where it is not clear")
    parser.add_argument(
        "--add-special-tokens",
        action="store_true",
        help="let the tokenizer add its own tokens, such as Llama's <s>; the package's training data has none",
    )
    parser.add_argument("--data-dir", help="folder of the tasks' .jsonl files, in place of the YAML's data_dir")
    parser.add_argument("--tasks", nargs="+", help="labels of the tasks to run; default: all")
    parser.add_argument("--max-examples", type=int, help="only the first so many examples of a task (of each category)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", help="where the JSON goes; default: beside the checkpoint, with both names")
    add_model_args(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in what follows from other arguments, and refuse what cannot be."""
    from open_lm.errors import ConfigError, join_problems

    problems = []
    if args.model and args.model_config and args.model != args.model_config:
        problems.append("--model and --model-config name the same thing; give one of them")
    if not (args.model or args.model_config):
        problems.append("--model-config is missing: the .json file or the name of the checkpoint's model configuration")
    if args.max_examples is not None and args.max_examples < 1:
        problems.append(f"--max-examples {args.max_examples}: expected at least 1")
    if problems:
        raise ConfigError(join_problems(problems))
    args.model = args.model_config or args.model
    if not args.output:
        stem = args.checkpoint[:-3] if args.checkpoint.endswith(".pt") else args.checkpoint
        args.output = "_".join([stem, *(Path(file).stem for file in args.eval_yaml)]) + ".json"


def main(argv: list[str]) -> list[Outcome]:
    """Run the evaluation; see --help. Returns the outcomes.

    Raises:
        UserError: arguments, task data, tokenizer or checkpoint that cannot be used.
    """
    args = build_parser().parse_args(argv)
    check_arguments(args)
    for module in ("composer", "llmfoundry"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)  # about training, and about themselves
    with tempfile.TemporaryDirectory(prefix="open_lm_eval_cache_") as cache:
        os.environ |= {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> list[Outcome]:
    from icl_tasks import read_settings

    settings = read_settings(args.eval_yaml, args.data_dir, args.tasks)
    leader = os.environ.get("RANK", "0") == "0"
    for key in settings.without_effect if leader else []:
        print(f"note: {args.eval_yaml[0]}: {key} has no effect here", flush=True)
    tokenizer, model = load_tokenizer_and_model(args, settings)

    if leader:
        print("starting llm-foundry, which takes a while", flush=True)
    from icl_report import table, write_json
    from icl_run import run_tasks, start_processes

    def report(outcome: Outcome) -> None:
        if leader:
            score = "did not run" if outcome.score is None else f"{outcome.score:.4f} ({outcome.seconds:.0f} s)"
            print(f"{outcome.task} {outcome.shots}-shot: {score}", flush=True)

    device = start_processes(args.device, settings)
    start = time.monotonic()
    outcomes = run_tasks(model, tokenizer, settings, device, max_examples=args.max_examples, report=report)
    if leader:
        print(f"\n{table(outcomes)}\n", flush=True)
        write_json(args.output, outcomes, facts(args, settings, model, device, time.monotonic() - start))
        print(f"written to {args.output}", flush=True)
    return outcomes


def load_tokenizer_and_model(args: argparse.Namespace, settings: Settings) -> tuple[Any, Any]:
    """The tokenizer, and the checkpoint's model for transformers; ConfigError where they do not fit together."""
    from open_lm.errors import ConfigError, join_problems
    from open_lm.model.transformer import create_params
    from open_lm.tokenizer import load_tokenizer

    params = create_params(args)
    ids = load_tokenizer(args.tokenizer, args.eot_token).vocab_size
    problems = []
    if ids > params.vocab_size:
        problems.append(
            f"--tokenizer {args.tokenizer} has ids up to {ids - 1}, --model {args.model} takes ids below "
            f"{params.vocab_size}; give the tokenizer of the model's training data"
        )
    if settings.max_seq_len and settings.max_seq_len > params.seq_len:
        problems.append(
            f"{args.eval_yaml[0]}: max_seq_len is {settings.max_seq_len}, but --model {args.model} was made for "
            f"{params.seq_len} tokens; leave it empty or lower it"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    from open_lm.generate.sampling import load_model_for_generation
    from open_lm.hf import OpenLMForCausalLM, load_hf_tokenizer

    model = OpenLMForCausalLM.from_open_lm(load_model_for_generation(args.checkpoint, args))
    return load_hf_tokenizer(args.tokenizer, args.eot_token, args.add_special_tokens), model.eval()


def facts(args: argparse.Namespace, settings: Settings, model: Any, device: str, seconds: float) -> dict[str, Any]:
    """What the JSON says about the circumstances."""
    from importlib.metadata import version

    from composer.utils import dist

    return {
        "checkpoint": args.checkpoint,
        "model": args.model,
        "num_params": sum(p.numel() for p in model.parameters()),
        "tokenizer": args.tokenizer,
        "eval_yaml": args.eval_yaml,
        "seq_len": settings.max_seq_len or model.config.seq_len,
        "max_examples": args.max_examples,
        "seed": settings.seed,
        "precision": settings.precision,
        "device": device,
        "processes": dist.get_world_size(),
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("llm-foundry", "mosaicml", "torch", "transformers")},
    }


if __name__ == "__main__":
    if importlib.util.find_spec("open_lm") is None:
        sys.path.insert(0, str(REPOSITORY))
    if not {"-h", "--help"} & set(sys.argv[1:]):
        go_to_eval_environment(sys.argv[1:])
    from open_lm.errors import run_cli

    sys.exit(run_cli(main))
