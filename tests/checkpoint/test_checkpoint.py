"""Test interchange files: those of the original OpenLM, round trips with one and two processes, and bad files."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import build, save, shard, train
from rank_processes import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from open_lm.checkpoint import (
    Progress,
    load_average,
    load_averagers,
    load_model,
    load_optimizer,
    load_rng,
    load_weights,
    read_model_state,
)
from open_lm.checkpoint.files import clean_name, companion_path, read_file, read_meta, write_file
from open_lm.distributed.processes import gather_objects
from open_lm.distributed.rng import rng_state
from open_lm.errors import BrokenCheckpoint, CheckpointError
from open_lm.optim.averaging import ModelAverager

METRICS = [{"loss": np.float64(2.5), "tokens": np.int64(7), "val_data": ["a.tar"]}]


def resume_args(path: str | Path | None, seed: int = 3) -> argparse.Namespace:
    return argparse.Namespace(resume=str(path), seed=seed)


# ---------------------------------------------------------------------------------------------- original OpenLM
@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    return shared_dir / "compat" / "run" / "logs" / "upstream" / "checkpoints"


def test_golden_weights_load_with_their_progress(golden: Path) -> None:
    state, meta = read_model_state(golden / "epoch_2.pt")
    assert len(state) == 21 and state["tok_embeddings.weight"].shape == (256, 64)
    progress = Progress.from_meta(meta)
    assert (progress.epoch, progress.step, progress.samples_seen, progress.seed) == (2, 128, 1024, 3)
    assert progress.next_shard_per_source == [4]
    assert progress.evaluation_metrics[1]["loss"] == pytest.approx(2.3855272829532623)
    assert read_file(golden / "stats_2.pt")["is_final_checkpoint"] is True


class Named(nn.Module):
    """A model with the given parameter names in another order: numbered states must follow the order of the file."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name in sorted(state, reverse=True):
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if leaf == "inv_freq":
                module.register_buffer(leaf, state[name].clone())
            else:
                module.register_parameter(leaf, nn.Parameter(torch.zeros_like(state[name])))


def test_golden_optimizer_keyed_by_number_is_matched_to_parameters(golden: Path) -> None:
    state, _ = read_model_state(golden / "epoch_1.pt")
    model = Named(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    args = resume_args(golden / "epoch_1.pt")
    assert load_model(args, model) == (1, 64, 3)
    assert load_optimizer(args, model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name

    saved = read_file(golden / "optimizer_1.pt")["optimizer"]["state"]
    in_file_order = [name for name in state if not name.endswith("inv_freq")]
    params = dict(model.named_parameters())
    assert len(optimizer.state) == len(in_file_order) == 19
    for number, name in enumerate(in_file_order):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[params[name]][key], saved[number][key]), (name, key)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}, "this run's flags apply"
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}


def test_another_seed_is_an_error_unless_allowed(golden: Path) -> None:
    model = Named(read_model_state(golden / "epoch_1.pt")[0])
    with pytest.raises(CheckpointError, match="--seed 3"):
        load_model(resume_args(golden / "epoch_1.pt", seed=4), model)
    assert load_model(resume_args(golden / "epoch_1.pt", seed=4), model, different_seed=True) == (1, 64, None)


