"""The original's recipe matches the golden files and our step; the benchmark and loss curves that use it."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_train
import bench_train_worker
import compare_curves
import matmul_ceiling
import pytest
import torch
import torchtitan_recipe
from matmul_ceiling import layer_flops, linear_shapes
from original_recipe import build
from step_profile import category_of, profile_step
from torch import Tensor, nn

from open_lm.config.command_line import parse_args
from open_lm.config.sections import Config, ModelConfig, OptimConfig
from open_lm.errors import ConfigError
from open_lm.model.losses import token_loss
from open_lm.model.transformer import create_model
from open_lm.planner.command import make_plan

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"
CPU = torch.device("cpu")
has_torchtitan = find_spec("torchtitan") is not None
GOLDEN = ("default", "gain_only_qknorm", "lp_qknorm_dclm", "tied_postembed")


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Compute with one thread: the models are tiny, and on a busy machine threads mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- the original's recipe ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", GOLDEN)
def test_recipe_reproduces_the_golden_files(shared_dir: Path, variant: str) -> None:
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
def test_recipe_has_the_loss_and_gradients_of_our_model(tmp_path: Path, variant: dict[str, Any]) -> None:
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


def test_recipe_rejects_unsupported_settings(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "seq_len": 4, "ffn_type": "gelu"}
    path.write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match=r"ffn_type is 'gelu'.*swiglu"):
        build(str(path), "fp32", CPU)
    with pytest.raises(ConfigError, match=r"--precision fp16.*fp32, amp_bf16"):
        build("open_lm_test_tiny", "fp16", CPU)


# --- loss curves ----------------------------------------------------------------------------------------------------
def test_curves_match_the_original_up_to_rounding(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPEN_LM_SHARED", str(shared_dir))
    curves, picture = tmp_path / "curves.json", tmp_path / "curves.svg"
    arguments = ["--steps", "12", "--batch-size", "2", "--twins", "1", "--json", str(curves), "--svg", str(picture)]
    compare_curves.main([*arguments, "--precision", "fp32", "amp_bfloat16", "--accum-freq", "2"])
    output = capsys.readouterr().out
    assert "fp32: 12 steps" in output and "amp_bfloat16: 12 steps" in output
    assert "difference of twins from the original" in output
    results = json.loads(curves.read_text())
    for precision, tolerance in (("fp32", 1e-5), ("amp_bfloat16", 5e-3)):
        losses, summary = results[precision]["curves"], results[precision]["summary"]
        assert {name: len(values) for name, values in losses.items()} == dict.fromkeys(
            ("ours", "original", "twin 1"), 12
        )
        assert losses["original"][-1] < losses["original"][0] - 1  # the model learns, so a wrong step would be visible
        assert losses["twin 1"] != losses["original"]
        errors = [abs(a - b) for a, b in zip(losses["ours"], losses["original"], strict=True)]
        assert summary["max_difference"] == max(errors) < tolerance
        assert summary["max_noise"] < tolerance
    assert picture.read_text().startswith("<svg") and picture.read_text().count("<polyline") == 8


def test_missing_golden_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPEN_LM_SHARED", str(tmp_path))
    with pytest.raises(ConfigError, match="pass --model and --train-data, or set OPEN_LM_SHARED"):
        compare_curves.main(["--steps", "1"])


# --- the benchmark --------------------------------------------------------------------------------------------------
@pytest.fixture
def runs_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Measure other steps than ours in this process, because every new process imports torch. Returns their kinds."""
    run_in_new_process, kinds = bench_train.run_once, list[str]()

    def run_once(command: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
        is_worker = Path(command[1]).name == "bench_train_worker.py"
        if not is_worker or (kind := json.loads(command[2])["kind"]) == bench_train_worker.OURS:
            return run_in_new_process(command, args)
        kinds.append(kind)
        earlier_output = capsys.readouterr().out
        bench_train_worker.main(command[2:])
        result = json.loads(capsys.readouterr().out)
        print(earlier_output, end="")
        return dict(result)

    monkeypatch.setattr(bench_train, "run_once", run_once)
    return kinds


@pytest.mark.processes
def test_benchmark_of_ours_the_original_and_a_command(
    tmp_path: Path,
    runs_in_process: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, trace = tmp_path / "result.json", tmp_path / "trace.json.gz"
    peer = tmp_path / "peer.py"
    peer.write_text("import json, sys; print('words'); print(json.dumps({'tokens_per_second': float(sys.argv[1])}))")
    monkeypatch.setitem(matmul_ceiling.SQUARE, "cpu", 64)
    arguments = ["--model", "open_lm_test_tiny", "--device", "cpu", "--batch-size", "4", "--seq-len", "8"]
    arguments += ["--steps", "2", "--rounds", "1", "--threads", "1", "--ceiling", "--against", "original"]
    arguments += ["--against-command", f"{sys.executable} {peer} {{seq_len}}{{batch_size}}.5", "--accum-freq", "2"]
    bench_train.main([*arguments, "--profile", "--trace", str(trace), "--json", str(result)])
    original = "original_recipe:build"
    assert runs_in_process == [original, "ceiling", original]  # the first run checks the settings
    output = capsys.readouterr().out
    assert "4 x 8 tokens, --precision amp_bfloat16 --accum-freq 2" in output
    assert "of original" in output and "of the command" in output and output.count("outside any operation") == 2
    measured = json.loads(result.read_text())["models"]["open_lm_test_tiny"]
    assert list(measured["ceilings"]) == ["bfloat16"] and set(measured["ceilings"]["bfloat16"]) == {"own", "square"}
    assert measured["tokens_per_step"] == 32
    speeds = {name: values["speeds"] for name, values in measured["results"].items()}
    assert {name: len(values) for name, values in speeds.items()} == {"ours": 2, "original": 2, "the command": 1}
    assert speeds["the command"] == [84.5]
    plan_flags = f"--model open_lm_test_tiny --devices 1 --device-memory 1GB --bench {result}"
    planned = make_plan(["--most-devices", "0", *plan_flags.split()])
    assert planned.rates_from == f"measured: {result}", "the planner reads the file that this benchmark writes"
    categories = measured["profiles"]["ours"]["profile"]
    assert {"attention", "feed-forward", "norms", "loss and head", "optimizer and clipping"} <= set(categories)
    assert set(measured["profiles"]) == {"ours", "original"}
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "x.json"], "--trace: requires --profile and a single --model"),
        (["--steps", "0"], "--steps, --rounds and --batch-size: expected at least 1"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (["--batch-size", "3", "--accum-freq", "2"], "--global-batch-size 3 is not divisible by --accum-freq 2"),
        (["--model", "open_lm_11n"], "--model open_lm_11n: unknown model"),
    ],
)
def test_invalid_command_lines_fail_before_any_measurement(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_train.main(["--device", "cpu", "--threads", "1", *arguments])


@pytest.mark.processes
def test_error_of_a_failing_command(tmp_path: Path) -> None:
    args = bench_train.make_parser().parse_args(["--device", "cpu", "--threads", "1"])
    with pytest.raises(ConfigError, match=r"(?s)ended with exit status 3.*lost"):
        bench_train.run_once(
            [sys.executable, "-c", "raise SystemExit(print('lost', file=__import__('sys').stderr) or 3)"], args
        )
    with pytest.raises(ConfigError, match="not a JSON object: fast"):
        bench_train.run_once([sys.executable, "-c", "print('fast')"], args)
    with pytest.raises(ConfigError, match="no tokens_per_second, found only speed"):
        bench_train.Results([], [], [], []).add({"speed": 1}, 10)


def test_builder_receives_the_settings_of_the_flags(tmp_path: Path) -> None:
    args = bench_train.make_parser().parse_args(["--device", "cpu", "--against", "a:b", "--peer-python", "python9"])
    args.device = "cpu"
    flags = ["--qk-norm", "--lr", "0.25", "--precision", "fp32"]
    comparison = bench_train.plan_comparison(args, flags, "open_lm_test_tiny", tmp_path)
    run = comparison.runs["a:b"]
    assert isinstance(run, bench_train_worker.BenchmarkRun) and run.command()[0] == "python9"
    shape = json.loads(Path(run.model).read_text())
    assert shape["qk_norm"] is True and shape["hidden_dim"] == 16 and "model_norm" not in shape

    def with_config(model: str, precision: str, device: torch.device, config: Config) -> Any:
        return model, precision, device, config.optim.lr, config.optim.wd

    def without_config(*arguments: object) -> Any:
        return arguments

    expected = (run.model, args.precision, CPU)
    assert bench_train_worker.call_with_settings(run, with_config) == (*expected, 0.25, OptimConfig().wd)
    assert bench_train_worker.call_with_settings(run, without_config) == expected
    with pytest.raises(ConfigError, match="--against a:b: cannot be imported"):
        bench_train_worker.check_builder(run)
    assert bench_train_worker.check_builder(replace(run, kind="original_recipe:build")) == {"torch": torch.__version__}
    path = tmp_path / "rms_norm.json"
    path.write_text(json.dumps({**shape, "model_norm": "rms_norm"}))
    with pytest.raises(ConfigError, match="model_norm is 'rms_norm', but the original's recipe supports only"):
        bench_train_worker.check_builder(replace(run, kind="original_recipe:build", model=str(path)))


# --- torchtitan -----------------------------------------------------------------------------------------------------
def config_of(flags: list[str]) -> Config:
    return Config.from_namespace(parse_args(bench_train_worker.trainer_flags("open_lm_test_tiny", 4, flags)))


def test_torchtitan_rejects_all_unsupported_settings_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "seq_len": 12, "qk_norm": True}
    path.write_text(json.dumps(shape))
    flags = ["--optimizer", "muon", "--activation-checkpointing", "2", "--z-loss-coefficient", "0.1"]
    with pytest.raises(ConfigError) as caught:
        torchtitan_recipe.check(str(path), "fp16", CPU, config=config_of(flags))
    message = str(caught.value)
    assert "--against torchtitan (6)" in message and "qk_norm is True, expected False" in message
    for flag in (
        "--seq-len 12",
        "--precision fp16",
        "--activation-checkpointing 2: expected none, half-op, full",
        "--optimizer muon",
        "--z-loss",
    ):
        assert flag in message


