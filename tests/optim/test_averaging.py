"""Running averages compared with their formulas, computed step by step in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from open_lm.checkpoint.files import read_file, write_file
from open_lm.errors import CheckpointError, ConfigError
from open_lm.optim.averaging import Averager, ModelAverager, parse_averagers


class Tied(nn.Module):
    """A model with a tied weight, a bias, and a buffer that is not averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(3.0))


def weights_over_time(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(5, 3, generator=generator) for _ in range(steps)]


def run(model: Tied, averager: Averager, history: list[torch.Tensor]) -> None:
    for weights in history:
        with torch.no_grad():
            model.embed.weight.copy_(weights)
        averager.step()


@pytest.mark.parametrize("eta", [0.0, 3.0, 8.0])
def test_poly_follows_its_recursion(eta: float) -> None:
    model, history = Tied(), weights_over_time(9)
    averager = ModelAverager(model, f"poly_{eta:g}_1").avgs_dict[f"poly_{eta:g}_1"]
    run(model, averager, history)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for t, weights in enumerate(history, start=1):
        new_weight = (eta + 1) / (eta + t)
        expected = (1 - new_weight) * expected + new_weight * weights.double()
    if eta == 0:
        torch.testing.assert_close(expected, torch.stack(history).double().mean(0))
    average = averager.state_dict()["av_model_sd"]["embed.weight"]
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_ema_is_updated_every_freq_steps() -> None:
    model, history = Tied(), weights_over_time(7)
    start = model.embed.weight.detach().clone()
    averager = ModelAverager(model, "ema_0.9_3").avgs_dict["ema_0.9_3"]
    run(model, averager, history)
    expected = start.double()
    for weights in (history[2], history[5]):
        expected = 0.9 * expected + 0.1 * weights.double()
    state = averager.state_dict()
    torch.testing.assert_close(state["av_model_sd"]["embed.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert (state["update_counter"], state["step_counter"], state["freq"]) == (2, 3, 3)
    assert (state["gamma"], state["eta"], state["method"]) == (0.9, None, "ema")


def test_half_precision_weights_are_averaged_in_float32() -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    averager = ModelAverager(model, "ema_0.999").avgs_dict["ema_0.999"]
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        averager.step()
    # In bfloat16 each update of 0.001 would be rounded away and the average would remain 1.
    average = averager.state_dict()["av_model_sd"]["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((4, 4), 2 - 0.999**100), rtol=1e-5, atol=0)


def test_a_loaded_average_continues_like_an_uninterrupted_one(tmp_path: Path) -> None:
    history = weights_over_time(8)
    uninterrupted, model = Tied(), Tied()
    model.load_state_dict(uninterrupted.state_dict())
    reference = ModelAverager(uninterrupted, "poly_8_2").avgs_dict["poly_8_2"]
    run(uninterrupted, reference, history)

    first = ModelAverager(model, "poly_8_2").avgs_dict["poly_8_2"]
    run(model, first, history[:5])
    write_file(str(tmp_path / "poly_8_2_1.pt"), first.state_dict())
    second = ModelAverager(model, "poly_8_2").avgs_dict["poly_8_2"]
    second.load_state_dict(read_file(tmp_path / "poly_8_2_1.pt"))
    run(model, second, history[5:])
    for name, value in reference.state_dict()["av_model_sd"].items():
        assert torch.equal(value, second.state_dict()["av_model_sd"][name]), name


def test_saved_keys_are_those_of_the_model_and_tied_weights_are_stored_once() -> None:
    model = Tied()
    state = ModelAverager(model, "ema").avgs_dict["ema"].state_dict()
    assert set(state) == {
        "update_counter", "step_counter", "freq", "av_model_sd", "method",
        "eta", "gamma", "suffix_steps", "power", "start",
    }  # fmt: skip
    assert list(state["av_model_sd"]) == list(model.state_dict())
    assert state["av_model_sd"]["embed.weight"].data_ptr() == state["av_model_sd"]["head.weight"].data_ptr()
    assert torch.equal(state["av_model_sd"]["scale"], model.scale)


def test_applied_restores_the_weights_even_after_an_error() -> None:
    model = Tied()
    averager = ModelAverager(model, "poly").avgs_dict["poly"]
    history = weights_over_time(4)
    run(model, averager, history)
    with pytest.raises(RuntimeError, match="inside"), averager.applied() as averaged:
        torch.testing.assert_close(averaged.embed.weight.detach(), torch.stack(history).mean(0))
        raise RuntimeError("inside")
    assert torch.equal(model.embed.weight, history[-1])


def test_none_is_the_model_itself() -> None:
    model = Tied()
    averager = ModelAverager(model, "none").avgs_dict["none"]
    run(model, averager, weights_over_time(3))
    assert torch.equal(averager.state_dict()["av_model_sd"]["embed.weight"], model.embed.weight)


def test_several_averagers_in_one_list() -> None:
    assert [(s.method, s.value, s.freq) for s in parse_averagers("poly_8_1, ema_0.99_10,none")] == [
        ("poly", 8.0, 1),
        ("ema", 0.99, 10),
        ("none", 0.0, 1),
    ]


def test_all_problems_of_a_list_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        parse_averagers("cosine,ema_1.5,poly_x,ema_0.9_0,poly_-1,none,none")
    message = str(error.value)
    for part in ("'cosine'", "'ema_1.5'", "'poly_x'", "'ema_0.9_0'", "'poly_-1'", "'none' is given more than once"):
        assert part in message
    with pytest.raises(ConfigError, match="found no averager"):
        parse_averagers(" , ")


def test_the_average_of_another_model_is_rejected() -> None:
    state = ModelAverager(nn.Linear(3, 3), "ema").avgs_dict["ema"].state_dict()
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        ModelAverager(Tied(), "ema").avgs_dict["ema"].load_state_dict(state)
