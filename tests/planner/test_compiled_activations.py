"""Compare the planned activations of compiled blocks with what the partitioner of torch.compile saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config
from open_lm.model.transformer import create_model
from open_lm.planner.activations import element_sizes, saved_by_block, total_bytes
from open_lm.planner.shapes import shape_of

BATCH, LENGTH, WIDTH = 2, 256, 256


@pytest.mark.parametrize(
    ("keys", "precision"),
    [({"model_norm": "rms_norm", "ffn_type": "geglu_tanh"}, "bf16"), ({}, "amp_bfloat16")],
)
def test_saved_bytes_match_those_of_compiled_blocks(keys: dict[str, Any], precision: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    counts = {"hidden_dim": WIDTH, "n_layers": 1, "n_heads": 4, "seq_len": LENGTH, "vocab_size": 50}
    path.write_text(json.dumps({**counts, "post_embed_norm": False, "weight_tying": False, **keys}))
    config = Config.from_namespace(parse_args(["--model", str(path), "--precision", precision]))
    shape, sizes = shape_of(config.model), element_sizes(config, "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    block = create_model(config.model).to(dtype).train().layers[0]
    matrices = sum(p.numel() for p in block.parameters() if p.ndim > 1) * sizes.compute
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.zeros(BATCH, LENGTH, WIDTH, dtype=dtype, requires_grad=True) + 1
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=sizes.autocast)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), autocast:
        compiled(x)
    measured = sum(storage.nbytes() for storage in saved.values()) - (matrices if sizes.autocast else 0)
    planned, eager = (
        total_bytes(saved_by_block(shape, sizes, 0, compiled=is_compiled), BATCH * LENGTH)
        for is_compiled in (True, False)
    )
    assert planned == pytest.approx(measured, rel=0.02)
    assert planned < 0.9 * eager
