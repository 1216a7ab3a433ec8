"""The original's recipe, said again, is that of the golden files and of our own step; and what is measured with it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from open_lm.config import ModelConfig, OptimConfig
from open_lm.errors import ConfigError
from open_lm.losses import token_loss
from open_lm.model import create_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_train  # noqa: E402
import compare_curves  # noqa: E402
from matmul_ceiling import linear_shapes, own_flops  # noqa: E402
from original_recipe import build  # noqa: E402
from step_profile import profile_step, room_of  # noqa: E402

CPU = torch.device("cpu")
GOLDEN = ("default", "gain_only_qknorm", "lp_qknorm_dclm", "tied_postembed")


# --- the original's recipe ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", GOLDEN)
def test_the_recipe_gives_what_the_original_gave(shared_dir: Path, variant: str) -> None:
    folder = shared_dir / "compat" / "models" / variant
    weights = torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"]
    golden = torch.load(folder / "golden.pt", weights_only=True)
    optim = OptimConfig(lr=1e-3, wd=0.1, grad_clip_norm=1.0)
    recipe = build(str(folder / "config.json"), "fp32", CPU, weights=weights, optim=optim)
    inputs, targets = golden["input_ids"][:, :-1], golden["input_ids"][:, 1:]
    with torch.no_grad():
        torch.testing.assert_close(recipe.model(inputs), golden["logits"], atol=1e-5, rtol=0)
    losses = [recipe(inputs, targets).item() for _ in range(3)]
    assert losses == pytest.approx(golden["losses_adamw_lr1e-3_wd0.1_clip1"], abs=1e-5)


@pytest.mark.parametrize("variant", [{}, {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True}])
def test_the_recipe_has_our_loss_and_gradients(tmp_path: Path, variant: dict[str, Any]) -> None:
    shape = {"hidden_dim": 50, "n_layers": 3, "n_heads": 4, "vocab_size": 77, "seq_len": 40, **variant}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(shape))
    torch.manual_seed(0)
    model = create_model(ModelConfig(model=str(path)))
    recipe = build(str(path), "fp32", CPU, weights=model.state_dict(), optim=OptimConfig(z_loss_coefficient=1e-3))
    ids = torch.randint(77, (2, 41), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    loss_sum, num_valid = token_loss(model(inputs)[0], targets, 1e-3)
    (loss_sum / num_valid).backward()
    loss = recipe.loss(inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx((loss_sum / num_valid).item(), abs=1e-5)
    theirs = dict(recipe.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_what_the_recipe_does_not_say_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "seq_len": 4, "ffn_type": "gelu"}
    path.write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match=r"ffn_type is 'gelu'.*swiglu"):
        build(str(path), "fp32", CPU)
    with pytest.raises(ConfigError, match=r"--precision fp16.*fp32, amp_bf16"):
        build("open_lm_test_tiny", "fp16", CPU)


# --- loss curves ----------------------------------------------------------------------------------------------------
def test_curves_are_those_of_the_original_up_to_rounding(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPEN_LM_SHARED", str(shared_dir))
    curves, picture = tmp_path / "curves.json", tmp_path / "curves.svg"
    arguments = ["--steps", "30", "--twins", "1", "--json", str(curves), "--svg", str(picture)]
    compare_curves.main([*arguments, "--precision", "fp32", "amp_bfloat16", "--accum-freq", "2"])
    said = capsys.readouterr().out
    assert "fp32: 30 steps" in said and "amp_bfloat16: 30 steps" in said and "the original from itself" in said
    found = json.loads(curves.read_text())
    for precision, most in (("fp32", 1e-5), ("amp_bfloat16", 5e-3)):
        losses, summary = found[precision]["curves"], found[precision]["summary"]
        assert {name: len(values) for name, values in losses.items()} == dict.fromkeys(
            ("ours", "original", "twin 1"), 30
        )
        assert losses["original"][-1] < losses["original"][0] - 2  # it learns, so that a wrong step would show
        assert losses["twin 1"] != losses["original"]
        apart = [abs(a - b) for a, b in zip(losses["ours"], losses["original"], strict=True)]
        assert summary["max_difference"] == max(apart) < most
        assert summary["max_noise"] < most
    assert picture.read_text().startswith("<svg") and picture.read_text().count("<polyline") == 8


def test_curves_need_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPEN_LM_SHARED", str(tmp_path))
    with pytest.raises(ConfigError, match="give --model and --train-data, or set OPEN_LM_SHARED"):
        compare_curves.main(["--steps", "1"])


# --- the benchmark --------------------------------------------------------------------------------------------------
def test_the_benchmark_measures_ours_the_original_and_a_command(tmp_path: Path) -> None:
    result, trace = tmp_path / "result.json", tmp_path / "trace.json.gz"
    peer = tmp_path / "peer.py"
    peer.write_text("import json, sys; print('words'); print(json.dumps({'tokens_per_second': float(sys.argv[1])}))")
    command = [sys.executable, str(SCRIPTS / "bench_train.py"), "--model", "open_lm_test_tiny", "--device", "cpu"]
    command += ["--batch-size", "4", "--seq-len", "8", "--steps", "2", "--rounds", "1", "--threads", "1", "--ceiling"]
    command += ["--against", "original", "--against-command", f"{sys.executable} {peer} {{seq_len}}{{batch_size}}.5"]
    command += ["--profile", "--trace", str(trace), "--json", str(result), "--accum-freq", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "4 x 8 tokens, --precision amp_bfloat16 --accum-freq 2" in said
    assert "of original" in said and "of the command" in said and said.count("outside any operation") == 2
    found = json.loads(result.read_text())["models"]["open_lm_test_tiny"]
    assert list(found["ceilings"]) == ["bfloat16"] and set(found["ceilings"]["bfloat16"]) == {"own", "square"}
    assert found["tokens_per_step"] == 32
    speeds = {name: values["speeds"] for name, values in found["results"].items()}
    assert {name: len(values) for name, values in speeds.items()} == {"ours": 2, "original": 2, "the command": 1}
    assert speeds["the command"] == [84.5]
    rooms = found["profiles"]["ours"]["profile"]
    assert {"attention", "feed-forward", "norms", "loss and head", "optimizer and clipping"} <= set(rooms)
    assert set(found["profiles"]) == {"ours", "original"}
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "x.json"], "--trace: goes with --profile"),
        (["--steps", "0"], "--steps, --rounds and --batch-size: expected at least 1"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (["--batch-size", "3", "--accum-freq", "2"], "--global-batch-size 3 does not divide into --accum-freq 2"),
        (["--model", "open_lm_11n"], "--model open_lm_11n: no such model"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_train.main(["--device", "cpu", "--threads", "1", *arguments])


def test_a_peer_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    args = bench_train.make_parser().parse_args(["--device", "cpu", "--threads", "1"])
    with pytest.raises(ConfigError, match=r"(?s)ended with exit status 3.*lost"):
        bench_train.run_once(
            [sys.executable, "-c", "raise SystemExit(print('lost', file=__import__('sys').stderr) or 3)"], args
        )
    with pytest.raises(ConfigError, match="no JSON object: fast"):
        bench_train.run_once([sys.executable, "-c", "print('fast')"], args)
    with pytest.raises(ConfigError, match="no tokens_per_second, but speed"):
        bench_train.Results([], [], [], []).add({"speed": 1}, 10)


def test_products_are_counted_at_the_shapes_of_the_linear_layers() -> None:
    with torch.device("meta"):
        shapes = linear_shapes(create_model(ModelConfig(model="open_lm_test_tiny")))
    assert shapes == {(16, 48): 2, (16, 16): 3, (16, 512): 2, (256, 16): 2}
    assert own_flops(shapes, 4, torch.float32, CPU) > 0


# --- the profile ----------------------------------------------------------------------------------------------------
class FeedForwardOnly(nn.Module):
    """A model without attention and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Linear(8, 8)
        self.output = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.feed_forward(x))


