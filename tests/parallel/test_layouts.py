"""Every mesh layout initialises, trains, evaluates and compiles the same model."""

from __future__ import annotations

from functools import partial
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import layout_worker
import parity
import pytest
import torch
from parity import on_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.cudagraph_trees import MarkStepBox
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.distributed.processes import init_runtime, shutdown
from open_lm.errors import ConfigError
from open_lm.model.initialization import init_weights
from open_lm.model.losses import TokenLoss
from open_lm.model.recomputation import _is_expensive
from open_lm.model.transformer import Params, Transformer
from open_lm.parallel.parallelize import _materialise, _shard, ineffective_settings, parallelize
from open_lm.parallel.tensor_parallel import check_tensor_parallel

TENSOR_PARALLEL = {"tensor_parallel": 2}
INITIALISED_LAYOUTS = [
    {"fsdp": True, "tensor_parallel": 2},
    {"fsdp": True},
    {"tensor_parallel": 4},
    {"fsdp": True, "mesh_dim": "2,1,2"},
    {"fsdp": True, "context_parallel": 2},
]


def test_option_pairs_are_covered_in_each_kind_of_layout() -> None:
    chosen = parity.cases(2)
    assert {case["layout"] for case in chosen} == set(parity.LAYOUTS)
    covered = parity.combined_options(
        [{**case, "size": "even" if case["size"] == "even" else "odd"} for case in chosen]
    )
    two_valued = [name for name, values in parity.OPTIONS.items() if len(values) == 2]
    for kind in ("tensor", "context", "fsdp"):
        for one, other in combinations(two_valued, 2):
            for values in product(parity.OPTIONS[one], parity.OPTIONS[other]):
                assert (kind, one, values[0], other, values[1]) in covered
    assert ("context_tensor", "masked", True, "z_loss", 1e-3) in covered


