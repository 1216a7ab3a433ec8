"""Make data for supervised fine-tuning from conversations: the command behind datapreprocess/make_sft.py."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import islice
from typing import TYPE_CHECKING

from open_lm.config.registry import CONVERSATION_FORMS
from open_lm.datapreprocess.commands import Parser, add_work_options, exclude_outputs, memory_limit, start_logging
from open_lm.errors import ConfigError
from open_lm.finetune.chat_templates import OWN, ChatTemplate, find_template, template_names
from open_lm.system.names import input_pattern, user_path
from open_lm.system.program import program_name
from open_lm.tokenizer import DEFAULT_TOKENIZER, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from open_lm.datapreprocess.job import PreprocessJob
    from open_lm.datapreprocess.readers import Piece, Record
    from open_lm.finetune.sft_encoder import ConversationEncoder, Location

DESCRIPTION = "Render conversations with a chat template, and write packed shards with a loss mask."
# What to do with a conversation that is longer than a sequence, by value of --overlong; all are counted.
OVERLONG = {
    "error": "reject it like other bad input",
    "drop": "leave it out",
    "cut": "keep its first tokens",
    "turns": "leave out its last turns",
}
_logger = logging.getLogger("open_lm.datapreprocess")


def make_parser() -> Parser:
    """Return the parser of the command."""
    from open_lm.datapreprocess.readers import describe_suffixes

    parser = Parser(prog=program_name("make_sft.py"), description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--input-files", type=input_pattern, nargs="+", required=True, metavar="PATH",
        help="files, globs, folders, or @lists of them, local, s3://… or hf-dataset://NAME?split=…, with one "
        "conversation per record; supported suffixes: " + describe_suffixes(),
    )  # fmt: skip
    add("--output-dir", type=user_path, required=True, help="local folder or s3:// prefix of the shards")
    add(
        "--tokenizer", type=user_path, default=DEFAULT_TOKENIZER,
        help="hub name, folder or tokenizer.json (default: %(default)s)",
    )  # fmt: skip
    add("--eot-token", help="token that ends a text (default: the tokenizer's end-of-text token)")
    add(
        "--chat-template", type=user_path, default=OWN, metavar="NAME",
        help=f"`{OWN}` for that of the tokenizer, {', '.join(template_names())}, or a .jinja file (default: {OWN})",
    )  # fmt: skip
    add("--template-date", type=_date, help="date YYYY-MM-DD for templates that contain the current date")
    add("--form", default="auto", choices=["auto", *CONVERSATION_FORMS], help=f"{CONVERSATION_FORMS.summary()}"
        " (default: detected in each record)")  # fmt: skip
    add("--seqlen", type=int, default=2048, help="sequence length of the model (default: 2048)")
    add("--overlong", default="error", choices=list(OVERLONG), help="what to do with conversations longer than "
        f"a sequence: {'; '.join(f'{name}: {text}' for name, text in OVERLONG.items())} (default: error)")  # fmt: skip
    add("--keep-duplicates", action="store_true", help="keep conversations that are identical to an earlier one")
    add("--vocab-size", type=int, help="vocabulary size (default: the tokenizer's)")
    add("--shard-size", type=int, help="sequences per shard (default: 8192, fewer for small data)")
    add("--seed", type=int, default=0, help="seed of the global shuffle (default: 0)")
    add("--no-shuffle", action="store_true", help="keep the order of the input as far as packing does")
    add("--num-workers", type=int, help="worker processes (default and maximum: one per CPU core)")
    bad = parser.add_argument_group("bad input").add_argument
    bad(
        "--max-bad-fraction", type=float, default=0.0,
        help="fraction of the conversations, files and bytes that may be unusable and skipped (default: 0)",
    )  # fmt: skip
    bad("--skip-bad-lines", action="store_true", help="same as --max-bad-fraction 1")
    running = add_work_options(parser)
    running(
        "--preview", type=int, metavar="N",
        help="print N conversations as the model will see them, with the trained text between [[ and ]]; write nothing",
    )  # fmt: skip
    return parser


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected YYYY-MM-DD") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises open_lm.errors.UserError for invalid arguments or inputs."""
    args = make_parser().parse_args(argv)
    start_logging()
    tokenizer = load_tokenizer(args.tokenizer, args.eot_token)
    template = find_template(args.chat_template, tokenizer, args.template_date)
    job = _make_job(args)
    if args.preview is not None:
        _preview(job, template, args.form, args.preview)
        return
    encoder = _make_encoder(args, job, tokenizer, template)
    from open_lm.datapreprocess.engine import run

    run(job, encoder)


