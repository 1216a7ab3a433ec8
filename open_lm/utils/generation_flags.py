"""What the programs that generate text share: their flags, and the model of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from open_lm.config.architecture import read_run_settings
from open_lm.config.command_line import add_model_args
from open_lm.config.sections import ModelConfig
from open_lm.data.tokenizers import add_tokenizer_args
from open_lm.errors import ConfigError
from open_lm.system.names import user_path

if TYPE_CHECKING:
    from open_lm.generate.sampling import Sampling
    from open_lm.model.transformer import Transformer


def add_source_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model and its tokenizer."""
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


def add_sampling_args(parser: argparse.ArgumentParser, max_new_tokens: str, default: int) -> argparse._ArgumentGroup:
    """Add the flags of `Sampling` and return their group; `max_new_tokens` is the help text of that flag."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        "--max-gen-len",
        type=int,
        default=default,
        help=f"{max_new_tokens} (default: %(default)s)",
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
    return group


def sampling_of(args: argparse.Namespace, **settings: Any) -> Sampling:
    """Return the `Sampling` of the flags, with further `settings`."""
    from open_lm.generate.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(args, name) for name in names}, **settings)


def add_architecture_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the architecture; only those that are given become attributes."""
    shape = parser.add_argument_group(
        "architecture (only for settings that are neither in the model config nor in the run)"
    )
    add_model_args(shape)  # type: ignore[arg-type]
    for action in shape._group_actions:
        action.default = argparse.SUPPRESS


def find_checkpoint(path: str) -> str:
    """Return the checkpoint at a path, which may be a run folder."""
    from open_lm.checkpoint import candidates_at

    checkpoint = candidates_at(path)[0].url
    if checkpoint != path.rstrip("/"):
        print(f"using the newest checkpoint: {checkpoint}", file=sys.stderr)
    return checkpoint


def load_model(args: argparse.Namespace, checkpoint: str) -> Transformer:
    """Return the model of a checkpoint for the flags of this module, in evaluation mode.

    Raises:
        ConfigError: an unknown model or device.
        CheckpointError: a checkpoint that is missing or damaged, or has other shapes.
    """
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
