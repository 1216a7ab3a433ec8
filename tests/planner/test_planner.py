"""Test the planner: model size, memory compared with torch's tracker, communication, checkpoints, and the command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_plan
import pytest
import torch

from open_lm.config.adapters import parse_lora
from open_lm.config.architecture import model_names
from open_lm.config.checkpoint_policy import due_after_epoch, due_after_step, superseded
from open_lm.config.command_line import parse_args
from open_lm.config.layout import resolve_layout
from open_lm.config.sections import ACCUM_REDUCE, Config, ModelConfig
from open_lm.errors import ConfigError
from open_lm.model.adapters import add_adapters
from open_lm.model.transformer import create_model
from open_lm.monitor.metrics import model_flops_per_token
from open_lm.planner import command as plan
from open_lm.planner.checkpoints import plan_checkpoints
from open_lm.planner.memory import add_reserve, host_bytes, peak, phases
from open_lm.planner.setup import TrainingSetup
from open_lm.planner.shapes import shape_of
from open_lm.planner.strategies import STRATEGIES, largest_batch
from open_lm.planner.traffic import Rates, collectives, step_time

VARIANTS = {
    "default": {},
    "experts": {"moe_freq": 2, "moe_num_experts": 4},
    "gelu": {"ffn_type": "gelu", "model_norm": "no_wb_layer_norm"},
    "geglu": {"ffn_type": "gemma_geglu", "qk_norm": True, "model_norm": "rms_norm"},
}
MIXED = "--precision amp_bfloat16 --fsdp --fsdp-amp"


def setup(flags: str, ranks: int = 1, batch: int = 2) -> TrainingSetup:
    return check_plan.PlanCase("", flags, ranks, batch).setup()


def planned(flags: str) -> plan.Plan:
    return plan.make_plan(["--most-devices", "0", *shlex.split(flags)])


# --- the model ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_flops_match_the_models(variant: str) -> None:
    for name in model_names() if not VARIANTS[variant] else ("open_lm_87m", "llama2_7b"):
        cfg = ModelConfig(model=name, **VARIANTS[variant])
        with torch.device("meta"):
            model = create_model(cfg)
        shape = shape_of(cfg)
        found = {weight.name: weight.shape for weight in shape.weights}
        assert found == {key: tuple(value.shape) for key, value in model.named_parameters()}
        assert shape.flops_per_token == pytest.approx(model_flops_per_token(model))


FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"n_kv_heads": 2, "attn_window": 8, "ffn_dim": 96, "model_norm": "rms_norm"},
    "gemma_2": {
        **{"n_kv_heads": 1, "head_dim": 24, "norm_position": "both", "ffn_type": "geglu_tanh", "weight_tying": True},
        **{"attn_window": 8, "attn_window_pattern": [True, False], "model_norm": "gemma_rms_norm"},
    },
    "phi": {
        **{"parallel_block": True, "qkv_bias": True, "attn_out_bias": True, "ffn_bias": True, "head_bias": True},
        "ffn_type": "gelu_tanh",
    },
    "olmo": {"norm_position": "post", "qk_norm": True, "n_kv_heads": 2},
    "qwen": {"qk_norm": True, "qk_norm_per_head": True, "n_kv_heads": 2, "qkv_bias": True},
    "mixtral": {"moe_freq": 1, "moe_num_experts": 4, "moe_ffn_type": "swiglu", "moe_ffn_dim": 40, "n_kv_heads": 2},
}


@pytest.mark.parametrize("family", FAMILY_KEYS)
def test_shapes_and_flops_of_families(family: str, tmp_path: Path) -> None:
    contents = {"hidden_dim": 64, "n_layers": 3, "n_heads": 4, "seq_len": 32, "vocab_size": 50}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**contents, **FAMILY_KEYS[family]}))
    cfg = ModelConfig(model=str(path))
    with torch.device("meta"):
        model = create_model(cfg)
    shape = shape_of(cfg)
    assert {weight.name: weight.shape for weight in shape.weights} == {
        key: tuple(value.shape) for key, value in model.named_parameters()
    }
    assert shape.flops_per_token == pytest.approx(model_flops_per_token(model))
    _, _, cache = create_model(cfg)(torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    assert shape.kv_cache_values == sum(tensor.numel() for layer in cache for tensor in layer)


def test_windows_reduce_the_flops_of_attention(tmp_path: Path) -> None:
    contents = {"hidden_dim": 64, "n_layers": 3, "n_heads": 4, "seq_len": 32, "vocab_size": 50}
    flops = {}
    for window in (None, 32, 8):
        path = tmp_path / "model.json"
        keys = {} if window is None else {"attn_window": window, "attn_window_pattern": [True, True, False]}
        path.write_text(json.dumps({**contents, **keys}))
        flops[window] = shape_of(ModelConfig(model=str(path))).flops_per_token
    assert flops[None] == flops[32]
    visible = torch.ones(32, 32).tril().triu(-7)  # the keys of each query
    assert flops[None] - flops[8] == pytest.approx(12 * 64 * 2 * (32 - 2 * visible.sum().item() / 32), rel=0.05)


# --- memory ---------------------------------------------------------------------------------------------------------
COMPARED = ("single amp op", "fsdp accum every full", "hybrid accum every", "gemma_geglu", "ddp accum full",
            "fsdp muon full", "zero2 accum full", "context full", "offload full")  # fmt: skip


@pytest.mark.processes
def test_memory_is_within_a_tenth_of_the_tracked_memory(tmp_path: Path) -> None:
    contents = {"hidden_dim": 256, "n_layers": 2, "n_heads": 4, "seq_len": 512, "vocab_size": 8000}
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**contents, "post_embed_norm": False, "weight_tying": False}))
    # Run in a separate process: the fake device for host memory cannot be unregistered.
    command = [sys.executable, check_plan.__file__, "--models", str(path), "--only", ",".join(COMPARED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in COMPARED)
    (offloaded,) = (line for line in lines if line.startswith("offload full  "))
    planned_host, tracked_host = offloaded.split("host memory ")[1].split(" / ")
    assert planned_host == tracked_host


def test_check_plan_fails_on_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_plan, "compare", lambda case, detail: -0.11 if "muon" in case.name else 0.0)
    check_plan.main(["--models", "open_lm_11m", "--only", "gelu"])
    with pytest.raises(SystemExit, match="1"):
        check_plan.main(["--models", "open_lm_11m"])
    with pytest.raises(ConfigError, match="--only dpd: no case matches"):
        check_plan.main(["--only", "dpd"])


def test_memory_depends_on_batch_ranks_and_settings() -> None:
    one = peak(setup(f"--model open_lm_1b {MIXED}", 8, batch=1))
    two = peak(setup(f"--model open_lm_1b {MIXED}", 8, batch=2))
    more_ranks = peak(setup(f"--model open_lm_1b {MIXED}", 64, batch=1))
    assert one.total < two.total < 2 * one.total
    assert more_ranks.parameters + more_ranks.optimizer < (one.parameters + one.optimizer) / 7.9
    kept = [peak(setup(f"--model open_lm_1b {MIXED} --activation-checkpointing {mode}", 8)).activations
            for mode in ("full", "op", "none")]  # fmt: skip
    assert kept == sorted(kept)
    adamw, muon = (setup(f"--model open_lm_1b --precision fp32 --optimizer {name}") for name in ("adamw", "muon"))
    assert peak(muon).optimizer < peak(adamw).optimizer
    accumulating = setup(f"--model open_lm_1b {MIXED} --accum-freq 2", 8)
    assert (
        peak(accumulating).gradients >= 4 * accumulating.shape.num_params
    )  # unsharded, in the dtype of their reduction


@pytest.mark.parametrize("text", ["r=4", "r=2,targets=all-linear,dora=true"])
@pytest.mark.parametrize("model", ["open_lm_11m", "mistral_7b"])
def test_adapters_match_those_of_the_models(model: str, text: str) -> None:
    """Parameters, checkpoints and 4-bit weights of a run with --lora are those of the model with adapters."""
    with torch.device("meta"):
        adapted = create_model(ModelConfig(model=model))
    base = sum(value.numel() for value in adapted.parameters())
    add_adapters(adapted, parse_lora(text), quantize=True)
    trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    flags = f"--model {model} --precision fp32 --pretrained base.pt --lora {text}"
    plain, quantized = setup(flags), setup(f"{flags} --qlora nf4")
    assert plain.local_trained == trained and plain.parameter_bytes == 4 * (base + trained)
    held = sum(value.nbytes for value in (*adapted.parameters(), *adapted.buffers()))
    assert quantized.parameter_bytes == pytest.approx(held, rel=1e-3)
    last = list(phases(plain))[-1]
    assert last.gradients == 4 * trained and last.optimizer == 8 * trained
    assert plan_checkpoints(plain, 10, 1).sharded_bytes == pytest.approx(12 * trained, rel=0.01)
    assert setup(f"{flags} --fsdp", ranks=2).local_trained == pytest.approx(trained / 2, rel=0.01)


def test_accumulated_gradients_are_separate_from_ddp_buckets() -> None:
    """DDP copies accumulated gradients into its buckets only in the last micro-batch."""
    flags = "--model open_lm_1b --precision amp_bfloat16"
    shape = setup(flags).shape
    counts = {
        (ranks, accumulated): phases(setup(f"{flags} --accum-freq {accumulated}", ranks))
        for ranks in (1, 8)
        for accumulated in (1, 2)
    }
    found = {key: next(iter(memories)).gradients / shape.num_params for key, memories in counts.items()}
    assert found == {(1, 1): 0, (1, 2): 4, (8, 1): 4, (8, 2): 8}
    assert list(phases(setup(f"{flags} --accum-freq 2", 8)))[-1].gradients == 4 * shape.num_params


def test_reducing_every_micro_batch_accumulates_shards() -> None:
    flags = "--model open_lm_1b --precision amp_bfloat16 --fsdp --fsdp-amp --accum-freq 4 --accum-reduce"
    last, every = (setup(f"{flags} {value}", 8) for value in ACCUM_REDUCE)
    gradients = [next(iter(phases(each))).gradients / each.shape.num_params for each in (last, every)]
    assert gradients == pytest.approx([4, 4 / 8], rel=0.01)
    offloaded = setup(f"{flags} every-micro-batch --fsdp-cpu-offload", 8)
    assert next(iter(phases(offloaded))).gradients == 0
    hybrid = setup(f"{flags} every-micro-batch --fsdp-hybrid --fsdp-cpu-offload", 16)  # reduced over replicas later
    assert next(iter(phases(hybrid))).gradients == pytest.approx(4 / 8 * hybrid.shape.num_params, rel=0.01)
    sent = [{c.name: c.num_bytes for c in collectives(each)}["reduce-scatter gradients"] for each in (last, every)]
    assert sent[1] == 4 * sent[0]
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=1e11, inter=1e11)
    assert step_time(last, rates).seconds < step_time(every, rates).seconds
    slow = replace(rates, intra=1e9)  # only the last backward pass hides the reductions, or each its own
    assert step_time(last, slow).exposed_s < step_time(every, slow).exposed_s


def test_plan_reduces_every_micro_batch_only_where_that_saves_memory(tmp_path: Path) -> None:
    model = tmp_path / "llama_13b.json"
    shape = {"hidden_dim": 5120, "n_layers": 40, "n_heads": 40, "seq_len": 4096, "vocab_size": 32000}
    norms = {"post_embed_norm": False, "weight_tying": False, "model_norm": "rms_norm"}
    model.write_text(json.dumps({**shape, **norms}))
    run = f"--model {model} --devices 8 --strategies fsdp --grad-checkpointing"
    every = "--accum-reduce every-micro-batch"
    sizes = {}
    for device, accumulation in (("H100", ""), ("A100 40GB", every), ("A100 40GB", "--accum-reduce last")):
        given = accumulation if "last" in accumulation else ""
        (option,) = planned(f"{run} --device '{device}' --batch-size 1 --accum-freq 4 {given}").options
        assert option.fits == ("last" not in accumulation) and (every in option.command()) == (accumulation == every)
        sizes[accumulation] = option.memory.total / 2**30
    assert sizes[""] == pytest.approx(73, abs=1) and sizes[every] == pytest.approx(31, abs=1)
    (option,) = planned(f"{run} --device 'A100 40GB' --global-batch-size 64").options
    assert option.fits and "--accum-freq 4 --accum-reduce every-micro-batch" in option.command()


def test_muon_divides_work_but_not_results_between_ddp_ranks() -> None:
    def extra(flags: str, ranks: int) -> float:
        one = setup(f"--model open_lm_1b {flags} --optimizer muon", ranks)
        *_, update = phases(one)
        return update.activations / sum(w.size for w in one.shape.weights if w.block is not None and len(w.shape) > 1)

    assert extra("--precision fp32", 8) == pytest.approx(6)  # directions, and send and receive buffers
    assert 4 * extra(MIXED, 64) < extra(MIXED, 8)
    assert 0 < extra(MIXED, 8) < extra("--precision fp32", 1) < 6


def test_muon_takes_a_large_share_of_small_steps() -> None:
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=1e11, inter=1e11)
    times = {
        batch: step_time(replace(setup("--model open_lm_1b --optimizer muon"), batch=batch), rates) for batch in (8, 64)
    }
    assert times[8].muon_s / times[8].compute_s == pytest.approx(0.43, abs=0.05)
    assert times[64].muon_s == times[8].muon_s < 0.07 * times[64].compute_s
    shared = step_time(setup("--model open_lm_1b --optimizer muon", 8), rates)
    assert shared.muon_s == pytest.approx(times[8].muon_s / 8)
    assert step_time(setup("--model open_lm_1b"), rates).muon_s == 0


def test_cpu_offload_moves_weights_to_host_memory() -> None:
    offloaded = setup(f"--model open_lm_1b {MIXED} --fsdp-cpu-offload", 8)
    assert peak(offloaded).parameters == peak(offloaded).optimizer == 0
    assert host_bytes(offloaded) == pytest.approx(16 * offloaded.shape.num_params / 8, rel=0.01)
    assert host_bytes(setup(f"--model open_lm_1b {MIXED}", 8)) == 0


def test_tensor_and_context_parallelism_divide_memory() -> None:
    fsdp_only = setup(f"--model open_lm_1b {MIXED}", 8)
    tensor = setup(f"--model open_lm_1b {MIXED} --tensor-parallel 4", 8)
    context = setup(f"--model open_lm_1b {MIXED} --context-parallel 4", 8)
    assert tensor.local_params == pytest.approx(fsdp_only.local_params, rel=0.01)
    assert tensor.unsharded_trained == pytest.approx(fsdp_only.unsharded_trained / 4, rel=0.01)
    assert peak(tensor).activations < peak(fsdp_only).activations / 2
    assert context.tokens == fsdp_only.tokens / 4
    assert peak(context).activations < peak(fsdp_only).activations / 2


def test_largest_batch_is_the_limit() -> None:
    for limit in (0, 1, 2, 7, 64, 1000):
        assert largest_batch(lambda batch, limit=limit: batch <= limit) == limit
    found = planned("--model open_lm_1b --devices 8 --device-memory 40GB")
    for option in found.options:
        if option.fits:
            assert option.setup is not None
            sizes = [
                add_reserve(peak(each), each).total
                for each in (option.setup, replace(option.setup, batch=option.largest + 1))
            ]
            assert sizes[0] <= 40e9 < sizes[1]


def test_phases_cover_a_step() -> None:
    names = [memory.phase for memory in phases(setup("--model open_lm_11m --precision fp32"))]
    assert names == [
        "loss",
        *(f"backward of block {n}" for n in range(11, -1, -1)),
        "backward of the embedding",
        "update",
    ]


# --- communication and time -----------------------------------------------------------------------------------------
def test_sent_bytes_match_ring_algorithms() -> None:
    ddp = setup("--model open_lm_1b --precision fp32", 8)
    num_params = ddp.shape.num_params
    assert [collective.num_bytes for collective in collectives(ddp)] == [2 * 7 / 8 * 4 * num_params]
    by_name = {c.name: c for c in collectives(setup(f"--model open_lm_1b {MIXED}", 8))}
    assert by_name["all-gather, forward"].num_bytes == pytest.approx(7 / 8 * 2 * num_params, rel=1e-3)
    assert by_name["reduce-scatter gradients"].num_bytes == pytest.approx(7 / 8 * 4 * num_params, rel=1e-3)
    assert "all-gather, backward" in by_name
    zero2 = {c.name: c for c in collectives(setup(f"--model open_lm_1b {MIXED} --fsdp-zero2", 8))}
    assert zero2["all-gather, backward"].num_bytes == 0
    hybrid = {c.name: c for c in collectives(setup(f"--model open_lm_1b {MIXED} --fsdp-hybrid", 16))}
    assert (hybrid["all-gather, forward"].group, hybrid["all-reduce over replicas"].group) == (8, 2)
    assert not collectives(setup("--model open_lm_1b --precision fp32"))


def test_bandwidth_within_and_between_nodes() -> None:
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=400e9, inter=200e9, per_node=8)
    assert rates.bandwidth(8, 1) == 400e9
    assert rates.bandwidth(16, 1) == 200e9  # one ring that uses the links of all eight devices
    assert rates.bandwidth(2, 8) == 25e9  # eight rings, one for each device


def test_step_time_follows_flops_and_recomputation() -> None:
    rates = Rates(matmul_flops=1e15, mfu=0.5, intra=1e15, inter=1e15)
    plain = setup("--model open_lm_1b --precision amp_bfloat16")
    time = step_time(plain, rates)
    assert time.tokens == 2 * 2048
    assert time.seconds == pytest.approx(plain.shape.flops_per_token * time.tokens / 0.5e15)
    again = step_time(setup("--model open_lm_1b --precision amp_bfloat16 --activation-checkpointing full"), rates)
    assert 1.2 < again.seconds / time.seconds < 1.27  # runs lose less than the FLOPs of a forward pass
    slow = replace(rates, intra=1e9, inter=1e9)
    waiting = step_time(setup(f"--model open_lm_1b {MIXED}", 8), slow)
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
def test_checkpoints_match_the_retention_policy(flags: str) -> None:
    steps, epochs = 100, 4
    one = setup(f"--model open_lm_11m --precision fp32 {flags}")
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
    found = plan_checkpoints(one, steps, epochs)
    assert (found.sharded, found.sharded_kept) == (written, len(known))
    assert found.files == (0 if cfg.checkpoint_format == "sharded" else files)
    assert found.sharded_bytes == 12 * one.shape.num_params


# --- the command ----------------------------------------------------------------------------------------------------
def test_printed_commands_parse_to_the_planned_configuration() -> None:
    found = planned("--model open_lm_1b --devices 16 --device-memory 80GB --train-tokens 1e9 --lr 1e-3")
    assert {option.strategy for option in found.options} == set(STRATEGIES) - {"single", "expert"}  # no experts
    for option in found.options:
        assert not option.problem
        words = shlex.split(option.command())
        assert words[:3] == ["torchrun", "--nnodes", "2"]
        config = Config.from_namespace(parse_args(words[words.index("open_lm.main") + 1 :]))
        assert option.setup is not None
        assert option.setup.config == config
        assert resolve_layout(config.parallel, 16, 8) == option.setup.layout
        assert config.data.batch_size == option.batch
        assert (config.optim.lr, config.data.train_num_samples, config.data.epochs) == (1e-3, 10**9, 1)
    assert found.recommended is not None
    speeds = [option.time.tokens_per_s for option in found.options if option.fits and option.time]
    assert found.recommended.time is not None
    assert found.recommended.time.tokens_per_s >= 0.995 * max(speeds)


EXPERTS = "--moe-freq 1 --moe-num-experts 8"


def test_divided_experts_take_less_memory_and_traffic_of_parameters() -> None:
    """Adam's state is divided equally either way; unsharded blocks hold the experts of one rank only."""
    one = "--model open_lm_1b --precision amp_bfloat16 --fsdp --fsdp-amp"
    plain, divided = (setup(f"{one} {EXPERTS} {flags}", ranks=64) for flags in ("", "--expert-parallel 8"))
    assert divided.local_params == plain.local_params
    experts = [weight for weight in plain.shape.by_block[0] if weight.role == "expert"]
    assert divided.unsharded_numel(experts) == plain.unsharded_numel(experts) / 8
    sent = [{c.name: c.num_bytes for c in collectives(each)} for each in (plain, divided)]
    gathered = [sum(size for name, size in each.items() if "all-gather" in name) for each in sent]
    assert gathered[1] < 0.3 * gathered[0]
    # Slots for 1.25 times two choices of each token, sent there and back, forward and backward.
    tokens = divided.tokens * 1.25 * 2 * 2048 * 2 * 7 / 8 * 4 * 24
    assert sent[1]["tokens (experts)"] == pytest.approx(tokens)