# ---------------------------------------------------------------------------------------------- one process
def test_a_resumed_run_matches_an_uninterrupted_one(tmp_path: Path) -> None:
    model, optimizer = build(0)
    averagers = ModelAverager(model, "poly_8_1")
    train(model, optimizer, range(3))
    averagers.step()
    progress = Progress(
        epoch=1, step=3, samples_seen=12, seed=3, evaluation_metrics=METRICS, data_state={"position": [12]}
    )
    path = save(tmp_path / "logs", progress, model, optimizer=optimizer, averagers=averagers)
    assert path == str(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    expected = train(model, optimizer, range(3, 6))
    averagers.step()

    other, other_optimizer = build(99)
    other_averagers = ModelAverager(other, "poly_8_1")
    loaded = load_weights(path, other)
    assert (loaded.epoch, loaded.step, loaded.samples_seen, loaded.seed) == (1, 3, 12, 3)
    assert loaded.data_state == {"position": [12]}
    assert loaded.evaluation_metrics == [{"loss": 2.5, "tokens": 7, "val_data": ["a.tar"]}]
    assert load_optimizer(resume_args(path), other, other_optimizer)
    load_averagers(path, other_averagers)
    assert train(other, other_optimizer, range(3, 6)) == expected
    other_averagers.step()
    for name, value in averagers.avgs_dict["poly_8_1"].state_dict()["av_model_sd"].items():
        assert torch.equal(value, other_averagers.avgs_dict["poly_8_1"].state_dict()["av_model_sd"][name]), name


def test_files_have_the_documented_keys_and_load_with_torch_defaults(tmp_path: Path) -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(1))
    scaler = torch.amp.GradScaler("cpu")
    progress = Progress(
        epoch=2, step=1, samples_seen=4, seed=3, evaluation_metrics=METRICS, is_final=True,
        percentage_of_data_seen=1.0, next_shard_per_source=[4], train_data_string=["x/{1,2}.tar"],
    )  # fmt: skip
    save(
        tmp_path / "logs",
        progress,
        model,
        optimizer=optimizer,
        scaler=scaler,
        averagers=ModelAverager(model, "ema_0.9_2"),
    )
    folder = tmp_path / "logs" / "run" / "checkpoints"
    shared = {"next_shard_per_source", "samples_seen", "step", "shard_shuffle_seed"}
    keys = {
        "epoch_2.pt": {"epoch", "name", "state_dict", "evaluation_metrics"} | shared,
        "optimizer_2.pt": {"epoch", "name", "optimizer", "evaluation_metrics", "scaler", "rng"},
        "stats_2.pt": {"epoch", "name", "is_final_checkpoint", "evaluation_metrics", "percentage_of_data_seen"}
        | {"train_data_string"} | shared,
        "ema_0.9_2_2.pt": {"update_counter", "step_counter", "freq", "av_model_sd", "method", "eta", "gamma",
                           "suffix_steps", "power", "start"},
    }  # fmt: skip
    assert sorted(os.listdir(folder)) == sorted(keys)
    for name, expected in keys.items():
        assert set(torch.load(folder / name, weights_only=True)) == expected, name
    weights = torch.load(folder / "epoch_2.pt", weights_only=True)["state_dict"]
    assert list(weights) == list(model.state_dict())
    assert weights["embed.weight"].data_ptr() == weights["output.weight"].data_ptr(), "tied weights are stored once"
    assert read_model_state(folder / "ema_0.9_2_2.pt")[0].keys() == weights.keys()


def test_random_generators_continue(tmp_path: Path) -> None:
    model, optimizer = build(0)
    path = save(tmp_path / "logs", Progress(epoch=1, step=0), model, optimizer=optimizer)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), torch.randn(1).item()

    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert load_rng(path)
    assert [draw() for _ in range(3)] == expected


def test_average_of_checkpoints(tmp_path: Path) -> None:
    models = [build(seed)[0] for seed in (1, 2)]
    paths = [save(tmp_path, Progress(epoch=n), model) for n, model in enumerate(models, start=1)]
    target = build(5)[0]
    load_average([str(path) for path in paths], [0.25, 0.75], target)
    expected = 0.25 * models[0].embed.weight + 0.75 * models[1].embed.weight
    torch.testing.assert_close(target.embed.weight, expected)
    load_average([str(path) for path in paths], None, target)
    torch.testing.assert_close(target.embed.weight, (models[0].embed.weight + models[1].embed.weight) / 2)
    with pytest.raises(CheckpointError, match="found 1 coefficients, but --average has 2 checkpoints"):
        load_average([str(path) for path in paths], [1.0], target)
    with pytest.raises(CheckpointError, match="two or more"):
        load_average([str(paths[0])], None, target)


# ---------------------------------------------------------------------------------------------- other formats
def test_files_of_weights_only_and_prefixed_names(tmp_path: Path) -> None:
    source, target = build(1)[0], build(2)[0]
    bare = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    write_file(str(tmp_path / "bare.pt"), bare)
    assert load_model(resume_args(tmp_path / "bare.pt"), target) == (0, 0, None)
    assert torch.equal(target.layers[1].in_proj.weight, source.layers[1].in_proj.weight)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_wrapper_names_such_as_fsdp_wrapped_module_are_stripped_from_checkpoints(tmp_path: Path, wrapper: str) -> None:
    source, target = build(1)[0], build(2)[0]
    weights = {f"{wrapper}.{wrapper}.{n.replace('.', f'.{wrapper}.', 1)}": v for n, v in source.state_dict().items()}
    write_file(str(tmp_path / "epoch_1.pt"), {"epoch": 1, "state_dict": weights})
    load_weights(str(tmp_path / "epoch_1.pt"), target)
    assert torch.equal(target.layers[1].in_proj.weight, source.layers[1].in_proj.weight)
    assert clean_name(f"layers.0.{wrapper}.w") == "layers.0.w"


def test_computed_frequencies_and_tied_names_may_be_missing(tmp_path: Path) -> None:
    source, target = build(1)[0], build(2)[0]
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("inv_freq") and k != "output.weight"}
    write_file(str(tmp_path / "epoch_1.pt"), {"epoch": 1, "state_dict": state})
    progress = load_weights(str(tmp_path / "epoch_1.pt"), target)
    assert (progress.epoch, progress.step) == (1, None)
    assert torch.equal(target.output.weight, source.embed.weight)
    assert torch.equal(target.layers[0].inv_freq, torch.arange(3.0))


