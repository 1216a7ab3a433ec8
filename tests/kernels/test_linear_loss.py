"""The chunked loss of a linear head compared with the loss of all logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_processes import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from open_lm.data.masking import IGNORE_INDEX
from open_lm.kernels import linear_loss, native, products
from open_lm.kernels.linear_loss import linear_cross_entropy
from open_lm.kernels.native import elements
from open_lm.model.losses import TokenLoss, logit_mean
from open_lm.model.transformer import Params, Transformer

Z = 1e-2


def inputs(tokens: int = 90, vocab: int = 53, dim: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return hidden (N,D), weight (V,D), targets (N,); every fifth token has no target."""
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """Return losses (N,) computed from all logits, which half precision rounds."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses + z * torch.logsumexp(logits, -1).square() * (targets != IGNORE_INDEX)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0, per_token: bool = False) -> Tensor:
    return linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE_INDEX, z_loss_coefficient=z, per_token=per_token
    )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 32 tokens and small blocks, so that the last chunk and the last block are not full."""
    monkeypatch.setattr(linear_loss, "_chunk_rows", lambda hidden: 32)
    monkeypatch.setattr(linear_loss, "_BLOCK_BYTES", 4 * 53 * 5)
    monkeypatch.setattr(products, "_CAST_ROWS", 10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("z", [0.0, Z])
def test_gradients_equal_finite_differences(z: float) -> None:
    hidden, weight, targets = inputs(35, 11, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked(h, w, targets, z, per_token=True), (hidden, weight))
    summed, per_token = chunked(hidden, weight, targets, z), chunked(hidden, weight, targets, z, per_token=True)
    torch.testing.assert_close(summed, per_token.sum())
    found, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (summed, per_token.sum()))
    torch.testing.assert_close(found, expected)


