"""Chat with a fine-tuned model, in a terminal or in a browser.

    open-lm chat --checkpoint logs/sft
    open-lm chat --checkpoint logs/sft --serve

--serve answers OpenAI's /v1/chat/completions and shows a web page, by default on this machine only. The chat template
and the tokenizer are those of the run's training data.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
from datetime import date
from pathlib import PurePath
from typing import TYPE_CHECKING

from open_lm.config.command_line import FlagParser
from open_lm.data.tokenizers import choose_tokenizer
from open_lm.errors import ConfigError, run_cli
from open_lm.finetune.chat_templates import OWN, find_template, template_names
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
    from open_lm.finetune.chat_session import ChatModel
    from open_lm.generate.sampling import Sampling

PROMPT = "> "


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("chat.py", __doc__, allow_abbrev=False)
    add_source_args(parser)
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat-template",
        type=user_path,
        default=OWN,
        metavar="NAME",
        help=f"`{OWN}` for that of the tokenizer, {', '.join(template_names())}, or a .jinja file "
        "(default: %(default)s)",
    )
    chat.add_argument("--system", default="", metavar="TEXT", help="system prompt of the terminal chat")
    add_sampling_args(parser, "maximum number of new tokens per turn", default=512)
    server = parser.add_argument_group("server")
    server.add_argument("--serve", action="store_true", help="serve an OpenAI-compatible API and a web page")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than the default let other machines use the model (default: %(default)s)",
    )
    server.add_argument("--port", type=int, default=8000, help="port; 0: any free one (default: %(default)s)")
    server.add_argument(
        "--max-request-bytes", type=int, default=1 << 20, help="largest accepted request (default: %(default)s)"
    )
    server.add_argument(
        "--request-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="longest time of a turn, after which it is cut off (default: %(default)s)",
    )
    add_architecture_args(parser)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port: found {args.port}, expected 0 to 65535")
    checkpoint = find_checkpoint(args.checkpoint)
    tokenizer = choose_tokenizer(checkpoint, args.tokenizer, args.eot_token, allow_other=args.allow_other_tokenizer)
    template = find_template(args.chat_template, tokenizer, date.today())
    from open_lm.finetune.chat_session import ChatModel
    from open_lm.finetune.chat_tokens import ChatTokenizer

    sampling = sampling_of(args)
    name = PurePath(args.checkpoint.rstrip("/")).name
    model = ChatModel(load_model(args, checkpoint), ChatTokenizer(tokenizer, template), name)
    if args.serve:
        _serve(args, model, sampling)
    else:
        _chat(args, model, sampling)


def _chat(args: argparse.Namespace, model: ChatModel, sampling: Sampling) -> None:
    from open_lm.finetune.chat_session import HELP, TerminalChat

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on every system
            importlib.import_module("readline")  # editing and history of input()
        print(f"chat with {model.name}\n{HELP}", file=sys.stderr)
    TerminalChat(model, sampling, args.system).run(lambda: input(PROMPT if is_terminal else ""))


def _serve(args: argparse.Namespace, model: ChatModel, sampling: Sampling) -> None:
    from open_lm.finetune.chat_server import LOOPBACK, ChatServer, ServerLimits

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    limits = ServerLimits(args.max_request_bytes, args.max_new_tokens, args.request_timeout)
    try:
        server = ChatServer((args.host, args.port), model, sampling, limits)
    except OSError as error:
        raise ConfigError(
            f"--host {args.host} --port {args.port}: cannot listen there ({error.strerror or error}); choose another "
            "port, or 0 for any free one"
        ) from error
    if args.host not in LOOPBACK:
        logging.warning("anyone who can reach %s can use the model: the server has no access control", args.host)
    print(f"serving {model.name} on {server.url} (Ctrl-C ends)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    sys.exit(run_cli(main))
