#!/usr/bin/env python
"""Generate text with a trained model.

    python scripts/generate.py --checkpoint logs/ex/checkpoints/epoch_2.pt --prompt "Once upon a time"
    python scripts/generate.py --checkpoint model.pt --model open_lm_1b --tokenizer tokenizer.json < prompts.txt

On a terminal, the continuation of a single prompt is printed token by token. The architecture flags and the tokenizer
default to those of the run that wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.config.architecture import read_run_settings
from open_lm.config.command_line import FlagParser, add_model_args
from open_lm.config.sections import ModelConfig
from open_lm.data.tokenizers import add_tokenizer_args, choose_tokenizer
from open_lm.errors import ConfigError, UserError, join_problems, run_cli
from open_lm.names import user_path

if TYPE_CHECKING:
    from open_lm.generate.sampling import Sampling
    from open_lm.model.transformer import Transformer
    from open_lm.tokenizer import Tokenizer

SEPARATOR = "-" * 8


def build_parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = FlagParser(
        prog="generate.py",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_argument_group("model")
    source.add_argument(
        "--checkpoint",
        type=user_path,
        required=True,
        help="path or URL of epoch_N.pt, step_N, a run folder (its newest checkpoint), or a file with only weights",
    )
    source.add_argument(
        "--model", type=user_path, help="name of a model config, or a .json file (default: the model of the run)"
    )
    add_tokenizer_args(source)
    source.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    source.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the weights (default: %(default)s)",
    )
    text = parser.add_argument_group("prompts (default: read one prompt per line from standard input)")
    text.add_argument("--prompt", "--input-text", action="append", default=[], help="text to continue; repeatable")
    text.add_argument(
        "--prompt-file",
        type=user_path,
        action="append",
        default=[],
        help="file with one prompt per line, '-' for standard input; repeatable",
    )
    text.add_argument("--whole-file", action="store_true", help="use each file as a single prompt")
    text.add_argument(
        "--json", action="store_true", help="print one JSON object per line with the keys prompt and completion"
    )
    _add_sampling_args(parser)
    shape = parser.add_argument_group(
        "architecture (only for settings that are neither in the model config nor in the run)"
    )
    add_model_args(shape)  # type: ignore[arg-type]
    for action in shape._group_actions:
        action.default = argparse.SUPPRESS
    return parser


def _add_sampling_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        "--max-gen-len",
        type=int,
        default=200,
        help="maximum number of new tokens per prompt (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="sampling temperature; 0 selects the most probable token (default: %(default)s)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, help="sample from the K most probable tokens; 0: all (default: %(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most probable tokens with this total probability (default: %(default)s)",
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="values above 1 reduce repetition (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, help="prompts per batch (default: %(default)s)")
    group.add_argument(
        "--no-cache",
        dest="use_cache",
        action="store_false",
        help="recompute the full sequence for each token instead of using the KV cache",
    )
    group.add_argument("--use-cache", dest="use_cache", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(use_cache=True)


def read_prompts(prompts: list[str], files: list[str], whole_file: bool) -> list[str]:
    """Return the given prompts followed by those of the files. Read standard input if there are neither."""
    texts = list(prompts)
    problems = []
    for name in files or ([] if prompts else ["-"]):
        if name == "-" and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", newline="\n")  # as storage reads files
        if name == "-" and sys.stdin.isatty():
            print("Enter one prompt per line; finish with Ctrl-D.", file=sys.stderr)
        try:
            content = sys.stdin.read() if name == "-" else storage.read_text(name)
        except (UserError, UnicodeDecodeError) as error:
            problems.append(f"--prompt-file {name}: cannot read the file as UTF-8 text ({error})")
            continue
        lines = storage.split_lines(content)
        new = ["\n".join(lines)] if whole_file else [line for line in lines if line.strip()]
        if not new:
            problems.append(f"--prompt-file {name}: found no prompt; write one prompt per line")
        texts += new
    if problems:
        raise ConfigError(join_problems(problems))
    return texts


def _find_checkpoint(path: str) -> str:
    """Return the checkpoint at a path, which may be a run folder."""
    from open_lm.checkpoint import candidates_at

    checkpoint = candidates_at(path)[0].url
    if checkpoint != path.rstrip("/"):
        print(f"using the newest checkpoint: {checkpoint}", file=sys.stderr)
    return checkpoint


def _load_model(args: argparse.Namespace, checkpoint: str) -> Transformer:
    import torch

    from open_lm.generate.sampling import load_model_for_generation

    settings: dict[str, Any] = read_run_settings(checkpoint)
    settings |= {key: value for key, value in vars(args).items() if value is not None}
    if "model" not in settings:
        raise ConfigError(
            f"--model is missing, and the run folder of {checkpoint} has no params.txt; "
            "set --model to a model name or a .json file"
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: found no CUDA device; use --device cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    section = ModelConfig.from_object(argparse.Namespace(**settings))
    return load_model_for_generation(checkpoint, section, device, dtype)


def _sampling(args: argparse.Namespace) -> Sampling:
    from open_lm.generate.sampling import Sampling

    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: found {args.batch_size}, expected at least 1")
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        use_cache=args.use_cache,
    )


def _completions(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling, batch_size: int
) -> Iterator[tuple[str, str]]:
    from open_lm.generate.sampling import complete_texts

    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield from zip(batch, complete_texts(model, tokenizer, batch, sampling, first_row=start), strict=True)


def _stream(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> None:
    from open_lm.generate.sampling import stream_texts

    print(prompt, end="", flush=True)
    for (piece,) in stream_texts(model, tokenizer, [prompt], sampling):
        print(piece, end="", flush=True)
    print()


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    prompts = read_prompts(args.prompt, args.prompt_file, args.whole_file)
    sampling = _sampling(args)
    checkpoint = _find_checkpoint(args.checkpoint)
    tokenizer = choose_tokenizer(checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer)
    model = _load_model(args, checkpoint)
    if len(prompts) == 1 and sys.stdout.isatty() and not args.json:
        _stream(model, tokenizer, prompts[0], sampling)
        return
    for number, (prompt, completion) in enumerate(_completions(model, tokenizer, prompts, sampling, args.batch_size)):
        if args.json:
            print(
                json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False, allow_nan=False),
                flush=True,
            )
            continue
        if number:
            print(SEPARATOR)
        print(prompt + completion, flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
