"""Convert models between the format of transformers and that of this package, in both directions.

    python -m open_lm.hf.convert import meta-llama/Llama-2-7b-hf models/llama2
    python -m open_lm.hf.convert export logs/NAME exported

`import` writes a folder that training starts from: --model models/llama2/model.json --pretrained
models/llama2/epoch_0.pt. `export` writes a folder that transformers loads without this package. Both read and write
local folders and URLs (s3://, gs://, …), one tensor at a time. The folder appears when it is complete; repeat the same
command after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from open_lm.config.command_line import FlagParser
from open_lm.system.names import user_path
from open_lm.system.program import program_name

DTYPES = ("float32", "bfloat16", "float16")
_OTHER_NAMES = {"--checkpoint_dir", "--checkpoint-dir", "--output_file", "--output-file"}


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser.of_program("open_lm.hf.convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import | export")
    importer = commands.add_parser("import", help="from transformers to this package", allow_abbrev=False)
    importer.add_argument(
        "source", type=user_path, metavar="SOURCE", help="folder or URL with config.json and weights, or a hub name"
    )
    _add_common(importer)
    importer.add_argument(
        "--model",
        type=user_path,
        metavar="NAME",
        help="model configuration that the result must have, by name or .json file, such as llama2_7b, open_llama_3b, "
        "tinyllama_1b, mistral_7b, gemma_2b, phi_2 (default: from config.json)",
    )
    importer.add_argument(
        "--vocab-multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the rows of the vocabulary to a multiple of N; an export removes them (default: %(default)s)",
    )
    exporter = commands.add_parser("export", help="from this package to transformers", allow_abbrev=False)
    exporter.add_argument(
        "source",
        type=user_path,
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step_N folder or epoch_N.pt, local or a URL",
    )
    _add_common(exporter)
    exporter.add_argument(
        "--model", type=user_path, metavar="NAME", help="model configuration, for weights without a run"
    )
    exporter.add_argument(
        "--tokenizer", type=user_path, help="tokenizer, for runs that do not record theirs (default: that of the run)"
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=user_path, metavar="DEST", help="folder or URL to write, which must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: unchanged)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="afterwards compare the logits of both models in float32; needs memory for both",
    )


def with_subcommand(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `import SOURCE DEST` in place of --checkpoint_dir SOURCE --output_file DEST."""
    if not any(argument.partition("=")[0] in _OTHER_NAMES for argument in argv):
        return list(argv)
    parser = FlagParser(prog=program_name("open_lm.hf.convert"), allow_abbrev=False)
    parser.add_argument("--checkpoint_dir", "--checkpoint-dir", type=user_path, required=True)
    parser.add_argument("--output_file", "--output-file", type=user_path, required=True)
    named, rest = parser.parse_known_args(list(argv))
    return ["import", named.checkpoint_dir, named.output_file, *(word for word in rest if word != "import")]
