"""What the preprocessing commands share: the last options of both, and the way from their arguments to a run."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_lm.datapreprocess.inputs import InputFile
    from open_lm.datapreprocess.job import PreprocessJob, Layout
    from open_lm.datapreprocess.mixtures import Mixture
    from open_lm.datapreprocess.tokenization import DocumentEncoder

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
_ESCAPE = re.compile(r"\\(?:[\\nrtfv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_logger = logging.getLogger("open_lm.datapreprocess")


class Parser(argparse.ArgumentParser):
    """Accepts every flag with dashes and with underscores; a wrong use is a ConfigError, which callers can catch."""

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Like argparse's, with the other spelling of each flag added."""
        return super().add_argument(*_spellings(names), **options)  # type: ignore[arg-type]

    def add_argument_group(self, *args: Any, **options: Any) -> argparse._ArgumentGroup:
        """Like argparse's; its flags have both spellings too."""
        group = super().add_argument_group(*args, **options)
        add = group.add_argument
        group.add_argument = lambda *names, **given: add(*_spellings(names), **given)  # type: ignore[method-assign]
        return group

    def error(self, message: str) -> None:  # type: ignore[override]
        from open_lm.errors import ConfigError

        raise ConfigError(f"{message} ({self.prog} --help shows all options)")


def _spellings(names: Sequence[str]) -> list[str]:
    spellings = list(names)
    for name in names:
        if name.startswith("--"):
            body = name[2:]
            spellings += [f"--{other}" for other in (body.replace("_", "-"), body.replace("-", "_"))]
    return list(dict.fromkeys(spellings))


def add_common_options(parser: Parser) -> None:
    """The options that both commands have and the original ones had not."""
    documents = parser.add_argument_group("documents").add_argument
    documents("--eot-token", help="token that ends a document; by default the tokenizer's own end-of-text token")
    documents("--add-bos", action="store_true", help="begin every document with the tokenizer's begin-of-text token")
    documents(
        "--separator", help=r"cut .txt and .md files into documents here, e.g. '\n\n' (default: a document a file)"
    )
    documents(
        "--split-documents", action="store_true",
        help="no document goes from one sequence on into the next: documents are packed whole, sequences padded",
    )  # fmt: skip
    documents("--drop-tail", action="store_true", help="drop and count the last tokens that fill no sequence")
    bad = parser.add_argument_group("bad input").add_argument
    bad(
        "--max-bad-fraction", type=float,
        help="share of documents (and of bytes, for broken files) that may be left out and counted (default: 0.001)",
    )  # fmt: skip
    bad("--skip-bad-lines", action="store_true", help="the same as --max-bad-fraction 1")
    mixing = parser.add_argument_group("mixtures").add_argument
    mixing(
        "--source", action="append", default=[], metavar="NAME=PATTERN",
        help="files of a source, by name, glob or folder; may be given many times, also for one source",
    )  # fmt: skip
    mixing("--mixture", help="named mixture of sources and rates, or a YAML file (see docs/preprocessing.md)")
    mixing("--output-per-source", action="store_true", help="a data set for each source, to be mixed while training")
    mixing("--mixture-tokens", type=int, help="tokens of the mixture; sources may be repeated to reach them")
    running = parser.add_argument_group("running").add_argument
    running("--memory-limit", help="of all processes on one machine, e.g. 8GB (default: half of its memory)")
    running(
        "--work-dir",
        help="folder for intermediate files, removed at the end (default: in the output folder; for a remote output "
        "among this machine's temporary files); on several nodes one that all share",
    )
    running("--restart", action="store_true", help="throw away unfinished work that was begun with other settings")
    running(
        "--dry-run", action="store_true", help="read a sample, predict tokens, shards, disk and time, write nothing"
    )
    running(
        "--verify-tokenizer", type=int, metavar="N",
        help="compare the fast tokenizer with the reference on N documents and N hostile texts, and write nothing",
    )  # fmt: skip


@dataclass
class Request:
    """What a command asks for. `common` holds the arguments that both have, `running` the fields of a job that each
    names in its own way: workers, work_dir, ray_options."""

    common: argparse.Namespace
    input_flag: str
    patterns: Sequence[str]
    layout: Layout
    tokenizer: str | None
    vocab_size: int | None
    running: dict[str, Any]
    mixture: Mixture | None = None
    suffixes: Sequence[str] | None = None
    choose: Callable[[list[InputFile]], list[InputFile]] = field(default=lambda inputs: inputs)


def execute(request: Request) -> None:
    """Do what a command asks for: make the data set, or only tell of it."""
    from open_lm.datapreprocess.engine import run

    common = request.common
    mixture = request.mixture = _choose_mixture(request)
    _check_flags(common, mixture)
    job = _make_job(request)
    flags = _training_flags(job, mixture) if mixture and mixture.rates and job.layout.per_source else []
    encoder = make_encoder(request.tokenizer, common.eot_token, request.vocab_size, common.add_bos)
    if common.verify_tokenizer is not None:
        _verify(job, encoder, common.verify_tokenizer)
        return
    job = _sample_by_rate(job, request, encoder)
    if common.dry_run:
        from open_lm.datapreprocess.dry_run import describe, estimate

        print(describe(estimate(job, encoder)))
        return
    run(job, encoder)
    if flags:
        _logger.info("to train at the rates of the mixture: %s", shlex.join(flags))


