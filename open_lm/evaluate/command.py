"""Evaluate checkpoints on in-context-learning tasks.

    open-lm evaluate --eval-yaml light --checkpoint logs/NAME --data-dir FOLDER

Two engines compute the same scores. `--engine native` is the package's own and needs no other environment.
`--engine llm-foundry` uses llm-foundry, which needs a separate environment, .venv-eval (`make install-eval`); the
program restarts itself there if it is started in another environment, and needs --model-config.

`--engine lm-eval` runs the tasks of lm-eval (EleutherAI's harness), which have other prompts and metrics, on the native
engine: --tasks names them. It needs the extra lm-eval.

Several devices: open-lm launch --nproc-per-node N evaluate … (every process has the full model and evaluates a
share of the examples).
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
from typing import TYPE_CHECKING, Any, NoReturn

from open_lm.errors import ConfigError, end_process, join_problems, run_cli

if TYPE_CHECKING:
    from open_lm.evaluate.icl import EvalSettings, Outcome

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON_VARIABLE = "OPEN_LM_EVAL_PYTHON"
ENGINES = ("llm-foundry", "native", "lm-eval")
RESTARTED_VARIABLE = "OPEN_LM_EVAL_SENT"  # set after the restart in the other environment


def restart_in_eval_environment(argv: list[str]) -> None:
    """Restart this program with the Python of .venv-eval, unless llm-foundry is already available."""
    if importlib.util.find_spec("llmfoundry") is not None:
        return
    python = os.path.expanduser(os.environ.get(PYTHON_VARIABLE) or str(CHECKOUT / ".venv-eval" / "bin" / "python"))
    if RESTARTED_VARIABLE in os.environ:
        message = f"{sys.executable} has no llm-foundry; recreate the environment with `make install-eval`"
        sys.exit(_print_error(message))
    if not os.access(python, os.X_OK):
        sys.exit(
            _print_error(
                f"--engine llm-foundry, but {python} does not exist; pass --engine native, which needs no other "
                "environment, or run `make install-eval` in a checkout of the repository (about 6.5 GB), or set "
                f"{PYTHON_VARIABLE} to the python of an environment with requirements/eval.txt"
            )
        )
    sys.stdout.flush()
    os.execve(python, [python, "-m", "open_lm.evaluate.command", *argv], {**os.environ, RESTARTED_VARIABLE: "1"})


def chosen_engine(argv: list[str], default: str) -> str:
    """Return the value of --engine, which decides in which environment the program runs."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", default=default)
    return str(parser.parse_known_args(argv)[0].engine)


def _print_error(message: str) -> int:
    """Print an error on rank 0 and return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2


def build_parser(default_engine: str = "native") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from open_lm.config.command_line import FlagParser, add_model_args
    from open_lm.config.evaluation_sections import BASELINE_VERSIONS, EVAL_PRECISIONS
    from open_lm.data.tokenizers import add_tokenizer_args
    from open_lm.evaluate.icl.task_lists import task_list_names
    from open_lm.system.names import user_path

    parser = FlagParser.of_program("eval_openlm_ckpt.py", __doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        nargs="+",
        help="epoch_N.pt, step_N folder, averager file, file with only weights, or folder in the format of "
        "transformers; except with --engine llm-foundry also a run folder (its newest checkpoint, or see --every), "
        "and several of them",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=default_engine,
        help="native: the package's own engine, faster and without other packages; lm-eval: tasks of lm-eval (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--eval-yaml",
        type=user_path,
        nargs="+",
        help=f"YAML files with the tasks, or names of lists: {', '.join(task_list_names())}; not with --engine lm-eval",
    )
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
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="labels of the tasks to run (default: all); with --engine lm-eval names of tasks, groups or tags",
    )
    parser.add_argument("--max-examples", type=int, help="use only the first N examples of a task (of each category)")
    parser.add_argument(
        "--baselines",
        choices=BASELINE_VERSIONS,
        default=BASELINE_VERSIONS[0],
        help="version of the scores of random guessing in DCLM's aggregates (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if available")
    parser.add_argument(
        "--output",
        type=user_path,
        help="path of the JSON result; default: {checkpoint}_{YAML names}.json (with --engine native and lm-eval in "
        "the folder evals next to the checkpoint), or {checkpoint}_{YAML names}_partial.json with --tasks or "
        "--max-examples",
    )
    native = parser.add_argument_group("only with --engine native or lm-eval")
    native.add_argument("--every", type=int, metavar="N", help="evaluate every N-th checkpoint of a run folder")
    native.add_argument(
        "--precision",
        choices=EVAL_PRECISIONS,
        help="precision of the computation; overrides precision of the YAML files",
    )
    native.add_argument(
        "--no-cache",
        action="store_true",
        help="neither read nor write the results of examples (by default in evals/examples next to the checkpoint). "
        "With --engine native, an evaluation that was stopped continues with them, but a remote folder has them only "
        "for tasks that have finished; --engine lm-eval only writes them",
    )
    harness = parser.add_argument_group("only with --engine lm-eval")
    harness.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the number of each task)"
    )
    harness.add_argument("--include-path", type=user_path, help="folder with the YAML files of more tasks")
    add_model_args(parser)
    return parser


def given_flags(argv: list[str]) -> set[str]:
    """Return the names of the flags that the command line sets."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def _engine_problems(args: argparse.Namespace) -> list[str]:
    """Return the problems of flags that not every engine has."""
    needs_foundry, needs_harness = args.engine == "llm-foundry", args.engine == "lm-eval"
    problems = []
    if needs_foundry and not (args.model or args.model_config):
        problems.append("--model-config is missing: pass the .json file or the name of the checkpoint's configuration")
    if needs_foundry and len(args.checkpoint) > 1:
        problems.append(f"--checkpoint: found {len(args.checkpoint)} checkpoints, expected one; use --engine native")
    if not needs_harness and not args.eval_yaml:
        problems.append("--eval-yaml is missing: pass the YAML files with the tasks, or use --engine lm-eval --tasks")
    if needs_harness and not args.tasks:
        problems.append("--tasks is missing: pass the names of tasks of lm-eval")
    given = {
        "--engine native or lm-eval": {
            "--every": args.every,
            "--precision": args.precision,
            "--no-cache": args.no_cache,
        },
        "--engine lm-eval": {"--num-fewshot": args.num_fewshot, "--include-path": args.include_path},
        "--engine native or llm-foundry": {"--eval-yaml": args.eval_yaml, "--data-dir": args.data_dir},
    }
    for engines, flags in given.items():
        if not any(args.engine == name for name in engines.removeprefix("--engine ").split(" or ")):
            problems += [f"{flag} needs {engines}" for flag, value in flags.items() if value not in (None, False)]
    return problems