@pytest.mark.skipif(has_torchtitan, reason="torchtitan is installed here")
def test_missing_torchtitan_is_an_error_before_any_measurement(runs_in_process: list[str]) -> None:
    flags = ["--model", "open_lm_test_tiny", "--device", "cpu", "--threads", "1", "--against", "torchtitan"]
    with pytest.raises(ConfigError, match=r"torchtitan: .* cannot import it .*make install-titan.*--peer-python"):
        bench_train.main(flags)
    assert runs_in_process == ["torchtitan_recipe:build"]


TRAIN_TORCHTITAN = """
import json, sys
sys.path[:0] = sys.argv[1:2]
import torch
from bench_train_worker import trainer_flags
from open_lm.config.sections import Config
from open_lm.config.command_line import parse_args
from torchtitan_recipe import build

results = {}
ids = torch.randint(512, (4, 17), generator=torch.Generator().manual_seed(0))
for flags in json.loads(sys.argv[3]):
    config = Config.from_namespace(parse_args(trainer_flags(sys.argv[2], 4, ["--lr", "0.02", *flags])))
    step = build(sys.argv[2], config.precision.precision, torch.device("cpu"), config=config)
    losses = [float(step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())) for _ in range(8)]
    results[" ".join(flags)] = losses, sum(p.numel() for p in step.model.parameters())
print(json.dumps(results))
"""