def make_encoder(
    tokenizer: str | None, eot_token: str | None, vocab_size: int | None, add_bos: bool = False
) -> DocumentEncoder:
    """The encoder of a tokenizer, or, for None, of documents that come as ids (end-of-text id 0)."""
    from open_lm.datapreprocess.tokenization import DocumentEncoder
    from open_lm.errors import ConfigError

    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size must be at least 1, found {vocab_size}")
    if tokenizer is None:
        if eot_token is not None:
            raise ConfigError(f"--eot-token {eot_token}: documents come as ids, which id 0 ends; name a --tokenizer")
        return DocumentEncoder(None, vocab_size, add_bos=add_bos)
    from open_lm.tokenizer import load_tokenizer

    return DocumentEncoder(load_tokenizer(tokenizer, eot_token), vocab_size, add_bos=add_bos)


def _make_job(request: Request) -> PreprocessJob:
    from open_lm.datapreprocess.inputs import find_inputs
    from open_lm.datapreprocess.job import DEFAULT_BAD_FRACTION, PreprocessJob
    from open_lm.datapreprocess.readers import ReadOptions
    from open_lm.datapreprocess.sampling import UNKNOWN, Sampling, log_sampling
    from open_lm.errors import ConfigError

    common, mixture = request.common, request.mixture
    found = {
        name: find_inputs(patterns, request.suffixes) for name, patterns in (mixture.inputs if mixture else {}).items()
    }
    inputs = {item.url: item for items in found.values() for item in items}
    if not request.patterns and not inputs:
        raise ConfigError(
            f"no input is named: give {request.input_flag}, or files of a source with --source NAME=PATTERN"
        )
    if request.patterns:
        inputs |= {item.url: item for item in find_inputs(request.patterns, request.suffixes)}
    layout = replace(request.layout, per_source=common.output_per_source)
    names = [UNKNOWN, *(source.name for source in (mixture.sources if mixture else ()))]
    outside = _outside(layout, inputs.values(), names)
    chosen = request.choose(sorted(outside, key=lambda item: item.url))
    sampling = Sampling()
    if mixture:
        sampling = mixture.sampling({name: [item.url for item in items] for name, items in found.items()})
        log_sampling(sampling, [item.url for item in chosen])
    bad_fraction = DEFAULT_BAD_FRACTION if common.max_bad_fraction is None else common.max_bad_fraction
    separator = _separator(common.separator, chosen)
    return PreprocessJob(
        inputs=tuple(chosen),
        layout=layout,
        tokenizer=request.tokenizer,
        seq_len=common.seqlen,
        kind=common.format,
        options=ReadOptions(common.content_key, separator),
        seed=common.seed,
        shuffle=not common.no_shuffle,
        sampling=sampling,
        mixture=mixture.record() if mixture else None,
        split_documents=common.split_documents,
        drop_tail=common.drop_tail,
        max_bad_fraction=1.0 if common.skip_bad_lines else bad_fraction,
        memory_limit=_memory_limit(common.memory_limit),
        ray_address=common.ray_address,
        restart=common.restart,
        **request.running,
    )


def _check_flags(common: argparse.Namespace, mixture: Mixture | None) -> None:
    """ConfigError for flags that exclude each other, or that would do nothing."""
    from open_lm.errors import ConfigError, join_problems

    problems = []
    if common.dry_run and common.verify_tokenizer is not None:
        problems.append("--dry-run and --verify-tokenizer: give one of them")
    if common.skip_bad_lines and common.max_bad_fraction is not None:
        problems.append("--skip-bad-lines stands for --max-bad-fraction 1: give one of them")
    if common.separator == "":
        problems.append("--separator must not be empty; without it a text file is one document")
    if common.output_per_source and mixture is None:
        problems.append("--output-per-source: no source is named; give --source NAME=PATTERN or --mixture")
    if common.mixture_tokens is not None and not (mixture and mixture.rates):
        problems.append("--mixture-tokens needs the rates of a --mixture")
    elif common.mixture_tokens is not None and common.output_per_source:
        problems.append(
            "--mixture-tokens: with --output-per-source the mixing is done while training; give one of them"
        )
    if problems:
        raise ConfigError(join_problems(problems))
    if common.drop_tail and common.split_documents:
        warn_without_effect(["--drop-tail"], "with --split-documents there is no tail")


def _outside(layout: Layout, inputs: Iterable[InputFile], sources: Sequence[str]) -> list[InputFile]:
    """The inputs without the shards of the output, which may lie in a folder of them."""
    from open_lm import storage

    remote = storage.is_remote(layout.root)
    root = layout.root.rstrip("/") if remote else os.path.abspath(storage.local_path(layout.root))
    place = replace(layout, root=root)
    own = {place.folder(name) for source in sources for name in place.folders_of(source)}
    return [item for item in inputs if not (item.url.endswith(".tar") and item.url.rpartition("/")[0] in own)]