def test_all_to_all_between_nodes_shares_the_links_of_a_node() -> None:
    rates = Rates(1e15, 0.5, intra=400e9, inter=400e9, per_node=8)
    assert rates.direct_bandwidth(8, 1) == 400e9
    assert rates.direct_bandwidth(16, 1) == pytest.approx(50e9 * 15 / 8)
    assert rates.bandwidth(16, 1) == 400e9  # a ring leaves the node over one rank


def test_experts_are_divided_over_the_ranks_of_a_node() -> None:
    found = planned(f"--model open_lm_160m --devices 16 --strategies expert {EXPERTS} --batch-size 1 --most-devices 0")
    assert all(option.setup and option.setup.layout.expert == 8 for option in found.options)


def test_global_batch_is_divided_into_micro_batches_that_fit() -> None:
    found = planned("--model open_lm_7b --devices 8 --global-batch-size 512 --strategies fsdp,zero2")
    for option in found.options:
        assert option.setup is not None
        assert option.batch * option.setup.config.optim.accum_freq * 8 == 512
        assert option.fits
    assert any(option.setup and option.setup.config.optim.accum_freq > 1 for option in found.options)


def test_an_invalid_strategy_does_not_exclude_the_others() -> None:
    """CUDA graphs exclude gradient accumulation; only some strategies fit the global batch without it."""
    graphs = "--torchcompile --torchcompile-mode max-autotune"
    found = planned(f"--model open_lm_7b --devices 8 --global-batch-size 16 --strategies ddp,fsdp {graphs}").options
    for option in found:
        assert option.fits == (option.strategy == "fsdp")
        if option.strategy == "ddp":
            assert "with --accum-freq 2, to fit into memory" in option.problem
            assert "--torchcompile-mode max-autotune" in option.problem
    with pytest.raises(ConfigError, match="remove --accum-freq"):
        planned(f"--model open_lm_7b --devices 8 --accum-freq 2 {graphs}")


