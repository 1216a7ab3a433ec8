"""The loss of a linear head over chunks: what all logits at once give, and as exact."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_helpers import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from open_lm.kernels import linear_loss, native
from open_lm.kernels.linear_loss import linear_cross_entropy
from open_lm.kernels.native import elements
from open_lm.model.losses import IGNORE_INDEX, TokenLoss, logit_mean
from open_lm.model.transformer import Params, Transformer

Z = 1e-2


def inputs(tokens: int = 90, vocab: int = 53, dim: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden (N,D), weight (V,D), targets (N,), of which every fifth is missing."""
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """Losses (N,) from all logits, which half precision rounds."""
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
    """Chunks of 32 tokens and blocks of few rows, so that the last of each is not full."""
    monkeypatch.setattr(linear_loss, "_chunk_rows", lambda hidden: 32)
    monkeypatch.setattr(linear_loss, "_BLOCK_BYTES", 4 * 53 * 5)
    monkeypatch.setattr(linear_loss, "_CAST_ROWS", 10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("z", [0.0, Z])
def test_gradients_are_those_of_finite_differences(z: float) -> None:
    hidden, weight, targets = inputs(35, 11, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked(h, w, targets, z, per_token=True), (hidden, weight))
    of_sum, of_tokens = chunked(hidden, weight, targets, z), chunked(hidden, weight, targets, z, per_token=True)
    torch.testing.assert_close(of_sum, of_tokens.sum())
    found, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (of_sum, of_tokens.sum()))
    torch.testing.assert_close(found, expected)