def test_time_goes_to_the_rooms_that_a_step_has(tmp_path: Path) -> None:
    class Step:
        model = FeedForwardOnly()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def __call__(self, inputs: Tensor, targets: Tensor) -> None:
            nn.functional.cross_entropy(self.model(inputs), targets).backward()
            self.optimizer.step()
            inputs.to(torch.float64)

    inputs, targets = torch.rand(3, 8), torch.tensor([0, 1, 2])
    times, wall_s = profile_step(Step(), inputs, targets)
    assert {"feed-forward", "loss and head", "optimizer and clipping"} <= set(times)
    assert set(times).isdisjoint({"attention", "norms", "compiled blocks"})
    assert times["feed-forward"]["forward"] > 0 and times["feed-forward"]["backward"] > 0
    assert times["loss and head"]["backward"] > 0
    assert times["optimizer and clipping"]["backward"] == 0
    assert sum(sum(passes.values()) for passes in times.values()) <= wall_s
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in Step.model.modules())


def test_rooms_of_submodules() -> None:
    names = dict(create_model(ModelConfig(model="open_lm_test_tiny")).named_modules())
    rooms = {name: room_of(name) for name in names if room_of(name) is not None}
    assert rooms["layers.1.attention"] == "attention" and rooms["layers.0.feed_forward"] == "feed-forward"
    assert rooms["layers.0.ffn_norm"] == rooms["norm"] == "norms" and rooms["output"] == "loss and head"
    assert rooms["layers.0"] == "other" and "layers.0.attention.in_proj" not in rooms