def check_arguments(args: argparse.Namespace) -> None:
    """Validate the arguments and set the defaults that depend on other arguments."""
    from open_lm.evaluate.icl.task_lists import find_task_list

    problems = _engine_problems(args)
    if args.model and args.model_config and args.model != args.model_config:
        problems.append("--model and --model-config differ; pass only one of them")
    if args.output and (len(args.checkpoint) > 1 or args.every):
        problems.append("--output is one file, but there are several checkpoints; remove the flag")
    if args.every is not None and args.every < 1:
        problems.append(f"--every {args.every}: expected at least 1")
    if args.max_examples is not None and args.max_examples < 1:
        problems.append(f"--max-examples {args.max_examples}: expected at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        problems.append(f"--num-fewshot {args.num_fewshot}: expected at least 0")
    if problems:
        raise ConfigError(join_problems(problems))
    args.model = args.model_config or args.model
    args.is_partial = args.max_examples is not None
    if args.engine == "lm-eval":
        return
    args.yaml_names = [Path(file).stem for file in args.eval_yaml]
    args.eval_yaml = [find_task_list(file) for file in args.eval_yaml]
    args.is_partial = args.is_partial or bool(args.tasks)
    if args.engine == "native":
        return
    (args.checkpoint,) = args.checkpoint
    if not args.output:
        names = [*args.yaml_names, *(["partial"] if args.is_partial else [])]
        args.output = "_".join([args.checkpoint.removesuffix(".pt"), *names]) + ".json"


def main(argv: list[str], default_engine: str = "native") -> list[Outcome]:
    """Run the evaluation and return the outcomes.

    Raises:
        UserError: unusable arguments, task data, tokenizer or checkpoint.
    """
    args = build_parser(default_engine).parse_args(argv)
    check_arguments(args)
    if args.engine != "llm-foundry":
        args.given_flags = given_flags(argv)
        return _evaluate_native(args) if args.engine == "native" else _evaluate_lm_eval(args)
    for module in ("composer", "llmfoundry"):
        # Their warnings concern training and their own dependencies.
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    with tempfile.TemporaryDirectory(prefix="open_lm_eval_cache_") as cache:
        os.environ |= {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        return _evaluate(args)


def _read_settings(args: argparse.Namespace) -> EvalSettings:
    """Read the YAML files and print which of their settings have no effect."""
    from open_lm.evaluate.icl import read_settings

    settings = read_settings(args.eval_yaml, args.data_dir, args.tasks)
    for key in settings.ignored if _is_main() else []:
        print(f"note: {args.eval_yaml[0]}: {key} has no effect", flush=True)
    return settings


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report(outcome: Outcome) -> None:
    """Print the outcome of a task on rank 0."""
    if _is_main():
        score = "did not run" if outcome.score is None else f"{outcome.score:.4f} ({outcome.seconds:.0f} s)"
        print(f"{outcome.task} {outcome.shots}-shot: {score}", flush=True)


def _write_results(
    path: str, outcomes: list[Outcome], metadata: dict[str, Any], settings: EvalSettings, baselines: str
) -> None:
    """Print the table and the aggregates, and write the JSON result, on rank 0."""
    from open_lm.evaluate.icl.aggregates import aggregate_score
    from open_lm.evaluate.icl.gauntlet import gauntlet_scores
    from open_lm.evaluate.icl.report import format_table, write_json

    if _is_main():
        aggregates = [aggregate_score(outcomes, name, baselines) for name in settings.aggregates]
        gauntlet = gauntlet_scores(settings.gauntlet, outcomes) if settings.gauntlet else None
        sums = [str(item) for item in (*aggregates, gauntlet) if item is not None]
        print("\n".join(["", format_table(outcomes), *sums, ""]), flush=True)
        metadata = {**metadata, "task_data": [task.data_record() for task in settings.tasks]}
        write_json(path, outcomes, metadata, aggregates, gauntlet)
        print(f"results written to {path}", flush=True)


def _evaluate(args: argparse.Namespace) -> list[Outcome]:
    settings = _read_settings(args)
    tokenizer, model = load_tokenizer_and_model(args, settings)
    if _is_main():
        print("loading llm-foundry (this takes a while)", flush=True)
    from open_lm.evaluate.engines.foundry import run_tasks, start_processes

    device = start_processes(args.device, settings)
    start = time.monotonic()
    outcomes = run_tasks(model, tokenizer, settings, device, max_examples=args.max_examples, report=_report)
    metadata = run_metadata(args, settings, model, device, time.monotonic() - start)
    _write_results(args.output, outcomes, metadata, settings, args.baselines)
    return outcomes


def _evaluate_native(args: argparse.Namespace) -> list[Outcome]:
    """Evaluate all checkpoints with the native engine, and return the outcomes of the last one."""
    settings = _read_settings(args)
    from open_lm.distributed.processes import shutdown
    from open_lm.evaluate.checkpoints import find_checkpoints, results_file
    from open_lm.evaluate.engines import native

    native.check_tasks(settings)
    runtime = native.start_ranks(args.device)
    outcomes: list[Outcome] = []
    for checkpoint in find_checkpoints(args.checkpoint, args.every):
        if _is_main():
            print(f"checkpoint {checkpoint}", flush=True)
        outcomes, metadata = native.evaluate_checkpoint(args, settings, checkpoint, runtime, _report)
        output = args.output or results_file(checkpoint, args.yaml_names, args.is_partial)
        _write_results(output, outcomes, metadata, settings, args.baselines)
    shutdown(runtime)
    return outcomes


def _evaluate_lm_eval(args: argparse.Namespace) -> list[Outcome]:
    """Evaluate all checkpoints with lm-eval, and return the outcomes of the last one; on other ranks than 0 none."""
    from open_lm.evaluate.engines.lm_eval import evaluate_checkpoints

    return evaluate_checkpoints(args)


def load_tokenizer_and_model(args: argparse.Namespace, settings: EvalSettings) -> tuple[Any, Any]:
    """Return the tokenizer and the checkpoint's model as transformers objects; set `args.tokenizer` to its name.

    Raises:
        ConfigError: the tokenizer or the YAML settings do not match the model.
    """
    from open_lm.data.tokenizers import choose_tokenizer
    from open_lm.model.transformer import create_params

    params = create_params(args)
    tokenizer = choose_tokenizer(
        args.checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer
    )
    args.tokenizer = tokenizer.name
    settings.check_fit(
        tokenizer, params.vocab_size, params.seq_len, model=f"--model {args.model}", file=args.eval_yaml[0]
    )
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

    from open_lm.evaluate.icl.report import recorded_name, training_position

    return {
        "engine": "llm-foundry",
        "checkpoint": args.checkpoint,
        **training_position(args.checkpoint, model.config.seq_len),
        "model": args.model,
        "num_params": sum(p.numel() for p in model.parameters()),
        "tokenizer": recorded_name(args.tokenizer),
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


def run(default_engine: str) -> NoReturn:
    """Run the command line of this process, in the environment of its engine, and exit with its code."""
    argv = sys.argv[1:]
    if not {"-h", "--help"} & set(argv) and chosen_engine(argv, default_engine) == "llm-foundry":
        restart_in_eval_environment(["--engine", "llm-foundry", *argv])
    end_process(run_cli(lambda words: main(words, default_engine), argv))


if __name__ == "__main__":
    run("native")
