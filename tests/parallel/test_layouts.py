"""Every layout of ranks starts, trains, evaluates and compiles alike."""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import layout_worker
import pytest
import torch
from torch._inductor.cudagraph_trees import MarkStepBox
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import ModelConfig, ParallelConfig
from open_lm.errors import ConfigError
from open_lm.model.initialization import init_weights
from open_lm.model.recomputation import _is_expensive
from open_lm.model.transformer import Params, Transformer
from open_lm.parallel.parallelize import _materialise, _shard, notes, parallelize
from open_lm.parallel.tensor_parallel import check_tensor_parallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import parity
from parity import on_ranks

TENSOR = {"tensor_parallel": 2}
START = [
    {"fsdp": True, "tensor_parallel": 2},
    {"fsdp": True},
    {"tensor_parallel": 4},
    {"fsdp": True, "mesh_dim": "2,1,2"},
    {"fsdp": True, "context_parallel": 2},
]


def test_options_meet_under_each_kind_of_layout() -> None:
    chosen = parity.cases(2)
    assert {case["layout"] for case in chosen} == set(parity.LAYOUTS)
    met = parity.meetings([{**case, "size": "even" if case["size"] == "even" else "odd"} for case in chosen])
    of_two = [name for name, values in parity.OPTIONS.items() if len(values) == 2]
    for kind in ("tensor", "context", "fsdp"):
        for one, other in combinations(of_two, 2):
            for values in product(parity.OPTIONS[one], parity.OPTIONS[other]):
                assert (kind, one, values[0], other, values[1]) in met
    assert ("context_tensor", "masked", True, "z_loss", 1e-3) in met


def test_every_layout_trains_as_a_single_process_does() -> None:
    """As `scripts/parity.py` says of 20 steps and wider models; here of 3, and of 8 ranks with one set of options."""
    every = enumerate(parity.cases(2))
    chosen = [case for number, case in every if number % 2 or parity.LAYOUTS[case["layout"]][0] < 8]
    chosen = [{**case, "size": "odd"} if case["size"] == "87m" else case for case in chosen]
    differences = parity.run(chosen, steps=3)
    wrong = [(found, case) for found, case in zip(differences, chosen, strict=True) if not found < 1e-5]
    assert not wrong