def test_old_expert_biases_are_dropped_but_unexpected_frequencies_are_an_error(tmp_path: Path) -> None:
    source, target = build(1)[0], build(2)[0]
    state = {**source.state_dict(), "layers.0.feed_forward.experts.bias": torch.zeros(3)}
    write_file(str(tmp_path / "epoch_1.pt"), {"epoch": 1, "state_dict": state})
    load_weights(str(tmp_path / "epoch_1.pt"), target)
    del target.layers[0].inv_freq
    with pytest.raises(CheckpointError, match=r"not in the model \(1\): layers\.0\.inv_freq"):
        load_weights(str(tmp_path / "epoch_1.pt"), target)


def test_compiled_models_load(tmp_path: Path) -> None:
    source = build(1)[0]
    path = save(tmp_path / "logs", Progress(epoch=1), source)
    compiled = torch.compile(build(2)[0], backend="eager")
    load_weights(str(path), compiled)
    assert torch.equal(compiled.embed.weight, source.embed.weight)


def test_weights_of_lower_precision_models_are_converted(tmp_path: Path) -> None:
    source = build(1)[0]
    path = save(tmp_path / "logs", Progress(epoch=1), source)
    target = build(2)[0].to(torch.bfloat16)
    load_weights(str(path), target)
    assert target.embed.weight.dtype == torch.bfloat16
    assert torch.equal(target.embed.weight, source.embed.weight.to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------- bad input
def test_all_mismatches_are_reported_together(tmp_path: Path) -> None:
    state = build(1, tied=False)[0].state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["embed.weight"] = torch.zeros(8, 6)
    del state["layers.0.in_proj.weight"]
    write_file(str(tmp_path / "epoch_1.pt"), {"epoch": 1, "state_dict": state})
    target = build(2, tied=False)[0]
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(str(tmp_path / "epoch_1.pt"), target)
    message = str(error.value)
    expected = (
        "epoch_1.pt",
        "layers.0.in_proj.weight",
        "extra.weight",
        "embed.weight: found (8, 6), the model has (7, 6)",
    )
    for part in expected:
        assert part in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items()), "nothing is loaded"


class Danger:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch danger",)