def test_strategy_flags_limit_the_plan_to_that_strategy() -> None:
    (option,) = planned("--model open_lm_1b --fsdp --activation-checkpointing op --batch-size 2").options
    assert (option.strategy, option.checkpointing, option.batch) == ("given", "op", 2)


@pytest.mark.parametrize("flags", ["--fsdp", "--mesh-dim 2,-1,2", "--mesh-dim -1,4,2", "--strategies fsdp"])
def test_sharded_strategies_default_to_fsdp_amp(flags: str) -> None:
    given = f"--model open_lm_160m --devices 8 --batch-size 1 --most-devices 0 {flags}"
    assert all("--fsdp-amp" in option.flags for option in planned(given).options)
    given_flags = planned(f"{given} --fsdp-pure-bf16").options
    assert not any("--fsdp-amp" in option.flags for option in given_flags)


def test_scaling_table_and_limits() -> None:
    argv = "--model open_lm_1b --devices 8 --most-devices 32 --batch-size 1 --bandwidth-inter 1 --strategies ddp,hybrid"
    result = plan.make_plan(argv.split())
    assert list(result.growth) == [8, 16, 32]
    assert result.growth[8]["hybrid"].problem
    text = plan.format_plan(result)
    assert "ddp: scales to 8 devices; on 16 devices," in text
    assert "More devices" in text
    assert json.loads(json.dumps(plan.plan_values(result)))["growth"]["32"]["ddp"]["exposed_s"] > 0


