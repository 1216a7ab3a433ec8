"""Load and save the models that trainers of transformers update: the policies of preference optimization and RL."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_lm import storage
from open_lm.errors import CheckpointError, ConfigError, join_problems
from open_lm.hf.folders import CONFIG, read_json, write_json
from open_lm.hf.importing import OPENLM, read_model
from open_lm.hf.output_folder import whole_folder
from open_lm.hf.standalone.modeling_openlm import OpenLMForCausalLM

_WEIGHTS = (".safetensors", ".bin", ".index.json")
_MAX_LISTED = 8


def load_policy(folder: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load the model of a local folder: a class of transformers, or that of exports for model_type openlm.

    No code of the folder is run.

    Args:
        folder: an exported folder, or one that `convert import` accepts.
        dtype: of the weights.
        options: further arguments of from_pretrained, such as attn_implementation.

    Raises:
        ConfigError: an architecture that the native model does not implement.
        CheckpointError: weights are missing.
    """
    fields = read_json(storage.join(folder, CONFIG))
    read_model(fields, folder)
    is_openlm = fields["model_type"] == OPENLM
    loader: Any = OpenLMForCausalLM if is_openlm else AutoModelForCausalLM
    if is_openlm:
        options.pop("attn_implementation", None)
    model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        shown = ", ".join(missing[:_MAX_LISTED]) + (", …" if len(missing) > _MAX_LISTED else "")
        raise CheckpointError(join_problems([f"{len(missing)} weights are missing: {shown}"], folder))
    return model


def load_policy_tokenizer(folder: str) -> Any:
    """Load the tokenizer of a local folder. Raise ConfigError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{folder}: has no tokenizer ({reason}); export the model again with --tokenizer, or add tokenizer.json"
        ) from error


def save_policy(model: Any, base: str, target: str) -> None:
    """Write a trained model as a folder like that of `base`, from which it was loaded; only the weights are new.

    Raises:
        ConfigError: the folder `target` exists.
    """
    with whole_folder(target, CONFIG, {"policy": base}) as output:
        model.save_pretrained(output)
        for info in storage.list_infos(base):
            name = info.url.rpartition("/")[2]
            if not name.endswith(_WEIGHTS):
                storage.copy(info.url, storage.join(output, name))
        dtype = str(model.dtype).removeprefix("torch.")
        fields = read_json(storage.join(base, CONFIG))
        write_json(storage.join(output, CONFIG), {**fields, "dtype": dtype, "torch_dtype": dtype})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Omit progress bars, and warnings about names that trainers of transformers themselves use."""
    import transformers

    had_bars, tqdm_disable = transformers.logging.is_progress_bar_enabled(), os.environ.get("TQDM_DISABLE")
    transformers.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\.")
            yield
    finally:
        if had_bars:
            transformers.logging.enable_progress_bar()
        if tqdm_disable is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = tqdm_disable


def balancing_loss(model: Any) -> torch.Tensor | None:
    """Return the load-balancing loss of the last forward pass of a model of model_type openlm; None for others."""
    return model.model.balancing_loss() if isinstance(model, OpenLMForCausalLM) else None