def _make_job(args: argparse.Namespace) -> PreprocessJob:
    from open_lm.datapreprocess.inputs import find_inputs
    from open_lm.datapreprocess.job import Layout, PreprocessJob
    from open_lm.datapreprocess.readers import ReadOptions
    from open_lm.datapreprocess.sampling import UNKNOWN

    layout = Layout(args.output_dir, shard_sequences=args.shard_size)
    inputs = exclude_outputs(layout, find_inputs(args.input_files), [UNKNOWN])
    return PreprocessJob(
        inputs=tuple(sorted(inputs, key=lambda item: item.url)),
        layout=layout,
        tokenizer=args.tokenizer,
        seq_len=args.seqlen,
        options=ReadOptions(records=True),
        seed=args.seed,
        shuffle=not args.no_shuffle,
        split_documents=True,
        has_flags=True,
        max_bad_fraction=1.0 if args.skip_bad_lines else args.max_bad_fraction,
        workers=args.num_workers,
        memory_limit=memory_limit(args.memory_limit),
        work_dir=args.work_dir,
        restart=args.restart,
    )


def _make_encoder(
    args: argparse.Namespace, job: PreprocessJob, tokenizer: Tokenizer, template: ChatTemplate
) -> ConversationEncoder:
    from open_lm.finetune.chat_tokens import ChatTokenizer
    from open_lm.finetune.sft_encoder import ConversationEncoder, SftSettings

    chat = ChatTokenizer(tokenizer, template)
    chat.check()
    if chat.stop_text:
        _logger.warning(
            "the tokenizer has no token %s: each turn ends with this text, spelled in several tokens; the template "
            "tulu ends turns with the end-of-text token",
            chat.stop_text,
        )
    settings = SftSettings(job.length, args.form, args.overlong, args.keep_duplicates)
    duplicates = {} if args.keep_duplicates else find_duplicates(job, args.form)
    return ConversationEncoder(chat, settings, args.vocab_size, duplicates)


def find_duplicates(job: PreprocessJob, form: str) -> dict[bytes, Location]:
    """Return the location of the first of several equal conversations, by fingerprint.

    This reads all records once more, before they are encoded, so that workers agree on the first one.
    """
    from open_lm.finetune.conversations import BadConversation, fingerprint, parse_conversation
    from open_lm.finetune.sft_encoder import decode_record

    first: dict[bytes, Location] = {}
    repeated: set[bytes] = set()
    for piece, record in _records(job):
        try:
            key = fingerprint(parse_conversation(decode_record(record), form))
        except BadConversation:
            continue  # the encoder reports it
        location = (piece.url, piece.start, record.line)
        if first.setdefault(key, location) != location:
            repeated.add(key)
    return {key: first[key] for key in repeated}


def _records(job: PreprocessJob) -> Iterator[tuple[Piece, Record]]:
    """Yield the records of all inputs in order, each with its piece; the rest of a broken file is left out."""
    from open_lm.datapreprocess.inputs import plan_units
    from open_lm.datapreprocess.readers import BrokenFile, PieceReader, Record

    for unit in plan_units(job.inputs, job.sampling, job.options, keep_order=not job.shuffle):
        for piece in unit.pieces:
            try:
                for block in PieceReader(piece, job.options):
                    for document in block.documents:
                        assert isinstance(document, Record)
                        yield piece, document
            except BrokenFile:
                continue  # the engine reports it


def _preview(job: PreprocessJob, template: ChatTemplate, form: str, count: int) -> None:
    """Print the first conversations; a record that has none is a ConfigError with its location."""
    from open_lm.finetune.conversations import BadConversation, parse_conversation
    from open_lm.finetune.sft_encoder import decode_record

    for number, (piece, record) in enumerate(islice(_records(job), count)):
        try:
            rendered = template.render(parse_conversation(decode_record(record), form))
        except BadConversation as error:
            raise ConfigError(f"{piece.url} line {record.line}: {error.kind}: {error}") from error
        print("-" * 8 if number else "", end="\n" if number else "")
        position = 0
        for start, end in rendered.spans:
            print(f"{rendered.text[position:start]}[[{rendered.text[start:end]}]]", end="")
            position = end
        print(rendered.text[position:])