def covered_values(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    kinds = parity.kinds(case["layout"]) + ["--fsdp"] * ("fsdp" in parity.LAYOUTS[case["layout"]][1])
    return {(kind, option, case[option]) for kind in kinds for option in parity.OPTIONS}


@pytest.mark.processes
def test_every_layout_trains_like_a_single_process() -> None:
    """Train 2 steps, on more than 2 ranks with one set of options per layout that covers most new values.

    Layouts that reduce gradients after every micro-batch get the set with more than one.

    `scripts/parity.py` trains 20 steps of wider models, with two sets of options.
    """
    cases = [{**case, "size": "odd"} if case["size"] == "87m" else case for case in parity.cases(2)]
    chosen: list[dict[str, Any]] = []
    covered: set[tuple[Any, ...]] = set()
    for pair in zip(cases[::2], cases[1::2], strict=True):
        ranks, settings = parity.LAYOUTS[pair[0]["layout"]]
        if "accum_reduce" in settings:
            selected = [case for case in pair if case["accum_freq"] > 1]
        elif ranks == 2:
            selected = pair
        else:
            selected = [max(pair, key=lambda case: len(covered_values(case) - covered))]
        chosen += selected
        covered.update(*map(covered_values, selected))
    for kind, (option, values) in product(("--fsdp", "tensor", "context"), parity.OPTIONS.items()):
        assert all((kind, option, value) in covered for value in values), (kind, option)
    differences = parity.run(chosen, steps=2)
    failures = [
        (difference, case) for difference, case in zip(differences, chosen, strict=True) if not difference < 1e-5
    ]
    assert not failures


def test_the_offload_layout_offloads_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of scripts/parity.py, --fsdp-cpu-offload has no effect on a CPU."""
    policies = []
    monkeypatch.setattr("open_lm.parallel.parallelize.fully_shard", lambda module, **options: policies.append(options))
    model = meta_model(weight_tying=True)  # a single group
    cfg, cpu = ParallelConfig(**parity.LAYOUTS["offload"][1]), torch.device("cpu")
    with parity.offloading_from_cpu():
        _shard(model, [], None, cfg, cpu)  # type: ignore[arg-type]
    _shard(model, [], None, cfg, cpu)  # type: ignore[arg-type]
    assert [type(options["offload_policy"]) for options in policies] == [CPUOffloadPolicy, OffloadPolicy]


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 3)])
def test_one_rank_has_no_groups_that_only_overlap_communication(
    ranks: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = []
    monkeypatch.setattr("open_lm.parallel.parallelize.fully_shard", lambda module, **_: sharded.append(module))
    model, mesh = meta_model(), SimpleNamespace(size=lambda: ranks)
    _shard(model, [], mesh, ParallelConfig(), torch.device("cpu"))  # type: ignore[arg-type]
    assert len(sharded) == groups and sharded[-1] is model


@pytest.mark.processes
def test_initial_weights_are_independent_of_the_layout_and_never_unsharded() -> None:
    small, large = layout_worker.SMALL, layout_worker.LARGE
    # Peak memory never decreases, so the memory of the large model is measured first, after a warm-up.
    first = [(layout_worker.initialise, INITIALISED_LAYOUTS[0], shape) for shape in (small, large)]
    others = [(layout_worker.initialise, settings, small) for settings in INITIALISED_LAYOUTS]
    _, sharded, *results = on_ranks(4, [*first, *others])
    single = layout_worker.initialise({}, small)["sums"]
    for settings, result in zip(INITIALISED_LAYOUTS, results, strict=True):
        assert result["sums"].keys() == single.keys()
        for name, sums in result["sums"].items():
            assert sums == pytest.approx(single[name], rel=1e-12), (settings, name)
    full_bytes = 4 * sum(p.numel() for p in meta_model(**large).parameters())
    assert sharded["local_bytes"] < 0.26 * full_bytes
    assert sharded["growth_bytes"] < 0.75 * full_bytes  # the shards and one full tensor at a time


@pytest.mark.processes
def test_gradients_are_reduced_and_sharded_after_every_micro_batch() -> None:
    """The four groups are two blocks, embedding and head. Replicas are reduced once per step either way."""
    fsdp, hybrid = {"fsdp": True}, {"fsdp": True, "mesh_dim": "2,2,1"}
    jobs = [(layout_worker.reductions, {**mesh, **every}) for mesh in (fsdp, hybrid) for every in ({}, parity.EVERY)]
    results = [result["passes"] for result in on_ranks(4, jobs)]
    shares = [pytest.approx(share, rel=0.02) for share in (0.25, 0.5)]
    assert results == [
        [[0, 0, 0.0], [4, 0, shares[0]]],
        [[4, 0, shares[0]], [4, 0, shares[0]]],
        [[0, 0, 0.0], [4, 4, shares[1]]],
        [[4, 0, 0.0], [4, 4, shares[1]]],  # between the passes, FSDP2 keeps the shards in its own buffers
    ]


@pytest.mark.processes
def test_evaluation_returns_full_logits_for_every_kind_of_call() -> None:
    expected = layout_worker.logits({})
    # --fsdp-pure-bf16 has no effect without --fsdp, so all layouts compute in float32.
    layouts = [TENSOR_PARALLEL, {**TENSOR_PARALLEL, "fsdp": True}, {**TENSOR_PARALLEL, "fsdp_pure_bf16": True}]
    for results in on_ranks(2, [(layout_worker.logits, settings) for settings in layouts]):
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(results[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "shape"), [("op", {}), ("half-op", {}), ("op", {"moe_freq": 1, "moe_num_experts": 4})]
)
def test_equal_blocks_with_checkpointing_are_compiled_once(policy: str, shape: dict[str, int]) -> None:
    result = layout_worker.compiled({}, policy, **shape)
    assert result["graphs"] == 1 and result["graph_breaks"] == 0
    assert result["compiled"] == pytest.approx(result["eager"], rel=1e-5)


@pytest.mark.processes
def test_equal_blocks_with_tensor_parallelism_are_compiled_once() -> None:
    (result,) = on_ranks(2, [(layout_worker.compiled, TENSOR_PARALLEL, "none")])
    assert result["graphs"] == 1 and result["graph_breaks"] == 0
    assert result["compiled"] == pytest.approx(result["eager"], rel=1e-5)


# ------------------------------------------------------------------------------------------ in one process
def test_ddp_does_not_cut_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's optimizer would cut the block's graph after the first MiB of parameters."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    cfg = ParallelConfig(force_distributed=True)
    runtime = init_runtime(cfg)
    try:
        shape = {**layout_worker.SMALL, "dim": 384, "n_layers": 2}
        with torch._dynamo.config.patch(optimize_ddp=True):  # restores the value that `parallelize` sets
            model = layout_worker.new_model(runtime, cfg, shape, ModelConfig(torchcompile=True))
            assert isinstance(model, DistributedDataParallel)
            ids = torch.zeros(1, 12, dtype=torch.int64)
            model(ids, loss=TokenLoss(ids))[0].backward()
    finally:
        shutdown(runtime)
    assert backend.frame_count == 1


def meta_model(**shape: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(Params(**{"dim": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 9, "seq_len": 8, **shape}))


def test_unsupported_tensor_parallelism_is_rejected() -> None:
    check_tensor_parallel(meta_model(), 2)
    with pytest.raises(
        ConfigError, match=r"-parallel 3: .* 6 heads and 256 hidden features .* divisible over 1, 2 ranks"
    ):
        check_tensor_parallel(meta_model(), 3)
    check_tensor_parallel(meta_model(ffn_type="gelu"), 3)
    with pytest.raises(
        ConfigError, match=r"(?s)1\. .* over 1, 2, 3, 6 ranks.*2\. .* a vocabulary of 3 tokens leaves a rank"
    ):
        check_tensor_parallel(meta_model(ffn_type="gelu", vocab_size=3), 4)
    with pytest.raises(ConfigError, match="--qk-norm with RMSNorm"):
        check_tensor_parallel(meta_model(apply_qk_norm=True, norm_type=torch.nn.RMSNorm), 2)
    unknown = meta_model()
    unknown.layers[1].feed_forward = torch.nn.Bilinear(48, 48, 48, device="meta")
    with pytest.raises(ConfigError, match=r"does not support the parameter feed_forward\.weight"):
        check_tensor_parallel(unknown, 2)


def test_each_forward_pass_is_one_cuda_graph_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, mode: None)
    cfg = ModelConfig(torchcompile=True, torchcompile_mode="reduce-overhead")
    model = Transformer(Params(dim=16, n_layers=2, n_heads=2, vocab_size=9, seq_len=8)).eval()
    parallelized = parallelize(model, MeshLayout(), ParallelConfig(), device=torch.device("cpu"), model_cfg=cfg)
    counters = []
    for _ in range(2):
        with torch.no_grad():
            parallelized(torch.zeros(1, 8, dtype=torch.int64))
        counters.append(MarkStepBox.mark_step_counter)
    assert counters[0] - counters[1] == 1  # torch counts downwards


def test_buffers_of_offloaded_models_are_on_the_device() -> None:
    host, device = torch.device("cpu"), torch.device("meta")  # meta represents the GPU
    model = meta_model()
    _materialise(model, host, device, lambda sharded: init_weights(sharded, seed=1))
    assert {parameter.device for parameter in model.parameters()} == {host}
    assert {buffer.device for buffer in model.buffers()} == {device}


def test_selective_checkpointing_saves_expensive_operators() -> None:
    operators = torch.ops.aten
    expensive = (operators.mm, operators._flash_attention_forward, operators._efficient_attention_forward)
    assert all(_is_expensive(operator.default) for operator in expensive)
    assert not any(_is_expensive(operator.default) for operator in (operators.silu, operators.native_layer_norm))


def test_a_static_graph_without_ddp_is_reported() -> None:
    for layout in ({"fsdp": True}, TENSOR_PARALLEL):
        (message,) = ineffective_settings(ParallelConfig(ddp_static_graph=True, **layout), torch.device("cpu"))
        assert message.startswith("--ddp-static-graph has no effect with --")
    assert ineffective_settings(ParallelConfig(ddp_static_graph=True), torch.device("cpu")) == []