def test_report_says_when_nothing_fits() -> None:
    result = planned("--model open_lm_7b --devices 1 --device-memory 24GB --strategies single")
    assert result.recommended is None
    assert "Nothing fits" in plan.format_plan(result)


def test_all_problems_are_reported_together() -> None:
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
        ("--devices 8 --tensor-parallel 3", "found 8 ranks, expected a multiple of 3"),
        ("--devices 8 --tensor-parallel 8 --model open_lm_11m", "12 heads"),
        ("--devices 8 --fsdp --global-batch-size 12", "--global-batch-size 12 is not divisible by 8"),
        ("--devices 8 --fsdp --expert-parallel 2 --model open_lm_11m", "--expert-parallel 2: the model has no mixture"),
        ("--devices 8 --fsdp --expert-parallel 8 --moe-freq 1 --moe-num-experts 6", "over 1, 2, 3, 6 ranks"),
        ("--hf-model gpt2", "--hf-model gpt2"),
        ("--bench nowhere.json", "--bench nowhere.json"),
        ("--devices 2.5", "--devices: found '2.5'"),
    ],
)
def test_invalid_command_lines(flags: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        planned(flags)


def test_speeds_are_read_from_a_benchmark_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    entry = {
        "flops_per_token": 1e9,
        "ceilings": {"bfloat16": {"own": 4e14, "square": 5e14}},
        "results": {"ours": {"speeds": [1.9e5, 2e5, 2.1e5]}},
    }
    path.write_text(json.dumps({"models": {"open_lm_160m": entry}}))
    rates = planned(f"--model open_lm_160m --bench {path}").rates
    assert (rates.matmul_flops, rates.mfu) == (pytest.approx(4e14), pytest.approx(0.5))
    with pytest.raises(ConfigError, match="no measurement of open_lm_1b"):
        planned(f"--model open_lm_1b --bench {path}")


@pytest.mark.processes
def test_planner_does_not_import_torch() -> None:
    argv = ["--model", "open_lm_1b", "--most-devices", "0", "--json"]
    code = f"import sys, open_lm.planner.command as p; p.main({argv}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["recommended"]["fits"]


def test_example_in_the_documentation_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    example = text.partition("## Example\n\n")[2].partition("\n\n")
    words = shlex.split(example[0].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "open_lm.plan"]
    plan.main(words[3:])
    found = capsys.readouterr().out.strip().splitlines()
    shown = [line.removeprefix("    ") for line in example[2].splitlines()[: len(found)]]
    until = next(number for number, line in enumerate(found) if line.startswith("  disk:")) + 1
    assert shown[:until] == found[:until]
