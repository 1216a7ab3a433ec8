"""The original's recipe, said again, is that of the golden files and of our own step; and what is measured with it."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_train
import bench_train_worker
import compare_curves
import pytest
import torch
import torchtitan_recipe
from matmul_ceiling import linear_shapes, own_flops
from original_recipe import build
from step_profile import profile_step, room_of
from torch import Tensor, nn

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, ModelConfig, OptimConfig
from open_lm.errors import ConfigError
from open_lm.model.losses import token_loss
from open_lm.model.transformer import create_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"
CPU = torch.device("cpu")
has_torchtitan = find_spec("torchtitan") is not None
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
        (["--batch-size", "3", "--accum-freq", "2"], "--global-batch-size 3 is not divisible by --accum-freq 2"),
        (["--model", "open_lm_11n"], "--model open_lm_11n: unknown model"),
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


def test_a_peer_is_given_what_flags_say(tmp_path: Path) -> None:
    args = bench_train.make_parser().parse_args(["--device", "cpu", "--against", "a:b", "--peer-python", "python9"])
    args.device = "cpu"
    flags = ["--qk-norm", "--lr", "0.25", "--precision", "fp32"]
    found = bench_train.contenders(args, flags, "open_lm_test_tiny", tmp_path)
    job = found.jobs["a:b"]
    assert isinstance(job, bench_train_worker.Job) and job.command()[0] == "python9"
    shape = json.loads(Path(job.model).read_text())
    assert shape["qk_norm"] is True and shape["hidden_dim"] == 16 and "model_norm" not in shape

    def with_all(model: str, precision: str, device: torch.device, config: Config) -> Any:
        return model, precision, device, config.optim.lr, config.optim.wd

    def plain(*arguments: object) -> Any:
        return arguments

    expected = (job.model, args.precision, CPU)
    assert bench_train_worker.called(job, with_all) == (*expected, 0.25, OptimConfig().wd)
    assert bench_train_worker.called(job, plain) == expected
    with pytest.raises(ConfigError, match="--against a:b: cannot be imported"):
        bench_train_worker.check(job)
    assert bench_train_worker.check(replace(job, kind="original_recipe:build")) == {"torch": torch.__version__}
    path = tmp_path / "rms_norm.json"
    path.write_text(json.dumps({**shape, "model_norm": "rms_norm"}))
    with pytest.raises(ConfigError, match="model_norm is 'rms_norm', the original's recipe"):
        bench_train_worker.check(replace(job, kind="original_recipe:build", model=str(path)))


# --- torchtitan -----------------------------------------------------------------------------------------------------
def config_of(flags: list[str]) -> Config:
    return Config.from_namespace(parse_args(bench_train_worker.trainer_flags("open_lm_test_tiny", 4, flags)))


def test_what_torchtitan_does_not_have_is_told_together(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "seq_len": 12, "qk_norm": True}
    path.write_text(json.dumps(shape))
    flags = ["--optimizer", "muon", "--activation-checkpointing", "2", "--z-loss-coefficient", "0.1"]
    with pytest.raises(ConfigError) as caught:
        torchtitan_recipe.check(str(path), "fp16", CPU, config=config_of(flags))
    said = str(caught.value)
    assert "--against torchtitan (6)" in said and "qk_norm is True, expected False" in said
    for flag in ("--seq-len 12", "--precision fp16", "--activation-checkpointing 2", "--optimizer muon", "--z-loss"):
        assert flag in said


@pytest.mark.skipif(has_torchtitan, reason="torchtitan is installed here")
def test_without_torchtitan_it_is_said_what_to_install(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "open_lm_test_tiny", "--device", "cpu", "--threads", "1", "--against", "torchtitan"]
    with pytest.raises(ConfigError, match=r"torchtitan: it cannot be imported by .*make install-titan.*--peer-python"):
        bench_train.main(flags)
    assert "GFLOP" not in capfd.readouterr().out  # before anything is measured


TRAINED = """
import json, sys
sys.path[:0] = sys.argv[1:2]
import torch
from bench_train_worker import trainer_flags
from open_lm.config.sections import Config
from open_lm.config.command_line import parse_args
from torchtitan_recipe import build

found = {}
ids = torch.randint(512, (4, 17), generator=torch.Generator().manual_seed(0))
for flags in json.loads(sys.argv[3]):
    config = Config.from_namespace(parse_args(trainer_flags(sys.argv[2], 4, ["--lr", "0.02", *flags])))
    step = build(sys.argv[2], config.precision.precision, torch.device("cpu"), config=config)
    losses = [float(step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())) for _ in range(8)]
    found[" ".join(flags)] = losses, sum(p.numel() for p in step.model.parameters())
print(json.dumps(found))
"""


@pytest.mark.skipif(not has_torchtitan, reason="needs torchtitan: make install-titan, and run with its python")
def test_torchtitan_trains_a_model_of_our_size(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "seq_len": 16}
    path.write_text(json.dumps(shape))
    flags = [
        ["--precision", "fp32"],
        ["--precision", "amp_bfloat16", "--accum-freq", "2", "--grad-clip-norm", "1"],
        ["--precision", "bf16", "--activation-checkpointing", "full"],
        ["--precision", "fp32", "--activation-checkpointing", "op"],
    ]
    command = [sys.executable, "-c", TRAINED, str(SCRIPTS), str(path), json.dumps(flags)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.device("meta"):
        ours = create_model(ModelConfig(model=str(path), model_norm="rms_norm"))
    assert len(found) == len(flags)
    for losses, num_params in found.values():
        assert num_params == sum(p.numel() for p in ours.parameters())
        # Logits begin with a variance of 1, which adds half of it to the loss of equal probabilities.
        assert losses[0] == pytest.approx(math.log(512) + 0.5, abs=0.2)
        assert losses[-1] < losses[0] - 1


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
