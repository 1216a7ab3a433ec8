"""Compare the parametrization (--mup) of a checkpoint's run with that of the model that loads the checkpoint.

The weights have the same names and shapes with every parametrization, but compute different results.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from torch import nn

from open_lm.config.architecture import read_run_settings, resolve_architecture
from open_lm.config.sections import ModelConfig
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model.params import Params, params_from_keys
from open_lm.parallel.parallelize import unwrap


def check_parametrization(path: str, model: nn.Module) -> None:
    """Raise CheckpointError if the run of a checkpoint had another parametrization than the model.

    Do not check a checkpoint without a record of its model, or a model of transformers. Warn if the record cannot be
    read and the run of the checkpoint or the model has muP.
    """
    params = getattr(unwrap(model), "params", None)
    settings = read_run_settings(path)
    if "model" not in settings or not isinstance(params, Params):
        return
    try:
        saved = _saved_params(settings)
    except ConfigError as error:  # the file of the model is gone or was changed
        if settings.get("mup") or not params.parametrization.is_standard:
            logging.warning(f"{path}: its parametrization (--mup) is not compared with that of this run: {error}")
        return
    before, now = _flags(saved), _flags(params)
    if before != now:
        export = "start from its export (python -m open_lm.hf.convert export), which needs no --mup"
        raise CheckpointError(
            f"{path}: was trained {before}, but this run is {now}, and the weights would compute something else; "
            + ("remove --mup" if saved.parametrization.is_standard else f"use the same flags, or {export}")
        )


def _saved_params(settings: dict[str, Any]) -> Params:
    """Return the architecture of a run, with a default attention kernel, since its own may be missing here."""
    keys = resolve_architecture(ModelConfig.from_object(Namespace(**settings)))
    return params_from_keys({**keys, "attn_name": "auto"})


def _flags(params: Params) -> str:
    if params.parametrization.is_standard:
        return "without --mup"
    return f"with --mup --mup-base-width {params.mup_base_width} --mup-base-head-dim {params.mup_base_head_dim}"
