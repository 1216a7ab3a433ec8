"""Conversion of blocks to fp8 and its requirements."""

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
    params = Params(**{"dim": dim, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "seq_len": 32, **shape})
    transformer = Transformer(params)
    transformer.reset_parameters(seed=1)
    return transformer


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_devices_without_fp8_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"--fp8 needs a CUDA device of compute capability 8\.9"):
        check_float8(torch.device("cpu"))


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"ffn_type": "swiglu"}, 4),
        ({"ffn_type": "gelu"}, 4),
        ({"ffn_type": "gemma_geglu"}, 5),
        ({"n_kv_heads": 2, "qkv_bias": True, "ffn_bias": True, "ffn_type": "geglu_tanh"}, 5),
    ],
)
def test_layers_keep_their_names_and_parts(keys: dict[str, object], layers: int) -> None:
    """On a CPU torchao emulates fp8 products in float32."""
    pytest.importorskip("torchao")
    plain, converted = model(**keys), model(**keys)
    assert convert_to_float8(converted.layers, emulate=True) == 2 * layers
    assert converted.state_dict().keys() == plain.state_dict().keys()
    parts = [each.parts for each in plain.modules() if isinstance(each, FusedLinear)]
    assert [each.parts for each in converted.modules() if isinstance(each, FusedLinear)] == parts
    for each in (plain, converted):
        each(IDS, loss=TokenLoss(IDS))[0].backward()
    assert 1e-3 < relative_error(converted(IDS)[0], plain(IDS)[0]) < 0.2
    for name, parameter in converted.named_parameters():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 0.3, name


def test_matrices_with_unsuitable_widths_are_not_converted() -> None:
    pytest.importorskip("torchao")
    for unsuitable, ranks, widths in (
        (model(dim=40), 1, "multiples of 16;"),
        (model(ffn_type="gelu"), 8, r"multiples of 128 \(16 on each of 8 --tensor-parallel ranks\);"),
    ):
        with pytest.raises(ConfigError, match=f"--fp8 needs widths that are {widths} no matrix .*in_proj from"):
            convert_to_float8(unsuitable.layers, ranks, emulate=True)
    with pytest.raises(ConfigError, match=r"--fp8: the blocks have no torch\.nn\.Linear"):
        convert_to_float8([torch.nn.ReLU()], emulate=True)
    experts = model(moe_freq=1, moe_num_experts=16)
    assert convert_to_float8(experts.layers, emulate=True) == 4
    assert type(experts.layers[0].feed_forward.router.layer) is torch.nn.Linear


def test_unconverted_matrices_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao")
    mixed = model()
    mixed.layers[0].feed_forward.w3 = torch.nn.Linear(24, 64)
    assert convert_to_float8(mixed.layers, emulate=True) == 7
    assert (
        "1 of 8 matrices of the blocks do not have such widths and are not converted to fp8: w3 from 24 to 64"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("sequences", "length", "layout", "message"),
    [
        (
            4,
            20,
            MeshLayout(),
            "2 sequences x 20 = 40 tokens: set --global-batch-size to a multiple of 8 (--batch-size to a multiple of 4",
        ),
        (8, 20, MeshLayout(2, 2), "1 sequences x 20 = 20 tokens: set --global-batch-size to a multiple of 32 "),
        (4, 40, MeshLayout(context=2), "2 sequences x 40 / --context-parallel 2 = 40 tokens: set --global-batch-size "),
    ],
)
def test_unsuitable_numbers_of_tokens_are_rejected(
    sequences: int, length: int, layout: MeshLayout, message: str
) -> None:
    with pytest.raises(ConfigError, match="--fp8 needs a multiple of 16 tokens in a rank's micro-batch") as error:
        check_micro_batch_tokens(sequences, 2, length, layout)
    assert message in str(error.value)
    check_micro_batch_tokens(sequences * 16, 2, length, layout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_in_fp8() -> None:
    pytest.importorskip("torchao")
    device, ids = torch.device("cuda"), IDS.cuda()
    check_float8(device)
    plain = model(dim=256).to(device)
    model_cfg = ModelConfig(torchcompile=True)
    converted = parallelize(
        model(dim=256), MeshLayout(), ParallelConfig(), device=device, model_cfg=model_cfg, fp8=True
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = plain(ids)[0]
        logits = converted(ids)[0]
        converted(ids, loss=TokenLoss(ids))[0].backward()
    assert 1e-3 < relative_error(logits, expected) < 0.2
    assert all(parameter.grad is not None for parameter in converted.parameters())