@pytest.mark.skipif(not has_torchtitan, reason="needs torchtitan: make install-titan, and run with its python")
def test_torchtitan_model_has_our_size_and_learns(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "seq_len": 16}
    path.write_text(json.dumps(shape))
    flags = [
        ["--precision", "fp32"],
        ["--precision", "amp_bfloat16", "--accum-freq", "2", "--grad-clip-norm", "1"],
        ["--precision", "bf16", "--activation-checkpointing", "full"],
        ["--precision", "fp32", "--activation-checkpointing", "half-op"],
    ]
    command = [sys.executable, "-c", TRAIN_TORCHTITAN, str(SCRIPTS), str(path), json.dumps(flags)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    with torch.device("meta"):
        ours = create_model(ModelConfig(model=str(path), model_norm="rms_norm"))
    assert len(results) == len(flags)
    for losses, num_params in results.values():
        assert num_params == sum(p.numel() for p in ours.parameters())
        # Initial logits have a variance of 1, which adds 0.5 to the loss of equal probabilities.
        assert losses[0] == pytest.approx(math.log(512) + 0.5, abs=0.2)
        assert losses[-1] < losses[0] - 1


def test_shapes_of_the_linear_layers() -> None:
    with torch.device("meta"):
        shapes = linear_shapes(create_model(ModelConfig(model="open_lm_test_tiny")))
    assert shapes == {(16, 48): 2, (16, 16): 3, (16, 512): 2, (256, 16): 2}
    assert layer_flops(shapes, 4, torch.float32, CPU) > 0


# --- the profile ----------------------------------------------------------------------------------------------------
class FeedForwardOnly(nn.Module):
    """A model without attention and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Linear(8, 8)
        self.output = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.feed_forward(x))


def test_profile_contains_only_the_categories_of_the_model(tmp_path: Path) -> None:
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


def test_categories_of_submodules() -> None:
    names = dict(create_model(ModelConfig(model="open_lm_test_tiny")).named_modules())
    categories = {name: category_of(name) for name in names if category_of(name) is not None}
    assert categories["layers.1.attention"] == "attention" and categories["layers.0.feed_forward"] == "feed-forward"
    assert categories["layers.0.ffn_norm"] == categories["norm"] == "norms"
    assert categories["output"] == "loss and head" and categories["layers.0"] == "other"
    assert "layers.0.attention.in_proj" not in categories
