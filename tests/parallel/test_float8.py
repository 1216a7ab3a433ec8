"""Blocks that multiply in 8-bit floating point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.errors import ConfigError
from open_lm.kernels.linear import FusedLinear
from open_lm.model.losses import TokenLoss
from open_lm.model.transformer import Params, Transformer
from open_lm.parallel.float8 import check_float8, check_micro_batch_tokens, convert_to_float8
from open_lm.parallel.parallelize import parallelize

IDS = torch.arange(64).view(2, 32)


def model(dim: int = 64, **shape: object) -> Transformer:
    made = Transformer(Params(**{"dim": dim, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "seq_len": 32, **shape}))
    made.reset_parameters(seed=1)
    return made


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ConfigError, match=r"--fp8 needs a CUDA device of compute capability 8\.9"):
        check_float8(torch.device("cpu"))


@pytest.mark.parametrize(("ffn_type", "layers"), [("swiglu", 4), ("gelu", 4), ("gemma_geglu", 5)])
def test_layers_keep_their_names_and_parts(ffn_type: str, layers: int) -> None:
    """On a CPU, where torchao computes in float32 what a device would in 8 bits."""
    pytest.importorskip("torchao")
    plain, converted = model(ffn_type=ffn_type), model(ffn_type=ffn_type)
    assert convert_to_float8(converted.layers, emulate=True) == 2 * layers
    assert converted.state_dict().keys() == plain.state_dict().keys()
    parts = [each.parts for each in plain.modules() if isinstance(each, FusedLinear)]
    assert [each.parts for each in converted.modules() if isinstance(each, FusedLinear)] == parts
    for each in (plain, converted):
        each(IDS, loss=TokenLoss(IDS))[0].backward()
    assert 1e-3 < relative_error(converted(IDS)[0], plain(IDS)[0]) < 0.2
    for name, parameter in converted.named_parameters():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 0.3, name


def test_matrices_that_devices_cannot_multiply_so_are_left() -> None:
    pytest.importorskip("torchao")
    for made, ranks, widths in (
        (model(dim=40), 1, "multiples of 16;"),
        (model(ffn_type="gelu"), 8, "multiples of 128, 16"),
    ):
        with pytest.raises(ConfigError, match=f"--fp8 needs widths that are {widths}.* all matrices .*in_proj from"):
            convert_to_float8(made.layers, ranks, emulate=True)
    with pytest.raises(ConfigError, match=r"--fp8: the blocks have no torch\.nn\.Linear"):
        convert_to_float8([torch.nn.ReLU()], emulate=True)
    experts = model(moe_freq=1, moe_num_experts=16)
    assert convert_to_float8(experts.layers, emulate=True) == 4
    assert type(experts.layers[0].feed_forward.router.layer) is torch.nn.Linear


def test_some_matrices_that_are_left_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao")
    made = model()
    made.layers[0].feed_forward.w3 = torch.nn.Linear(24, 64)
    assert convert_to_float8(made.layers, emulate=True) == 7
    assert "1 of 8 matrices of the blocks have others (w3 from 24 to 64)" in caplog.text


@pytest.mark.parametrize(
    ("rows", "length", "layout", "given"),
    [
        (4, 20, MeshLayout(), "2 sequences x 20 = 40 tokens: give --global-batch-size a multiple of 8 (--batch-size of 4)"),
        (8, 20, MeshLayout(2, 2), "1 sequences x 20 = 20 tokens: give --global-batch-size a multiple of 32 "),
        (4, 40, MeshLayout(context=2), "2 sequences x 40 / --context-parallel 2 = 40 tokens: give --global-batch-size a "),
    ],
)
def test_tokens_that_devices_cannot_sum_over_are_told(rows: int, length: int, layout: MeshLayout, given: str) -> None:
    with pytest.raises(ConfigError, match="--fp8 needs a multiple of 16 tokens in a rank's micro-batch") as refused:
        check_micro_batch_tokens(rows, 2, length, layout)
    assert given in str(refused.value)
    check_micro_batch_tokens(rows * 16, 2, length, layout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_multiply_in_8_bits() -> None:
    pytest.importorskip("torchao")
    device, ids = torch.device("cuda"), IDS.cuda()
    check_float8(device)
    plain = model(dim=256).to(device)
    made = model(dim=256)
    trained = parallelize(
        made, MeshLayout(), ParallelConfig(), device=device, model_cfg=ModelConfig(torchcompile=True), fp8=True
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = plain(ids)[0]
        found = trained(ids)[0]
        trained(ids, loss=TokenLoss(ids))[0].backward()
    assert 1e-3 < relative_error(found, expected) < 0.2
    assert all(parameter.grad is not None for parameter in trained.parameters())
