"""Evaluate a checkpoint on in-context-learning tasks with llm-foundry.

    python eval_openlm_ckpt.py --eval-yaml in_memory_hf_eval.yaml --model-config ../model_configs/open_lm_1b.json \\
        --checkpoint ../logs/NAME/checkpoints/epoch_2.pt --data-dir FOLDER

Several devices: torchrun --nproc-per-node N eval_openlm_ckpt.py … (every process has the full model and evaluates a
share of the examples). llm-foundry needs a separate environment, .venv-eval (`make install-eval`). The program restarts
itself there if it is started in another environment.
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
    from icl_tasks import EvalSettings

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON_VARIABLE = "OPEN_LM_EVAL_PYTHON"
RESTARTED_VARIABLE = "OPEN_LM_EVAL_SENT"  # set after the restart in the other environment


def restart_in_eval_environment(argv: list[str]) -> None:
    """Restart this program with the Python of .venv-eval, unless llm-foundry is already available."""
    if importlib.util.find_spec("llmfoundry") is not None:
        return
    python = os.environ.get(PYTHON_VARIABLE) or str(REPOSITORY / ".venv-eval" / "bin" / "python")
    if RESTARTED_VARIABLE in os.environ:
        message = f"{sys.executable} has no llm-foundry; recreate the environment with `make install-eval`"
        sys.exit(_print_error(message))
    if not os.access(python, os.X_OK):
        sys.exit(
            _print_error(
                f"evaluation needs llm-foundry, but {python} does not exist; run `make install-eval` in {REPOSITORY} "
                f"(about 6.5 GB), or set {PYTHON_VARIABLE} to the python of an environment with requirements/eval.txt"
            )
        )
    sys.stdout.flush()
    os.execve(python, [python, __file__, *argv], {**os.environ, RESTARTED_VARIABLE: "1"})


def _print_error(message: str) -> int:
    """Print an error on rank 0 and return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from open_lm.config.command_line import add_model_args
    from open_lm.data.tokenizers import add_tokenizer_args
    from open_lm.names import user_path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        help="epoch_N.pt, step_N folder, averager file or file with only weights",
    )
    parser.add_argument("--eval-yaml", type=user_path, required=True, nargs="+", help="YAML files with the tasks")
    parser.add_argument("--model", type=user_path, help="name of a model configuration, or the path of its .json file")
    parser.add_argument("--model-config", type=user_path, help="the same as --model")
    add_tokenizer_args(parser)
    parser.add_argument(
        "--add-special-tokens",
        action="store_true",
        help="let the tokenizer add special tokens such as Llama's <s>; OpenLM training data contains none",
    )
    parser.add_argument(
        "--data-dir", type=user_path, help="folder of the tasks' .jsonl files; overrides data_dir of the YAML files"
    )
    parser.add_argument("--tasks", nargs="+", help="labels of the tasks to run; default: all")
    parser.add_argument("--max-examples", type=int, help="use only the first N examples of a task (of each category)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if available")
    parser.add_argument(
        "--output",
        type=user_path,
        help="path of the JSON result; default: {checkpoint}_{YAML names}.json, "
        "or {checkpoint}_{YAML names}_partial.json with --tasks or --max-examples",
    )
    add_model_args(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Validate the arguments and set the defaults that depend on other arguments."""
    from open_lm.errors import ConfigError, join_problems

    problems = []
    if args.model and args.model_config and args.model != args.model_config:
        problems.append("--model and --model-config differ; pass only one of them")
    if not (args.model or args.model_config):
        problems.append("--model-config is missing: pass the .json file or the name of the checkpoint's configuration")
    if args.max_examples is not None and args.max_examples < 1:
        problems.append(f"--max-examples {args.max_examples}: expected at least 1")
    if problems:
        raise ConfigError(join_problems(problems))
    args.model = args.model_config or args.model
    if not args.output:
        stem = args.checkpoint[:-3] if args.checkpoint.endswith(".pt") else args.checkpoint
        is_partial = bool(args.tasks) or args.max_examples is not None
        names = [*(Path(file).stem for file in args.eval_yaml), *(["partial"] if is_partial else [])]
        args.output = "_".join([stem, *names]) + ".json"


def main(argv: list[str]) -> list[Outcome]:
    """Run the evaluation and return the outcomes.

    Raises:
        UserError: unusable arguments, task data, tokenizer or checkpoint.
    """
    args = build_parser().parse_args(argv)
    check_arguments(args)
    for module in ("composer", "llmfoundry"):
        # Their warnings concern training and their own dependencies.
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    with tempfile.TemporaryDirectory(prefix="open_lm_eval_cache_") as cache:
        os.environ |= {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> list[Outcome]:
    from icl_tasks import read_settings

    settings = read_settings(args.eval_yaml, args.data_dir, args.tasks)
    is_main = os.environ.get("RANK", "0") == "0"
    for key in settings.ignored if is_main else []:
        print(f"note: {args.eval_yaml[0]}: {key} has no effect", flush=True)
    tokenizer, model = load_tokenizer_and_model(args, settings)

    if is_main:
        print("loading llm-foundry (this takes a while)", flush=True)
    from icl_report import format_table, write_json
    from icl_run import run_tasks, start_processes

    def report(outcome: Outcome) -> None:
        if is_main:
            score = "did not run" if outcome.score is None else f"{outcome.score:.4f} ({outcome.seconds:.0f} s)"
            print(f"{outcome.task} {outcome.shots}-shot: {score}", flush=True)

    device = start_processes(args.device, settings)
    start = time.monotonic()
    outcomes = run_tasks(model, tokenizer, settings, device, max_examples=args.max_examples, report=report)
    if is_main:
        print(f"\n{format_table(outcomes)}\n", flush=True)
        write_json(args.output, outcomes, run_metadata(args, settings, model, device, time.monotonic() - start))
        print(f"results written to {args.output}", flush=True)
    return outcomes


def load_tokenizer_and_model(args: argparse.Namespace, settings: EvalSettings) -> tuple[Any, Any]:
    """Return the tokenizer and the checkpoint's model as transformers objects; set `args.tokenizer` to its name.

    Raises:
        ConfigError: the tokenizer or the YAML settings do not match the model.
    """
    from open_lm.data.tokenizers import choose_tokenizer
    from open_lm.errors import ConfigError, join_problems
    from open_lm.model.transformer import create_params

    params = create_params(args)
    tokenizer = choose_tokenizer(
        args.checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer
    )
    args.tokenizer, ids = tokenizer.name, tokenizer.vocab_size
    problems = []
    if ids > params.vocab_size:
        problems.append(
            f"--tokenizer {args.tokenizer} has ids up to {ids - 1}, but --model {args.model} accepts only ids below "
            f"{params.vocab_size}; pass the tokenizer of the model's training data"
        )
    if settings.max_seq_len and settings.max_seq_len > params.seq_len:
        problems.append(
            f"{args.eval_yaml[0]}: max_seq_len is {settings.max_seq_len}, but the sequence length of --model "
            f"{args.model} is {params.seq_len}; lower it or leave it empty"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    from open_lm.generate import load_model_for_generation
    from open_lm.hf import OpenLMForCausalLM, load_hf_tokenizer

    model = OpenLMForCausalLM.from_open_lm(load_model_for_generation(args.checkpoint, args))
    return load_hf_tokenizer(tokenizer, add_special_tokens=args.add_special_tokens), model.eval()


def run_metadata(
    args: argparse.Namespace, settings: EvalSettings, model: Any, device: str, seconds: float
) -> dict[str, Any]:
    """Return the settings and versions of the evaluation for the JSON result."""
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
        restart_in_eval_environment(sys.argv[1:])
    from open_lm.errors import run_cli

    sys.exit(run_cli(main))
