"""The planner: a model's size, memory against torch's tracker, exchange, checkpoints, and the command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from open_lm.checkpoint.policy import due_after_epoch, due_after_step, superseded
from open_lm.config.architecture import model_names
from open_lm.config.command_line import parse_args
from open_lm.config.layout import layout_of
from open_lm.config.sections import Config, ModelConfig
from open_lm.errors import ConfigError
from open_lm.model.transformer import create_model
from open_lm.monitor.metrics import model_flops_per_token
from open_lm.planner import command as plan
from open_lm.planner.checkpoints import checkpoints_of
from open_lm.planner.memory import Job, host_bytes, peak, phases, with_reserve
from open_lm.planner.shapes import shape_of
from open_lm.planner.strategies import STRATEGIES, largest_batch
from open_lm.planner.traffic import Rates, exchanges, step_time

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import check_plan

VARIANTS = {
    "as in the file": {},
    "experts": {"moe_freq": 2, "moe_num_experts": 4},
    "gelu": {"ffn_type": "gelu", "model_norm": "no_wb_layer_norm"},
    "geglu": {"ffn_type": "gemma_geglu", "qk_norm": True, "model_norm": "rms_norm"},
}
MIXED = "--precision amp_bfloat16 --fsdp --fsdp-amp"


def job(flags: str, ranks: int = 1, batch: int = 2) -> Job:
    return check_plan.Case("", flags, ranks, batch).job()


def planned(flags: str) -> plan.Plan:
    return plan.make_plan(["--most-devices", "0", *shlex.split(flags)])


# --- the model ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_flops_are_those_of_the_models(variant: str) -> None:
    for name in model_names() if not VARIANTS[variant] else ("open_lm_87m", "llama2_7b"):
        cfg = ModelConfig(model=name, **VARIANTS[variant])
        with torch.device("meta"):
            model = create_model(cfg)
        shape = shape_of(cfg)
        found = {weight.name: weight.shape for weight in shape.weights}
        assert found == {key: tuple(value.shape) for key, value in model.named_parameters()}
        assert shape.flops_per_token == pytest.approx(model_flops_per_token(model))


# --- memory ---------------------------------------------------------------------------------------------------------
COMPARED = ("single amp op", "gemma_geglu", "ddp accum full", "fsdp muon full", "zero2 accum full", "context full",
            "offload full")  # fmt: skip


def test_memory_is_within_a_tenth_of_what_torch_tracks(tmp_path: Path) -> None:
    contents = {"hidden_dim": 256, "n_layers": 2, "n_heads": 4, "seq_len": 512, "vocab_size": 8000}
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**contents, "post_embed_norm": False, "weight_tying": False}))
    # A process of its own, as the device that stands for host memory stays.
    command = [sys.executable, check_plan.__file__, "--models", str(path), "--only", ",".join(COMPARED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in COMPARED)
    (offloaded,) = (line for line in lines if line.startswith("offload full  "))
    planned_host, tracked_host = offloaded.split("in host memory ")[1].split(" and ")
    assert planned_host == tracked_host


def test_the_comparison_fails_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_plan, "compare", lambda case, detail: -0.11 if "muon" in case.name else 0.0)
    check_plan.main(["--models", "open_lm_11m", "--only", "gelu"])
    with pytest.raises(SystemExit, match="1"):
        check_plan.main(["--models", "open_lm_11m"])
    with pytest.raises(ConfigError, match="--only dpd: found no such case"):
        check_plan.main(["--only", "dpd"])


def test_memory_follows_batch_ranks_and_settings() -> None:
    one = peak(job(f"--model open_lm_1b {MIXED}", 8, batch=1))
    two = peak(job(f"--model open_lm_1b {MIXED}", 8, batch=2))
    more_ranks = peak(job(f"--model open_lm_1b {MIXED}", 64, batch=1))
    assert one.total < two.total < 2 * one.total
    assert more_ranks.parameters + more_ranks.optimizer < (one.parameters + one.optimizer) / 7.9
    kept = [peak(job(f"--model open_lm_1b {MIXED} --activation-checkpointing {mode}", 8)).activations
            for mode in ("full", "op", "none")]  # fmt: skip
    assert kept == sorted(kept)
    adamw, muon = (job(f"--model open_lm_1b --precision fp32 --optimizer {name}") for name in ("adamw", "muon"))
    assert peak(muon).optimizer < peak(adamw).optimizer
    accumulating = job(f"--model open_lm_1b {MIXED} --accum-freq 2", 8)
    assert peak(accumulating).gradients >= 4 * accumulating.shape.num_params  # whole, in the type of their reduction


def test_gradients_of_micro_batches_wait_beside_ddp_s_buckets() -> None:
    """DDP takes them into its buckets in the last micro-batch alone."""
    flags = "--model open_lm_1b --precision amp_bfloat16"
    shape = job(flags).shape
    counts = {
        (ranks, accumulated): phases(job(f"{flags} --accum-freq {accumulated}", ranks))
        for ranks in (1, 8)
        for accumulated in (1, 2)
    }
    found = {key: next(iter(memories)).gradients / shape.num_params for key, memories in counts.items()}
    assert found == {(1, 1): 0, (1, 2): 4, (8, 1): 4, (8, 2): 8}
    assert list(phases(job(f"{flags} --accum-freq 2", 8)))[-1].gradients == 4 * shape.num_params


def test_ranks_share_the_work_of_muon_but_not_its_results_under_ddp() -> None:
    def extra(flags: str, ranks: int) -> float:
        one = job(f"--model open_lm_1b {flags} --optimizer muon", ranks)
        *_, update = phases(one)
        return update.activations / sum(w.size for w in one.shape.weights if w.block is not None and len(w.shape) > 1)

    assert extra("--precision fp32", 8) == pytest.approx(6)  # directions, and those that are sent and received
    assert 4 * extra(MIXED, 64) < extra(MIXED, 8)
    assert 0 < extra(MIXED, 8) < extra("--precision fp32", 1) < 6


def test_offloaded_weights_are_in_host_memory() -> None:
    offloaded = job(f"--model open_lm_1b {MIXED} --fsdp-cpu-offload", 8)
    assert peak(offloaded).parameters == peak(offloaded).optimizer == 0
    assert host_bytes(offloaded) == pytest.approx(16 * offloaded.shape.num_params / 8, rel=0.01)
    assert host_bytes(job(f"--model open_lm_1b {MIXED}", 8)) == 0


def test_tensor_and_context_parallelism_divide_what_they_should() -> None:
    alone = job(f"--model open_lm_1b {MIXED}", 8)
    tensor = job(f"--model open_lm_1b {MIXED} --tensor-parallel 4", 8)
    context = job(f"--model open_lm_1b {MIXED} --context-parallel 4", 8)
    assert tensor.own_numbers == pytest.approx(alone.own_numbers, rel=0.01)
    assert tensor.whole_numbers == pytest.approx(alone.whole_numbers / 4, rel=0.01)
    assert peak(tensor).activations < peak(alone).activations / 2
    assert context.tokens == alone.tokens / 4
    assert peak(context).activations < peak(alone).activations / 2


def test_the_largest_batch_is_the_largest() -> None:
    for limit in (0, 1, 2, 7, 64, 1000):
        assert largest_batch(lambda batch, limit=limit: batch <= limit) == limit
    found = planned("--model open_lm_1b --devices 8 --device-memory 40GB")
    for option in found.found:
        if option.fits:
            assert option.job is not None
            sizes = [
                with_reserve(peak(each), each).total
                for each in (option.job, replace(option.job, batch=option.largest + 1))
            ]
            assert sizes[0] <= 40e9 < sizes[1]


def test_every_phase_of_a_step_is_counted() -> None:
    names = [memory.phase for memory in phases(job("--model open_lm_11m --precision fp32"))]
    assert names == [
        "loss",
        *(f"backward of block {n}" for n in range(11, -1, -1)),
        "backward of the embedding",
        "update",
    ]


# --- exchange and time ----------------------------------------------------------------------------------------------
def test_bytes_exchanged_are_those_of_ring_algorithms() -> None:
    ddp = job("--model open_lm_1b --precision fp32", 8)
    num_params = ddp.shape.num_params
    assert [exchange.num_bytes for exchange in exchanges(ddp)] == [2 * 7 / 8 * 4 * num_params]
    by_name = {exchange.name: exchange for exchange in exchanges(job(f"--model open_lm_1b {MIXED}", 8))}
    assert by_name["gather, forward"].num_bytes == pytest.approx(7 / 8 * 2 * num_params, rel=1e-3)
    assert by_name["reduce gradients"].num_bytes == pytest.approx(7 / 8 * 4 * num_params, rel=1e-3)
    assert "gather, backward" in by_name
    zero2 = {exchange.name: exchange for exchange in exchanges(job(f"--model open_lm_1b {MIXED} --fsdp-zero2", 8))}
    assert zero2["gather, backward"].num_bytes == 0
    hybrid = {exchange.name: exchange for exchange in exchanges(job(f"--model open_lm_1b {MIXED} --fsdp-hybrid", 16))}
    assert (hybrid["gather, forward"].group, hybrid["sum over copies"].group) == (8, 2)
    assert not exchanges(job("--model open_lm_1b --precision fp32"))


def test_groups_inside_a_node_have_its_links_and_others_share_the_node_s() -> None:
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=400e9, inter=200e9, per_node=8)
    assert rates.bandwidth(8, 1) == 400e9
    assert rates.bandwidth(16, 1) == 200e9  # one ring that all eight devices of a node feed
    assert rates.bandwidth(2, 8) == 25e9  # eight rings, one for each device


def test_time_is_what_the_model_s_flops_take_and_recomputation_adds() -> None:
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=1e15, inter=1e15)
    plain = job("--model open_lm_1b --precision amp_bfloat16")
    time = step_time(plain, rates)
    assert time.tokens == 2 * 2048
    assert time.seconds == pytest.approx(plain.shape.flops_per_token * time.tokens / 0.5e15)
    again = step_time(job("--model open_lm_1b --precision amp_bfloat16 --activation-checkpointing full"), rates)
    assert 1.25 < again.seconds / time.seconds < 4 / 3
    slow = replace(rates, intra=1e9, inter=1e9)
    waiting = step_time(job(f"--model open_lm_1b {MIXED}", 8), slow)
    assert waiting.exposed_s > 0
    assert waiting.efficiency < 0.5


# --- checkpoints ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--save-every-n-steps 7",
        "--save-every-n-steps 10 --keep-last 3 --save-milestone-every 20",
        "--save-every-n-steps 10 --keep-last 0 --checkpoint-format sharded",
        "--delete-previous-checkpoint --save-frequency 2",
    ],
)
def test_checkpoints_are_counted_as_the_policy_keeps_them(flags: str) -> None:
    steps, epochs = 100, 4
    one = job(f"--model open_lm_11m --precision fp32 {flags}")
    cfg = one.config.checkpoint
    known: list[int] = []
    written = files = 0
    for step in range(1, steps + 1):
        epoch_end = step % 25 == 0 and due_after_epoch(cfg, step // 25, step == steps)
        files += epoch_end
        if due_after_step(cfg, step) or epoch_end:
            written += 1
            known = [*known, step]
            gone = superseded(cfg, known, step)
            known = [step for step in known if step not in gone]
    found = checkpoints_of(one, steps, epochs)
    assert (found.sharded, found.sharded_kept) == (written, len(known))
    assert found.files == (0 if cfg.checkpoint_format == "sharded" else files)
    assert found.sharded_bytes == 12 * one.shape.num_params


# --- the command ----------------------------------------------------------------------------------------------------
def test_commands_are_what_the_trainer_takes_and_say_what_was_planned() -> None:
    found = planned("--model open_lm_1b --devices 16 --device-memory 80GB --train-tokens 1e9 --lr 1e-3")
    assert {option.strategy for option in found.found} == set(STRATEGIES) - {"single"}
    for option in found.found:
        assert not option.problem
        words = shlex.split(option.command())
        assert words[:3] == ["torchrun", "--nnodes", "2"]
        config = Config.from_namespace(parse_args(words[words.index("open_lm.main") + 1 :]))
        assert option.job is not None
        assert option.job.config == config
        assert layout_of(config.parallel, 16, 8) == option.job.layout
        assert config.data.batch_size == option.batch
        assert (config.optim.lr, config.data.train_num_samples, config.data.epochs) == (1e-3, 10**9, 1)
    assert found.chosen is not None
    speeds = [option.time.tokens_per_s for option in found.found if option.fits and option.time]
    assert found.chosen.time is not None
    assert found.chosen.time.tokens_per_s >= 0.995 * max(speeds)


def test_a_global_batch_is_divided_into_micro_batches_that_fit() -> None:
    found = planned("--model open_lm_7b --devices 8 --global-batch-size 512 --strategies fsdp,zero2")
    for option in found.found:
        assert option.job is not None
        assert option.batch * option.job.config.optim.accum_freq * 8 == 512
        assert option.fits
    assert any(option.job and option.job.config.optim.accum_freq > 1 for option in found.found)


def test_a_strategy_that_needs_what_the_trainer_refuses_leaves_the_others() -> None:
    """CUDA graphs go without accumulation; the global batch fits without it for some."""
    graphs = "--torchcompile --torchcompile-mode max-autotune"
    found = planned(f"--model open_lm_7b --devices 8 --global-batch-size 16 --strategies ddp,fsdp {graphs}").found
    for option in found:
        assert option.fits == (option.strategy == "fsdp")
        if option.strategy == "ddp":
            assert "with --accum-freq 2, to fit" in option.problem
            assert "--torchcompile-mode max-autotune" in option.problem
    with pytest.raises(ConfigError, match="leave out --accum-freq"):
        planned(f"--model open_lm_7b --devices 8 --accum-freq 2 {graphs}")


def test_flags_that_choose_a_strategy_are_planned_alone() -> None:
    (option,) = planned("--model open_lm_1b --fsdp --activation-checkpointing op --batch-size 2").found
    assert (option.strategy, option.checkpointing, option.batch) == ("given", "op", 2)


@pytest.mark.parametrize("flags", ["--fsdp", "--mesh-dim 2,-1,2", "--strategies fsdp"])
def test_shards_travel_in_half_precision_unless_it_is_said_otherwise(flags: str) -> None:
    given = f"--model open_lm_160m --devices 8 --batch-size 1 --most-devices 0 {flags}"
    assert all("--fsdp-amp" in option.flags for option in planned(given).found)
    stated = planned(f"{given} --fsdp-pure-bf16").found
    assert not any("--fsdp-amp" in option.flags for option in stated)


def test_more_devices_are_tabled_and_strategies_end() -> None:
    argv = "--model open_lm_1b --devices 8 --most-devices 32 --batch-size 1 --bandwidth-inter 1 --strategies ddp,hybrid"
    made = plan.make_plan(argv.split())
    assert list(made.growth) == [8, 16, 32]
    assert made.growth[8]["hybrid"].problem
    said = plan.text(made)
    assert "ddp: scales to 8; on 16," in said
    assert "More devices" in said
    assert json.loads(json.dumps(plan.values(made)))["growth"]["32"]["ddp"]["exposed_s"] > 0


def test_nothing_that_fits_is_said() -> None:
    made = planned("--model open_lm_7b --devices 1 --device-memory 24GB --strategies single")
    assert made.chosen is None
    assert "Nothing fits" in plan.text(made)


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        planned("--model open_lm_7bb --devices 12 --device-memory 80 --mfu x --bandwidth-intra 0 --device Abacus")
    for part in ("open_lm_7bb", "--devices 12", "without a unit", "--mfu: found 'x'", "--bandwidth-intra", "Abacus"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--fsdp-typo", "unknown flag --fsdp-typo"),
        ("--strategies fsdp,magic", "magic"),
        ("--strategies fsdp --tensor-parallel 2", "one or the other"),
        ("--devices 8 --tensor-parallel 3", "8 ranks do not divide"),
        ("--devices 8 --tensor-parallel 8 --model open_lm_11m", "12 heads"),
        ("--devices 8 --fsdp --global-batch-size 12", "--global-batch-size 12 does not divide into 8"),
        ("--hf-model gpt2", "--hf-model gpt2"),
        ("--bench nowhere.json", "--bench nowhere.json"),
        ("--devices 2.5", "--devices: found '2.5'"),
    ],
)
def test_what_cannot_be_planned_is_an_error_with_a_way_out(flags: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        planned(flags)


def test_measured_speeds_come_from_the_benchmark_s_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    entry = {
        "flops_per_token": 1e9,
        "matmul_flops": {"bfloat16": {"own": 4e14, "square": 5e14}},
        "results": {"ours": {"speeds": [1.9e5, 2e5, 2.1e5]}},
    }
    path.write_text(json.dumps({"models": {"open_lm_160m": entry}}))
    rates = planned(f"--model open_lm_160m --bench {path}").rates
    assert (rates.matmul_flops, rates.mfu) == (pytest.approx(4e14), pytest.approx(0.5))
    with pytest.raises(ConfigError, match="no measurement of open_lm_1b"):
        planned(f"--model open_lm_1b --bench {path}")


def test_planning_loads_no_torch() -> None:
    argv = ["--model", "open_lm_1b", "--most-devices", "0", "--json"]
    code = f"import sys, open_lm.planner.command as p; p.main({argv}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["recommended"]["fits"]


def test_the_example_of_the_documentation_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    example = text.partition("## An example\n\n")[2].partition("\n\n")
    words = shlex.split(example[0].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "open_lm.plan"]
    plan.main(words[3:])
    found = capsys.readouterr().out.strip().splitlines()
    shown = [line.removeprefix("    ") for line in example[2].splitlines()[: len(found)]]
    until = next(number for number, line in enumerate(found) if line.startswith("  disk:")) + 1
    assert shown[:until] == found[:until]