def test_broken_unsafe_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1, "state_dict": {}, "x": Danger()}, "danger.pt")
    with pytest.raises(CheckpointError, match=r"only tensors and plain values, found .*system"):
        read_file("danger.pt")
    assert not Path("danger").exists()

    write_file("complete.pt", {"epoch": 1, "state_dict": {"w": torch.zeros(1000)}})
    Path("truncated.pt").write_bytes(Path("complete.pt").read_bytes()[:-100])
    Path("text.pt").write_text("hello")
    Path("empty.pt").touch()
    with pytest.raises(BrokenCheckpoint, match=r"truncated\.pt: the file is broken or not a checkpoint"):
        read_file("truncated.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_file("epoch_7.pt")
    write_file("stats.pt", {"epoch": 1})
    with pytest.raises(CheckpointError, match="contains no weights, only epoch"):
        read_model_state("stats.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"# OpenLM\n\nTrain", "one that starts with b'# OpenLM"),
        (b"version https://git-lfs.github.com/spec/v1", "one that starts with b'version https://git-lfs"),
        (b"{}", "one that starts with b'{}'"),
        (bytes(100), "one that starts with"),
        (b"", "an empty file"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_named_so(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content)
    for read in (read_file, read_meta):
        with pytest.raises(BrokenCheckpoint) as caught:
            read(str(path))
        assert f"{path}: not a checkpoint; expected a file of torch.save such as epoch_N.pt, found {found}" in str(
            caught.value
        )


def test_the_optimizer_of_another_model_is_an_error(tmp_path: Path) -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(1))
    path = save(tmp_path / "logs", Progress(epoch=1), model, optimizer=optimizer)
    content = read_file(companion_path(str(path), "optimizer"))
    content["optimizer"]["state"]["layers.0.in_proj.weight"]["exp_avg"] = torch.zeros(3, 3)
    write_file(companion_path(str(path), "optimizer"), content)
    with pytest.raises(CheckpointError, match=r"layers\.0\.in_proj\.weight\.exp_avg"):
        load_optimizer(resume_args(path), model, optimizer)


# ---------------------------------------------------------------------------------------------- several processes
def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def same_as_gathered(
    rank: int, path: str, model: nn.Module, optimizer: torch.optim.Optimizer, averagers: ModelAverager
) -> None:
    """Check that the files contain the gathered state of both ranks, bit for bit."""
    weights = {name: full(value) for name, value in model.state_dict().items()}
    params = dict(model.named_parameters())
    moments = {(name, key): full(v) for name, param in params.items() for key, v in optimizer.state[param].items()}
    averages = averagers.avgs_dict["ema_0.5_1"].state_dict()
    generators = gather_objects(rng_state())
    if rank == 0:
        content = read_file(companion_path(path, "optimizer"))
        stored = content["optimizer"]["state"]
        assert sorted(stored) == sorted({name for name, _ in moments})
        assert all(torch.equal(value, weights[name]) for name, value in read_file(path)["state_dict"].items())
        assert all(torch.equal(stored[name][key], value) for (name, key), value in moments.items())
        averager = read_file(companion_path(path, "ema_0.5_1"))
        assert all(torch.equal(value, averages["av_model_sd"][name]) for name, value in averager["av_model_sd"].items())
        assert [state["python"] for state in content["rng"]] == [state["python"] for state in generators]
        assert all(torch.equal(a["torch"], b["torch"]) for a, b in zip(content["rng"], generators, strict=True))


def save_sharded(rank: int, folder: Path) -> None:
    model, _ = build(0)
    optimizer = shard(model)
    averagers = ModelAverager(model, "ema_0.5_1")
    train(model, optimizer, range(3))
    averagers.step()
    torch.manual_seed(100 + rank)
    path = save(folder / "logs", Progress(epoch=1, step=3, seed=3), model, optimizer=optimizer, averagers=averagers)
    same_as_gathered(rank, path, model, optimizer, averagers)
    draw, losses = torch.randn(1).item(), train(model, optimizer, range(3, 6))
    torch.manual_seed(0)
    assert load_rng(path) and torch.randn(1).item() == draw, "each rank's generator continues"
    if rank == 0:
        torch.save(losses, folder / "losses.pt")


def load_sharded(rank: int, folder: Path) -> None:
    path = str(folder / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    model, _ = build(50 + rank)
    optimizer = shard(model)
    averagers = ModelAverager(model, "ema_0.5_1")
    args = resume_args(path)
    assert load_model(args, model) == (1, 3, 3)
    assert load_optimizer(args, model, optimizer)
    load_averagers(path, averagers)
    saved = read_file(companion_path(path, "ema_0.5_1"))["av_model_sd"]
    loaded = averagers.avgs_dict["ema_0.5_1"].state_dict()["av_model_sd"]
    if rank == 0:
        assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    torch.testing.assert_close(train(model, optimizer, range(3, 6)), torch.load(folder / "losses.pt"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(resume_args(folder / "epoch_77.pt"), model)  # raises on every rank without a deadlock


def load_replicated(rank: int, folder: Path) -> None:
    path = str(folder / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    model, optimizer = build(70 + rank)
    replica = DistributedDataParallel(model)
    load_weights(path, replica)
    load_optimizer(resume_args(path), replica, optimizer)
    averagers = ModelAverager(model, "ema_0.5_1")
    load_averagers(path, averagers)
    saved = read_file(companion_path(path, "ema_0.5_1"))["av_model_sd"]["embed.weight"]
    with averagers.avgs_dict["ema_0.5_1"].applied() as averaged:
        assert torch.equal(averaged.embed.weight, saved)
    torch.testing.assert_close(train(replica, optimizer, range(3, 6)), torch.load(folder / "losses.pt"))
    save(folder / "replicated", Progress(epoch=1), replica, optimizer=optimizer)


def sharded_and_back(rank: int, folder: Path) -> None:
    for part in (save_sharded, load_sharded, load_replicated):
        part(rank, folder)
        dist.barrier()


@pytest.mark.processes
def test_sharded_checkpoint_loads_sharded_replicated_and_in_one_process(tmp_path: Path) -> None:
    on_ranks(sharded_and_back, tmp_path)

    model, optimizer = build(9)
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    assert load_model(resume_args(path), model) == (1, 3, 3)
    assert load_optimizer(resume_args(path), model, optimizer)
    assert not load_rng(str(path)), "the generators of two ranks cannot be restored in one process"
    torch.testing.assert_close(train(model, optimizer, range(3, 6)), torch.load(tmp_path / "losses.pt"))

    single, single_optimizer = build(0)
    train(single, single_optimizer, range(3))
    for name, value in read_file(path)["state_dict"].items():
        torch.testing.assert_close(value, single.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert os.path.getsize(path) < 12_000, "the padding of shards is not written"
    replicated = tmp_path / "replicated" / "run" / "checkpoints" / "epoch_1.pt"
    assert list(read_file(replicated)["state_dict"]) == list(model.state_dict())