@pytest.fixture(params=["own", "cpu", "gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps taken on a CPU by kernels of our own, by torch's, and those taken on other devices, which are right on
    a CPU too."""
    if request.param != "own":
        monkeypatch.setattr(elements, "supports", lambda *tensors: False)
    elif not native.processor_features() >= native.VECTORS:
        pytest.skip("this processor has no AVX-512 with bfloat16")
    if request.param == "gpu":
        monkeypatch.setattr(linear_loss, "_on_cpu", lambda tensor: False)


@pytest.mark.usefixtures("small_chunks", "path")
@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.parametrize("missing", ["none", "some", "all"])
def test_float32_is_that_of_all_logits(z: float, missing: str) -> None:
    hidden, weight, targets = inputs()
    targets = {"none": targets.clamp(min=0), "some": targets, "all": torch.full_like(targets, IGNORE_INDEX)}[missing]
    expected, found = plain(hidden, weight, targets, z), chunked(hidden, weight, targets, z, per_token=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    total = chunked(hidden, weight, targets, z)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)
    gains = torch.linspace(-1, 2, len(targets))
    for mine, theirs in ((3 * total, 3 * expected.sum()), (found @ gains, expected @ gains)):
        pairs = zip(
            *(torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (mine, theirs)), strict=True
        )
        for gradient, wanted in pairs:
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks", "path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])  # by 4, most of a token's probability lies on one target
def test_half_precision_errs_no_more_than_all_logits_do(dtype: torch.dtype, autocast: bool, scale: float) -> None:
    hidden, weight, targets = inputs(600, 203, 16, torch.float32 if autocast else dtype)
    with torch.no_grad():
        hidden *= scale
        targets[1::2] = F.linear(hidden, weight).argmax(1)[1::2]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = plain(*exact, targets, Z)
    wanted = [truth.detach(), *torch.autograd.grad(truth.sum() / 7, exact)]
    errors = []
    for losses in (plain, lambda *args: chunked(*args, per_token=True)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = losses(hidden, weight, targets, Z)
            total = found.sum() if losses is plain else chunked(hidden, weight, targets, Z)
        assert found.dtype == total.dtype == torch.float32
        results = [found.detach(), *torch.autograd.grad(total / 7, (hidden, weight))]
        assert [x.dtype for x in results[1:]] == [hidden.dtype, weight.dtype]
        errors.append([(x.double() - y).norm() / y.norm() for x, y in zip(results, wanted, strict=True)])
    for name, theirs, mine in zip(("loss", "hidden", "weight"), *errors, strict=True):
        assert mine <= 1.25 * theirs + 1e-6, name


@pytest.mark.usefixtures("small_chunks", "path")
def test_gradients_of_single_tokens_in_bfloat16_are_taken_as_they_lie() -> None:
    """That of a sum is one number in memory, seen as often as there are tokens."""
    hidden, weight, targets = inputs(40, dtype=torch.bfloat16)
    losses = chunked(hidden, weight, targets.clamp(min=0), per_token=True)
    weights = torch.tensor(0.5).expand(40), torch.full((40,), 0.5), torch.full((40, 2), 0.5)[:, 0]
    found = [torch.autograd.grad(losses, (hidden, weight), x, retain_graph=True) for x in weights]
    assert all(torch.equal(a, b) for gradients in found[1:] for a, b in zip(gradients, found[0], strict=True))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_loss(value: float) -> None:
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


def test_a_scaled_float16_loss_keeps_small_gradients() -> None:
    """What GradScaler does: gradients that float16 could not hold come out right after division by the scale."""
    hidden, weight, targets = inputs(64, 31, dtype=torch.float16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(plain(*exact, targets).sum() / 1e6, exact)
    scale = 2.0**20
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(chunked(hidden, weight.float(), targets) / 1e6 * scale, (hidden, weight))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.float() / scale, wanted.float(), rtol=1e-2, atol=1e-8)


def test_only_what_is_needed_is_computed() -> None:
    hidden, weight, targets = inputs()
    expected = chunked(hidden, weight, targets).detach()
    with torch.no_grad():
        assert not chunked(hidden, weight, targets).requires_grad
    frozen = chunked(hidden, weight.detach(), targets)
    (found,) = torch.autograd.grad(frozen, hidden)
    (wanted,) = torch.autograd.grad(plain(hidden, weight, targets).sum(), hidden)
    torch.testing.assert_close(found, wanted)
    assert not chunked(hidden.detach(), weight.detach(), targets).requires_grad
    torch.testing.assert_close(frozen.detach(), expected, rtol=0, atol=0)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = inputs()
    loss = chunked(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_targets_beyond_the_vocabulary_are_refused() -> None:
    hidden, weight, targets = inputs()
    targets[3] = 53
    with pytest.raises(IndexError, match="53"):
        chunked(hidden, weight, targets)


@pytest.mark.parametrize("compiled", [False, True])
def test_models_train_through_it(compiled: bool) -> None:
    """With tied weights and accumulation, also where all of it is compiled: the same gradients as from logits."""
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


# -------------------------------------------------------------------------------------- spread vocabularies
def parts_agree_with_the_whole(rank: int, folder: Path) -> None:
    """On each of three ranks: even and uneven vocabularies, of one and several chunks, in float32 and bfloat16."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    linear_loss._chunk_rows = lambda hidden: 32  # type: ignore[assignment]
    for vocab in (51, 53):
        for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            hidden, weight, targets = inputs(90, vocab, 8, dtype)
            spread = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
            for z in (0.0, Z):
                whole, parts = chunked(hidden, weight, targets, z), chunked(hidden, spread, targets, z)
                torch.testing.assert_close(parts, whole, rtol=near, atol=1e-4)
                wanted = torch.autograd.grad(whole, (hidden, weight))
                found = torch.autograd.grad(parts, (hidden, spread))
                assert isinstance(found[1], DTensor) and found[1].placements == (Shard(0),)
                assert found[1].to_local().shape == spread.to_local().shape
                torch.testing.assert_close(found[0], wanted[0], rtol=near, atol=near * 10)
                torch.testing.assert_close(found[1].full_tensor(), wanted[1], rtol=near, atol=near * 10)
                assert_same_on_ranks(parts.detach(), found[0])
                tokens = chunked(hidden, spread, targets, z, per_token=True)
                torch.testing.assert_close(
                    tokens, chunked(hidden, weight, targets, z, per_token=True), rtol=near, atol=near
                )
            torch.testing.assert_close(logit_mean(hidden[None], spread), logit_mean(hidden[None], weight))
    refuses_what_it_cannot_spread(mesh)


def assert_same_on_ranks(*values: Tensor) -> None:
    for value in values:
        everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, value)
        assert all(torch.equal(other, value) for other in everyone)


def refuses_what_it_cannot_spread(mesh: torch.distributed.DeviceMesh) -> None:
    hidden, weight, targets = inputs(10, 4)
    with pytest.raises(ValueError, match="without a row"):
        chunked(hidden, distribute_tensor(weight.detach(), mesh, [Shard(0)]), targets)
    with pytest.raises(ValueError, match="expected"):
        chunked(hidden, distribute_tensor(weight.detach(), mesh, [Replicate()]), targets)


def test_a_spread_vocabulary_gives_the_loss_of_the_whole(tmp_path: Path) -> None:
    on_ranks(parts_agree_with_the_whole, tmp_path, 3)


def test_the_mean_of_logits_needs_no_logits() -> None:
    hidden, weight, _ = inputs()
    torch.testing.assert_close(logit_mean(hidden[None], weight), F.linear(hidden, weight).mean().detach())
