"""Generate text with a trained model.

    open-lm generate --checkpoint logs/ex/checkpoints/epoch_2.pt --prompt "Once upon a time"
    open-lm generate --checkpoint model.pt --model open_lm_1b --tokenizer tokenizer.json < prompts.txt

On a terminal, the continuation of a single prompt is printed token by token. The architecture flags and the tokenizer
default to those of the run that wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from open_lm import storage
from open_lm.config.command_line import FlagParser
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import ConfigError, UserError, join_problems, run_cli
from open_lm.system.names import user_path
from open_lm.utils.generation_flags import (
    add_architecture_args,
    add_sampling_args,
    add_source_args,
    find_checkpoint,
    load_model,
    sampling_of,
)

if TYPE_CHECKING:
    from open_lm.generate.sampling import Sampling
    from open_lm.model.transformer import Transformer
    from open_lm.tokenizer import Tokenizer

SEPARATOR = "-" * 8


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("generate.py", __doc__, allow_abbrev=False)
    add_source_args(parser)
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
    add_architecture_args(parser)
    return parser


def _add_sampling_args(parser: argparse.ArgumentParser) -> None:
    group = add_sampling_args(parser, "maximum number of new tokens per prompt", default=200)
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
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: found {args.batch_size}, expected at least 1")
    sampling = sampling_of(args, use_cache=args.use_cache)
    checkpoint = find_checkpoint(args.checkpoint)
    tokenizer = choose_tokenizer(checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer)
    model = load_model(args, checkpoint)
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