def test_what_is_compared_as_offloaded_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though --fsdp-cpu-offload else does nothing on a CPU."""
    policies = []
    monkeypatch.setattr("open_lm.parallel.parallelize.fully_shard", lambda module, **options: policies.append(options))
    cfg, cpu = ParallelConfig(**parity.LAYOUTS["offload"][1]), torch.device("cpu")
    with parity.offloading_from_cpu():
        _shard(meta_model(), [], None, cfg, cpu)  # type: ignore[arg-type]
    _shard(meta_model(), [], None, cfg, cpu)  # type: ignore[arg-type]
    assert [type(options["offload_policy"]) for options in policies] == [CPUOffloadPolicy, OffloadPolicy]


def test_a_model_starts_alike_on_any_ranks_and_whole_on_none() -> None:
    small, large = layout_worker.SMALL, layout_worker.LARGE
    first = [(layout_worker.start, START[0], shape) for shape in (small, large)]  # memory is a high-water mark
    _, spread_out, *results = on_ranks(4, [*first, *[(layout_worker.start, settings, small) for settings in START]])
    alone = layout_worker.start({}, small)["sums"]
    for settings, result in zip(START, results, strict=True):
        assert result["sums"].keys() == alone.keys()
        for name, sums in result["sums"].items():
            assert sums == pytest.approx(alone[name], rel=1e-12), (settings, name)
    whole_bytes = 4 * sum(p.numel() for p in meta_model(**large).parameters())
    assert spread_out["held_bytes"] < 0.26 * whole_bytes
    assert spread_out["growth_bytes"] < 0.75 * whole_bytes  # and one tensor at a time


def test_evaluation_sees_whole_logits_however_the_model_is_called() -> None:
    expected = layout_worker.logits({})
    # Flags of --fsdp say nothing without it: of half precision there is none here.
    layouts = [TENSOR, {**TENSOR, "fsdp": True}, {**TENSOR, "fsdp_pure_bf16": True}]
    for found in on_ranks(2, [(layout_worker.logits, settings) for settings in layouts]):
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_equal_blocks_are_compiled_once_with_what_they_recompute() -> None:
    result = layout_worker.compiled({}, "op")
    assert result["graphs"] == 1 and result["graph_breaks"] == 0
    assert result["numbers"][1] == pytest.approx(result["numbers"][0], rel=1e-5)


def test_equal_blocks_are_compiled_once_on_ranks_that_split_them() -> None:
    (result,) = on_ranks(2, [(layout_worker.compiled, TENSOR, "none")])
    assert result["graphs"] == 1 and result["graph_breaks"] == 0
    assert result["numbers"][1] == pytest.approx(result["numbers"][0], rel=1e-5)


# ------------------------------------------------------------------------------------------ what cannot be
def meta_model(**shape: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(Params(**{"dim": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 9, "seq_len": 8, **shape}))


def test_splits_that_do_not_fit_are_explained() -> None:
    check_tensor_parallel(meta_model(), 2)
    with pytest.raises(ConfigError, match=r"-parallel 3: .* 6 heads and 256 hidden features .* divide over 1, 2 ranks"):
        check_tensor_parallel(meta_model(), 3)
    check_tensor_parallel(meta_model(ffn_type="gelu"), 3)
    with pytest.raises(ConfigError, match=r"(?s)1\. .* over 1, 2, 3, 6 ranks.*2\. .* a vocabulary of 3 leaves a rank"):
        check_tensor_parallel(meta_model(ffn_type="gelu", vocab_size=3), 4)
    with pytest.raises(ConfigError, match="--qk-norm by RMSNorm"):
        check_tensor_parallel(meta_model(apply_qk_norm=True, norm_type=torch.nn.RMSNorm), 2)
    unknown = meta_model()
    unknown.layers[1].feed_forward = torch.nn.Bilinear(48, 48, 48, device="meta")
    with pytest.raises(ConfigError, match=r"not known how feed_forward\.weight is to be split"):
        check_tensor_parallel(unknown, 2)


def test_graphs_of_a_forward_pass_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, mode: None)
    cfg = ModelConfig(torchcompile=True, torchcompile_mode="reduce-overhead")
    model = Transformer(Params(dim=16, n_layers=2, n_heads=2, vocab_size=9, seq_len=8)).eval()
    passes = parallelize(model, MeshLayout(), ParallelConfig(), device=torch.device("cpu"), model_cfg=cfg)
    begun = []
    for _ in range(2):
        with torch.no_grad():
            passes(torch.zeros(1, 8, dtype=torch.int64))
        begun.append(MarkStepBox.mark_step_counter)
    assert begun[0] - begun[1] == 1  # it counts downwards


def test_buffers_of_offloaded_models_are_on_the_device() -> None:
    host, device = torch.device("cpu"), torch.device("meta")  # in the place of a GPU
    model = meta_model()
    _materialise(model, host, device, lambda made: init_weights(made, seed=1))
    assert {parameter.device for parameter in model.parameters()} == {host}
    assert {buffer.device for buffer in model.buffers()} == {device}


def test_what_is_dear_is_kept_by_op() -> None:
    operators = torch.ops.aten
    dear = (operators.mm, operators._flash_attention_forward, operators._efficient_attention_forward)
    assert all(_is_expensive(each.default) for each in dear)
    assert not any(_is_expensive(each.default) for each in (operators.silu, operators.native_layer_norm))


def test_a_static_graph_of_what_is_no_copy_is_told() -> None:
    for layout in ({"fsdp": True}, TENSOR):
        (note,) = notes(ParallelConfig(ddp_static_graph=True, **layout), torch.device("cpu"))
        assert note.startswith("--ddp-static-graph has no effect with --")
    assert notes(ParallelConfig(ddp_static_graph=True), torch.device("cpu")) == []
