"""Test the cost of a run, the cheapest way to train, and the settings of devices and models that a plan reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_lm.errors import ConfigError
from open_lm.planner import command
from open_lm.planner.report import Plan, format_plan, plan_values


def plan(flags: str) -> Plan:
    return command.make_plan(["--model", "open_lm_1b", "--batch-size", "8", *flags.split()])


def test_cost_is_device_hours_times_power_and_price() -> None:
    found = plan("--devices 8 --train-tokens 1e9 --price-per-device-hour 2.5 --most-devices 0")
    assert found.recommended is not None and found.recommended.time is not None
    cost = found.cost(found.recommended)
    assert cost is not None
    assert cost.device_hours == pytest.approx(8 * 1e9 / found.recommended.time.tokens_per_s / 3600)
    assert cost.kwh == pytest.approx(0.7 * cost.device_hours)
    assert cost.price == pytest.approx(2.5 * cost.device_hours)
    assert json.loads(json.dumps(plan_values(found)))["cost"]["price"] == cost.price
    assert f"price {cost.price:,.0f}" in format_plan(found)


def test_cheapest_is_the_fastest_of_those_with_the_fewest_device_hours() -> None:
    flags = "--devices 8 --most-devices 64 --bandwidth-inter 1 --strategies ddp,fsdp --train-tokens 1e9"
    found = plan(f"{flags} --price-per-device-hour 1")
    best = found.cheapest
    assert best is not None and best.machine.devices == 8, "more devices wait for the slow network"
    text = format_plan(found)
    assert "Cheapest on 8 to 64 devices: " in text
    assert plan_values(found)["cheapest_devices"] == 8
    quick = plan(f"{flags} --bandwidth-inter 10000 --bandwidth-intra 10000 --price-per-device-hour 1").cheapest
    assert quick is not None and quick.machine.devices == 64, "all cost the same, the most are the fastest"


def test_cost_needs_a_length_and_a_known_device() -> None:
    with pytest.raises(ConfigError, match="a price requires --train-tokens"):
        plan("--price-per-device-hour 2")
    with pytest.raises(ConfigError, match="--price-per-device-hour: found '-1'"):
        plan("--price-per-device-hour -1 --train-tokens 1e9")
    found = plan(
        "--most-devices 0 --devices 1 --device Abacus --matmul-tflops 1 --device-memory 90GB --train-tokens 1e6"
    )
    cost = found.cost(found.recommended)
    assert cost is not None and cost.kwh is None and cost.price is None
    with pytest.raises(ConfigError, match="its memory is unknown; pass --device-memory"):
        plan("--device Abacus --matmul-tflops 1")


def test_unknown_keys_of_a_model_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    counts = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 50}
    path.write_text(json.dumps({**counts, "weight_tying": False, "post_embed_norm": False, "ffn_width": 7}))
    with pytest.raises(ConfigError, match="the key ffn_width is unknown"):
        command.make_plan(["--model", str(path)])


@pytest.mark.parametrize(
    ("device", "gib"),
    [("H100", 79.1), ("A100 40GB", 39.4), ("RTX 5090", 31.3), ("L40S", 44.3), ("MI300X", 191.5), ("B300", 267.0)],
)
def test_device_memory_defaults_to_that_of_the_device(device: str, gib: float) -> None:
    argv = ["--model", "open_lm_160m", "--batch-size", "1", "--most-devices", "0", "--device", device]
    assert command.make_plan(argv).machine.memory_bytes == int(gib * 2**30)
