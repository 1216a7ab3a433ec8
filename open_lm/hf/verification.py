"""Compare the logits of a converted model with those of its original, in float32."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from open_lm import storage
from open_lm.config.architecture import read_run_settings
from open_lm.config.sections import ModelConfig
from open_lm.errors import CheckpointError
from open_lm.hf.folders import CONFIG, MODEL, local_copy, read_json
from open_lm.hf.folding import Folding, fold
from open_lm.model.transformer import Transformer

TOLERANCE = 1e-5  # of float32 logits, relative to the largest
_ROWS, _MAX_TOKENS = 2, 64


def verify_import(source: str, target: str) -> None:
    """Compare an imported model with the folder of transformers that it comes from.

    Raises:
        CheckpointError: logits that differ by more than rounding errors.
    """
    checkpoint = storage.join(target, "epoch_0.pt")
    native = _native_model(checkpoint, storage.join(target, MODEL))
    dtype = next(iter(_stored_dtypes(checkpoint)))
    with local_copy(source) as folder:
        _compare(native, _hf_model(folder, dtype), target)


def verify_export(checkpoint: str, target: str, model: str | None = None) -> None:
    """Compare an exported folder with the checkpoint that it comes from; otherwise as `verify_import`."""
    settings = read_run_settings(checkpoint)
    if model is not None:
        settings["model"] = model
    with local_copy(target) as folder:
        hf = _hf_model(folder, None)
        dtype = getattr(torch, read_json(storage.join(folder, CONFIG))["dtype"])
        native = _native_model(checkpoint, **settings)
        if Folding(native.params).changes:  # before rounding, which differs for folded weights
            folded = fold(native)
            _check_difference(native, folded, target)
            native = folded
        _round(native, dtype)
        _compare(native, hf, target)


def _native_model(checkpoint: str, model: str, **settings: Any) -> Transformer:
    from open_lm.checkpoint import load_weights
    from open_lm.model.initialization import reset_buffers
    from open_lm.model.transformer import create_model

    section = ModelConfig.from_object(Namespace(model=model, **settings))
    with torch.device("meta"):
        native = create_model(section)
    native.to_empty(device="cpu")
    reset_buffers(native)
    load_weights(checkpoint, native)
    return native.eval()


def _stored_dtypes(checkpoint: str) -> set[torch.dtype]:
    from open_lm.checkpoint import read_model_state

    return {tensor.dtype for tensor in read_model_state(checkpoint)[0].values()}


def _hf_model(folder: str, dtype: torch.dtype | None) -> nn.Module:
    """Load a folder with transformers, in float32 after rounding to `dtype`."""
    model: nn.Module = _class_of(folder).from_pretrained(folder).float()
    _round(model, dtype)
    return model.eval()


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Round parameters to a dtype, as a conversion does, but not buffers such as rotary frequencies."""
    for parameter in model.parameters() if dtype is not None else ():
        parameter.data = parameter.data.to(dtype).float()


def _class_of(folder: str) -> Any:
    """Return the class of a folder's model; that of model_type openlm has the source files that an export copies."""
    if read_json(storage.join(folder, CONFIG)).get("model_type") == "openlm":
        from open_lm.hf.standalone.modeling_openlm import OpenLMForCausalLM

        return OpenLMForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _compare(native: Transformer, hf: Any, label: str) -> None:
    """Compare the logits of a native model with those of its conversion, and print the result."""
    tokens, difference = _check_difference(native, hf, label)
    print(f"verified: the logits of {tokens} tokens differ by at most {difference:.1e} of the largest logit")


@torch.no_grad()
def _check_difference(native: Transformer, other: Any, label: str) -> tuple[int, float]:
    """Return the number of compared tokens, and the difference of the logits relative to the largest.

    `other` is a native model or one of transformers. Raise CheckpointError if they differ by more than rounding errors.
    """
    params = native.params
    num_ids = params.unpadded_vocab_size or params.vocab_size
    length = min(_MAX_TOKENS, params.seq_len)
    ids = torch.randint(num_ids, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    result = other(ids)
    expected: Tensor = (result[0] if isinstance(other, Transformer) else result.logits).float()[..., :num_ids]
    actual = native(ids)[0][..., :num_ids]
    difference = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{label}: the logits of the two models differ by {difference:.1e} of the largest logit, expected at most "
            f"{TOLERANCE:.0e}; do not use this conversion"
        )
    return ids.numel(), difference
