"""Find and load the checkpoints that a program evaluates, in every format that has a native model.

A checkpoint is an epoch_N.pt, a step_N folder, the file of an averager, another file of weights, or a folder in the
format of transformers; a run folder selects its checkpoints.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from open_lm import storage
from open_lm.checkpoint import candidates_at
from open_lm.checkpoint.files import epoch_files
from open_lm.checkpoint.folders import is_transformers_folder, step_folders
from open_lm.checkpoint.tensor_index import incomplete_reason
from open_lm.config.architecture import read_run_settings
from open_lm.config.sections import ModelConfig
from open_lm.errors import ConfigError
from open_lm.generate import load_model_for_generation
from open_lm.model.transformer import Transformer

RESULTS_FOLDER, EXAMPLES_FOLDER = "evals", "examples"  # the second one in the first one


def find_checkpoints(paths: Sequence[str], every: int | None = None) -> list[str]:
    """Return the checkpoints to evaluate.

    Args:
        paths: checkpoints, or run folders.
        every: evaluate every N-th checkpoint of a run folder, the newest included; None for the newest one only.

    Raises:
        CheckpointError: a path without a checkpoint.
    """
    checkpoints: list[str] = []
    for path in paths:
        found = _all_checkpoints(path) if every else []
        checkpoints += found[::-1][::every][::-1] if found else [candidates_at(path)[0].url]
    return list(dict.fromkeys(checkpoints))


def _all_checkpoints(path: str) -> list[str]:
    """Return the complete checkpoints of a run folder, oldest first; empty if the path is a checkpoint.

    If a run has both kinds, the sharded ones, which are more.
    """
    for folder in (storage.join(path, "checkpoints"), path):
        sharded = [url for url in step_folders(folder).values() if incomplete_reason(url) is None]
        if found := sharded or list(epoch_files(folder).values()):
            return found
    return []


def results_folder(checkpoint: str) -> str:
    """Return the folder of the results of a checkpoint: evals/ next to it."""
    return storage.join(checkpoint.rstrip("/").rpartition("/")[0] or ".", RESULTS_FOLDER)


def examples_folder(checkpoint: str) -> str:
    """Return the folder with the results of single examples."""
    return storage.join(results_folder(checkpoint), EXAMPLES_FOLDER)


def results_file(checkpoint: str, names: Sequence[str], is_partial: bool) -> str:
    """Return the path of the results of tasks with these names; partial results have a separate file."""
    name = checkpoint.rstrip("/").rpartition("/")[2].removesuffix(".pt")
    return storage.join(results_folder(checkpoint), "_".join([name, *names, *(["partial"] * is_partial)]) + ".json")


def model_name(checkpoint: str, model: str | None = None) -> str:
    """Return what selects the architecture of a checkpoint: `model`, the model of its run, or its own folder."""
    return model or str(read_run_settings(checkpoint).get("model") or checkpoint)


def load_checkpoint(
    checkpoint: str,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Load the model of a checkpoint in float32, in evaluation mode.

    Args:
        checkpoint: a result of `find_checkpoints`.
        model: name or file of the model configuration; None for that of the checkpoint's run, of model.json next to
            it, or of the config.json in a folder of transformers.
        settings: fields of ModelConfig that take precedence over those of the run.
        device: where the weights are placed.

    Raises:
        ConfigError: nothing says which model it is, or a model of transformers that has no native one.
        CheckpointError: a checkpoint that is damaged or does not fit the model.
    """
    run_settings = read_run_settings(checkpoint)
    if not (model or run_settings.get("model")) and is_transformers_folder(checkpoint):
        from open_lm.hf.native_weights import read_params

        return load_model_for_generation(checkpoint, read_params(checkpoint), str(device))
    section = {**run_settings, **(settings or {}), **({"model": model} if model else {})}
    if not section.get("model"):
        raise ConfigError(
            f"--model-config is missing, and the run folder of {checkpoint} has no params.txt; pass the .json file or "
            "the name of the checkpoint's configuration"
        )
    return load_model_for_generation(checkpoint, ModelConfig.from_object(Namespace(**section)), str(device))