def _memory_limit(text: str | None) -> int | None:
    from open_lm.datapreprocess.memory import plan_budget
    from open_lm.errors import ConfigError
    from open_lm.storage import parse_bytes

    if text is None:
        return None
    try:
        limit = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--memory-limit: {error}") from error
    plan_budget(limit, workers=1)  # one worker must fit
    return limit


def _separator(text: str | None, inputs: Sequence[InputFile]) -> str | None:
    r"""The separator that a text with escapes such as \n and \u2028 stands for."""
    from open_lm.datapreprocess.readers import is_text
    from open_lm.errors import ConfigError

    if text is None:
        return None
    if not any(is_text(item.url) for item in inputs):
        warn_without_effect(["--separator"], "no input is a .txt or .md file")
    separator = _ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), text)
    try:
        separator.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--separator {text!r}: no text that UTF-8 can hold ({error.reason})") from error
    return separator


# --- mixtures ----------------------------------------------------------------------------------------------------


def _choose_mixture(request: Request) -> Mixture | None:
    """The command's own mixture with the files of --source, or what --mixture and --source say."""
    from open_lm.datapreprocess.mixtures import choose_mixture, parse_sources
    from open_lm.errors import ConfigError

    common = request.common
    if request.mixture is None:
        return choose_mixture(common.mixture, common.source)
    if common.mixture is not None:
        raise ConfigError(f"--mixture {common.mixture}: --do_sample already names a mixture; give one of them")
    return request.mixture.with_inputs(parse_sources(common.source))


def _sample_by_rate(job: PreprocessJob, request: Request, encoder: DocumentEncoder) -> PreprocessJob:
    """With rates and a single output, documents are left out or repeated so that the sources' shares come to them."""
    mixture = request.mixture
    if mixture is None or not mixture.rates or job.layout.per_source:
        return job
    from open_lm.datapreprocess.dry_run import estimate
    from open_lm.datapreprocess.mixtures import factors_for_rates
    from open_lm.errors import ConfigError

    if mixture.factors:
        raise ConfigError(
            f"{mixture.name}: has rates and sampling_frequencies, which both decide how often documents are taken; "
            "leave one of them out, or make a data set for each source (--output-per-source)"
        )
    tokens = {part.name: round(part.tokens) for part in estimate(job, encoder).sources}
    factors = factors_for_rates(tokens, mixture.rates, request.common.mixture_tokens)
    for name, factor in factors.items():
        _logger.info("mixture: about %s tokens of %s, taken %.4g times", f"{tokens.get(name, 0):,}", name, factor)
    mixed = replace(mixture, factors=factors)
    sampling = replace(job.sampling, factors=factors)
    return replace(job, sampling=sampling, mixture=mixed.record())


def _training_flags(job: PreprocessJob, mixture: Mixture) -> list[str]:
    """The flags that train on data sets of single sources at the mixture's rates."""
    from open_lm import storage
    from open_lm.datapreprocess.mixtures import training_flags
    from open_lm.datapreprocess.writer import MANIFEST

    if len(job.layout.folders) > 1:
        _logger.warning("the rates need one folder for each source: make the data sets with --num-consumers 1")
        return []
    return training_flags({name: storage.join(job.layout.root, name, MANIFEST) for name in job.sources}, mixture.rates)


# --- the tokenizer -----------------------------------------------------------------------------------------------


def _verify(job: PreprocessJob, encoder: DocumentEncoder, count: int) -> None:
    """Compare on the first documents of the inputs and on as many generated ones; DataError for any difference."""
    from itertools import islice

    from open_lm.datapreprocess.readers import TO_END, Piece, PieceReader
    from open_lm.datapreprocess.tokenizer_check import verify
    from open_lm.errors import ConfigError, DataError

    if count < 1:
        raise ConfigError(f"--verify-tokenizer must be at least 1, found {count}")

    pieces = (Piece(item.url, 0, TO_END, item.num_bytes) for item in job.inputs)
    blocks = (block for piece in pieces for block in PieceReader(piece, job.options))
    texts = (document for block in blocks for document in block.documents if isinstance(document, str))
    result = verify(encoder, count, islice(texts, count))
    print(result.summary())
    if result.differing:
        raise DataError(f"the fast tokenizer differs from the reference in {result.differing} texts")


# --- logging -----------------------------------------------------------------------------------------------------


def start_logging() -> None:
    """Messages of this package to standard error, when nothing else is set up."""
    if not logging.getLogger().handlers and not logging.getLogger("open_lm").handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("open_lm").addHandler(handler)
        logging.getLogger("open_lm").setLevel(logging.INFO)


def warn_without_effect(flags: Sequence[str], reason: str) -> None:
    """Say once that flags of the original command were given and change nothing here."""
    if flags:
        _logger.warning("%s: without effect here, %s", ", ".join(flags), reason)