@pytest.fixture(params=["native", "cpu", "gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Select the code path: native CPU kernels, torch on a CPU, or other devices (which also works on a CPU)."""
    if request.param != "native":
        monkeypatch.setattr(elements, "supports", lambda *tensors: False)
    elif not native.processor_features() >= native.VECTORS:
        pytest.skip("this CPU has no AVX-512 with bfloat16")
    if request.param == "gpu":
        monkeypatch.setattr(linear_loss, "_on_cpu", lambda tensor: False)


@pytest.mark.usefixtures("small_chunks", "path")
@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.parametrize("missing", ["none", "some", "all"])
def test_float32_equals_the_loss_of_all_logits(z: float, missing: str) -> None:
    hidden, weight, targets = inputs()
    targets = {"none": targets.clamp(min=0), "some": targets, "all": torch.full_like(targets, IGNORE_INDEX)}[missing]
    expected, found = reference(hidden, weight, targets, z), chunked(hidden, weight, targets, z, per_token=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    total = chunked(hidden, weight, targets, z)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)
    loss_grads = torch.linspace(-1, 2, len(targets))
    for chunked_loss, full_loss in ((3 * total, 3 * expected.sum()), (found @ loss_grads, expected @ loss_grads)):
        pairs = zip(
            *(torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (chunked_loss, full_loss)),
            strict=True,
        )
        for gradient, expected_grad in pairs:
            torch.testing.assert_close(gradient, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks", "path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])  # with 4, most of a token's probability is on one target
def test_half_precision_is_as_accurate_as_all_logits(dtype: torch.dtype, autocast: bool, scale: float) -> None:
    hidden, weight, targets = inputs(600, 203, 16, torch.float32 if autocast else dtype)
    with torch.no_grad():
        hidden *= scale
        targets[1::2] = F.linear(hidden, weight).argmax(1)[1::2]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference(*exact, targets, Z)
    exact_results = [truth.detach(), *torch.autograd.grad(truth.sum() / 7, exact)]
    errors = []
    for losses in (reference, lambda *args: chunked(*args, per_token=True)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = losses(hidden, weight, targets, Z)
            total = found.sum() if losses is reference else chunked(hidden, weight, targets, Z)
        assert found.dtype == total.dtype == torch.float32
        results = [found.detach(), *torch.autograd.grad(total / 7, (hidden, weight))]
        assert [x.dtype for x in results[1:]] == [hidden.dtype, weight.dtype]
        errors.append([(x.double() - y).norm() / y.norm() for x, y in zip(results, exact_results, strict=True)])
    for name, full_error, chunked_error in zip(("loss", "hidden", "weight"), *errors, strict=True):
        assert chunked_error <= 1.25 * full_error + 1e-6, name


@pytest.mark.usefixtures("small_chunks", "path")
def test_strided_gradients_of_per_token_losses() -> None:
    """The gradient of a sum is one expanded number."""
    hidden, weight, targets = inputs(40, dtype=torch.bfloat16)
    losses = chunked(hidden, weight, targets.clamp(min=0), per_token=True)
    weights = torch.tensor(0.5).expand(40), torch.full((40,), 0.5), torch.full((40, 2), 0.5)[:, 0]
    found = [torch.autograd.grad(losses, (hidden, weight), x, retain_graph=True) for x in weights]
    assert all(torch.equal(a, b) for gradients in found[1:] for a, b in zip(gradients, found[0], strict=True))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate_to_the_loss(value: float) -> None:
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        weight[3] = value
    targets = torch.zeros_like(targets)
    assert not chunked(hidden, weight, targets).isfinite()
    losses = chunked(hidden, weight, targets, per_token=True)
    assert not (losses.isfinite() & (hidden.detach() @ weight.detach()[3] != -math.inf)).any()


def test_improbable_targets_keep_their_loss_and_gradient() -> None:
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    hidden = torch.tensor([[300.0], [20.0], [-2.0]], requires_grad=True)
    losses = chunked(hidden, weight, torch.tensor([1, 1, 0]), per_token=True)
    torch.testing.assert_close(losses, torch.tensor([300.0, 20.0, 2.0 + torch.log1p(torch.tensor(-2.0).exp()).item()]))
    torch.testing.assert_close(torch.autograd.grad(losses[0], hidden)[0][0], torch.tensor([1.0]))


def test_a_scaled_float16_loss_preserves_small_gradients() -> None:
    """As with GradScaler: gradients too small for float16 are correct after division by the scale."""
    hidden, weight, targets = inputs(64, 31, dtype=torch.float16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(reference(*exact, targets).sum() / 1e6, exact)
    scale = 2.0**20
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(chunked(hidden, weight.float(), targets) / 1e6 * scale, (hidden, weight))
    for gradient, expected_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.float() / scale, expected_grad.float(), rtol=1e-2, atol=1e-8)


def test_only_required_gradients_are_computed() -> None:
    hidden, weight, targets = inputs()
    expected = chunked(hidden, weight, targets).detach()
    with torch.no_grad():
        assert not chunked(hidden, weight, targets).requires_grad
    frozen = chunked(hidden, weight.detach(), targets)
    (found,) = torch.autograd.grad(frozen, hidden)
    (expected_grad,) = torch.autograd.grad(reference(hidden, weight, targets).sum(), hidden)
    torch.testing.assert_close(found, expected_grad)
    assert not chunked(hidden.detach(), weight.detach(), targets).requires_grad
    torch.testing.assert_close(frozen.detach(), expected, rtol=0, atol=0)


def test_a_second_backward_pass_raises() -> None:
    hidden, weight, targets = inputs()
    loss = chunked(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_targets_outside_the_vocabulary_raise() -> None:
    hidden, weight, targets = inputs()
    targets[3] = 53
    with pytest.raises(IndexError, match="53"):
        chunked(hidden, weight, targets)


@pytest.mark.parametrize("compiled", [False, True])
def test_model_gradients(compiled: bool) -> None:
    """The gradients equal those from logits, with tied weights and accumulation, and also in a compiled model."""
    torch.manual_seed(0)
    model = Transformer(Params(dim=16, n_layers=1, n_heads=2, vocab_size=61, seq_len=12, weight_tying=True))
    call = torch.compile(model, backend="eager") if compiled else model
    ids = torch.randint(61, (2, 3, 13), generator=torch.Generator().manual_seed(1))
    for batch in ids:
        TokenLoss(batch[:, 1:], Z).from_logits(model(batch[:, :-1])[0]).backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for batch in ids:
        call(batch[:, :-1], loss=TokenLoss(batch[:, 1:], Z))[0].backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- sharded vocabularies
def sharded_loss_equals_full_loss(rank: int, folder: Path) -> None:
    """Run on each of three ranks: even and uneven vocabularies, one and several chunks, float32 and bfloat16."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    linear_loss._chunk_rows = lambda hidden: 32  # type: ignore[assignment]
    for vocab in (51, 53):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            hidden, weight, targets = inputs(90, vocab, 8, dtype)
            sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
            for z in (0.0, Z):
                full_loss, sharded_loss = chunked(hidden, weight, targets, z), chunked(hidden, sharded, targets, z)
                torch.testing.assert_close(sharded_loss, full_loss, rtol=tolerance, atol=1e-4)
                expected_grads = torch.autograd.grad(full_loss, (hidden, weight))
                found = torch.autograd.grad(sharded_loss, (hidden, sharded))
                assert isinstance(found[1], DTensor) and found[1].placements == (Shard(0),)
                assert found[1].to_local().shape == sharded.to_local().shape
                torch.testing.assert_close(found[0], expected_grads[0], rtol=tolerance, atol=tolerance * 10)
                torch.testing.assert_close(
                    found[1].full_tensor(), expected_grads[1], rtol=tolerance, atol=tolerance * 10
                )
                assert_same_on_ranks(sharded_loss.detach(), found[0])
                tokens = chunked(hidden, sharded, targets, z, per_token=True)
                torch.testing.assert_close(
                    tokens, chunked(hidden, weight, targets, z, per_token=True), rtol=tolerance, atol=tolerance
                )
            torch.testing.assert_close(logit_mean(hidden[None], sharded), logit_mean(hidden[None], weight))
    unsupported_shardings_raise(mesh)


def assert_same_on_ranks(*values: Tensor) -> None:
    for value in values:
        gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, value)
        assert all(torch.equal(other, value) for other in gathered)


def unsupported_shardings_raise(mesh: torch.distributed.DeviceMesh) -> None:
    hidden, weight, targets = inputs(10, 4)
    with pytest.raises(ValueError, match="without a row"):
        chunked(hidden, distribute_tensor(weight.detach(), mesh, [Shard(0)]), targets)
    with pytest.raises(ValueError, match="expected"):
        chunked(hidden, distribute_tensor(weight.detach(), mesh, [Replicate()]), targets)


@pytest.mark.processes
def test_sharded_vocabulary(tmp_path: Path) -> None:
    on_ranks(sharded_loss_equals_full_loss, tmp_path, 3)


def test_logit_mean() -> None:
    hidden, weight, _ = inputs()
    torch.testing.assert_close(logit_mean(hidden[None], weight), F.linear(hidden, weight).mean().detach())
