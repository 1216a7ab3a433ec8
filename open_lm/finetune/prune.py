"""Prune a model to a smaller student, which distillation then trains.

python -m open_lm.finetune.prune logs/teacher student --data data/manifest.jsonl --layers 12 --ffn-dim 2048
python -m open_lm.main --model student/model.json --pretrained student/epoch_0.pt --distill-pretrained logs/teacher …

The least important blocks, heads and hidden features are removed, measured on sequences of --data. The student's folder
has model.json, epoch_0.pt, pruning.json (scores and what remains) and the record of the teacher's tokenizer. Without
--layers, --heads or --ffn-dim the student has as many as the teacher.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from open_lm.config.command_line import FlagParser
from open_lm.errors import ConfigError, join_problems, run_cli
from open_lm.system.names import shard_pattern, user_path, weights_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from open_lm.finetune.distillation import TeacherSource
    from open_lm.finetune.pruning import Importance, Kept, Shape
    from open_lm.model.transformer import Transformer

REPORT, WEIGHTS = "pruning.json", "epoch_0.pt"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = FlagParser.of_program("open_lm.finetune.prune", __doc__)
    add = parser.add_argument
    add("teacher", type=weights_path, metavar="TEACHER", help="checkpoint, run folder or exported folder")
    add("output", type=user_path, metavar="FOLDER", help="folder to write, which must not exist")
    add("--model", type=user_path, metavar="NAME", help="architecture of the teacher (default: that of its run)")
    add("--data", type=shard_pattern, required=True, help="shards, as --train-data, or a manifest.jsonl")
    add("--data-key", default="txt", help="format of the samples in a shard (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="blocks of the student")
    add("--heads", type=int, metavar="N", help="query heads of each block")
    add("--ffn-dim", type=int, metavar="N", help="hidden width of each feed-forward network")
    add("--sequences", type=int, default=128, help="sequences to measure the importance on (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="sequences at a time (default: %(default)s)")
    add("--device", help="cuda, cuda:N or cpu (default: cuda if there is one)")
    add("--allow-other-tokenizer", action="store_true", help="accept data of another tokenizer than the teacher's")
    return parser


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: flags that do not fit the teacher, or a folder that exists.
        CheckpointError, DataError: a teacher or data that cannot be read.
    """
    args = build_parser().parse_args(argv)
    _check_counts(args)
    import torch

    from open_lm.config.distill_section import DistillConfig
    from open_lm.finetune.distillation import find_teacher
    from open_lm.finetune.pruning import check_shape, choose, measure, shape_of

    source = find_teacher(DistillConfig(distill_model=args.model, distill_pretrained=args.teacher))
    with torch.device("meta"):
        params = source.create().params
    given = {name: value for name in ("layers", "heads", "ffn_dim") if (value := getattr(args, name)) is not None}
    shape = replace(shape_of(params), **given)
    check_shape(params, shape)
    model = _load(source, args.device)
    importance = measure(model, _batches(args, model, source.weights))
    write_student(args.output, source, shape, importance, choose(params, importance, shape))


def _check_counts(args: argparse.Namespace) -> None:
    counts = {"--sequences": args.sequences, "--batch-size": args.batch_size}
    problems = [f"{flag}: found {value}, expected 1 or more" for flag, value in counts.items() if value < 1]
    if problems:
        raise ConfigError(join_problems(problems))


def _load(source: TeacherSource, device: str | None) -> Transformer:
    import torch

    from open_lm.finetune.distillation import load_teacher_alone

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {chosen}: found no CUDA device; use --device cpu")
    model: Any = load_teacher_alone(source, "fp32", chosen).model
    return model


def _batches(args: argparse.Namespace, model: Transformer, weights: str) -> Iterator[Tensor]:
    """Yield token ids (B,T) int64 of --sequences sequences on the model's device."""
    from open_lm.config.sections import DataConfig, ValidationConfig
    from open_lm.data.tokenizers import check_tokenizers
    from open_lm.data.validation_loader import build_val_loaders

    params, device = model.params, model.output.weight.device
    (loader,) = build_val_loaders(
        ValidationConfig(val_data=[args.data], val_num_samples=args.sequences * params.seq_len),
        DataConfig(data_key=args.data_key, workers=0),
        seq_len=params.seq_len,
        vocab_size=params.vocab_size,
        batch_size=args.batch_size,
    )
    check_tokenizers(loader.sources, [weights], args.allow_other_tokenizer)
    for batch in loader:
        yield batch.inputs[batch.filled].to(device)


def write_student(
    output: str, source: TeacherSource, shape: Shape, importance: Importance, chosen: dict[int, Kept]
) -> None:
    """Write the folder of the student; it appears when it is complete."""
    import torch

    from open_lm import storage
    from open_lm.checkpoint import read_model_state
    from open_lm.checkpoint.files import write_file
    from open_lm.config.architecture import MODEL_FILE
    from open_lm.data.tokenizers import copy_record
    from open_lm.finetune.pruning import student_keys, student_weights
    from open_lm.hf.folders import write_json
    from open_lm.hf.output_folder import whole_folder

    with torch.device("meta"):
        params = source.create().params
    keys = student_keys(params, sorted(chosen), shape)
    weights = read_model_state(source.weights)[0]
    pruned = student_weights(weights, params, chosen)
    sizes = [_num_parameters(state) for state in (weights, pruned)]
    report = {
        "teacher": source.weights,
        "parameters": {"teacher": sizes[0], "student": sizes[1]},
        "block_influence": importance.blocks.tolist(),
        "kept_blocks": sorted(chosen),
        "kept_key_heads": {str(layer): kept.key_heads.tolist() for layer, kept in chosen.items()},
        "kept_features": {str(layer): kept.features.tolist() for layer, kept in chosen.items()},
    }
    identity = {"prune": source.weights, **{name: report[name] for name in report if name != "block_influence"}}
    with whole_folder(output, MODEL_FILE, identity) as folder:
        copy_record(source.weights, folder)
        write_json(storage.join(folder, REPORT), report)
        state = {name: value.contiguous() for name, value in pruned.items()}
        write_file(storage.join(folder, WEIGHTS), {"epoch": 0, "name": "pruned", "state_dict": state})
        write_json(storage.join(folder, MODEL_FILE), keys)
    removed = sorted(set(range(params.n_layers)) - set(chosen))
    print("block influence: " + ", ".join(f"{n}: {value:.4f}" for n, value in enumerate(importance.blocks.tolist())))
    print(f"removed blocks: {', '.join(map(str, removed)) or 'none'}")
    print(f"{output}: {sizes[1]:,} of {sizes[0]:,} parameters remain ({sizes[1] / sizes[0]:.1%})")


def _num_parameters(state: dict[str, Tensor]) -> int:
    """Return the number of weights; tied ones count once, rotary frequencies not at all."""
    tensors = {value.data_ptr(): value for name, value in state.items() if not name.endswith("inv_freq")}
    return sum(value.numel() for value in tensors.values())


if __name__ == "__main__":
    sys.exit(run_cli(main))
