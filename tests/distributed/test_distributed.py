"""Ranks, devices and process groups; FSDP trains like a single process."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import trainer_worker
from eval_environment import EVAL_PYTHON, needs_eval_environment

from open_lm.config.sections import ParallelConfig
from open_lm.distributed import processes as distributed
from open_lm.errors import ConfigError, DataError
from open_lm.parallel.parallelize import find_blocks

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_NAMES = {
    *distributed.LOCAL_RANK_NAMES,
    *distributed.RANK_NAMES,
    *distributed.WORLD_SIZE_NAMES,
    *distributed.LOCAL_SIZE_NAMES,
    "MASTER_ADDR",
    "MASTER_PORT",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "names",
    [
        ("LOCAL_RANK", "RANK", "WORLD_SIZE"),
        ("MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE"),
        ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_ranks_are_read_from_every_launcher(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.world_info_from_env() == (0, 0, 1)
    for name, value in zip(names, ("1", "5", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert distributed.world_info_from_env() == (1, 5, 8)


def test_the_first_launcher_found_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("RANK", "3")
    assert distributed.world_info_from_env()[1] == 3
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(ConfigError, match="RANK: found 'three'"):
        distributed.world_info_from_env()


def test_a_single_process_needs_no_group() -> None:
    args = argparse.Namespace(dist_url="env://", dist_backend="nccl")
    device = distributed.init_distributed_device(args)
    assert (args.rank, args.local_rank, args.world_size, args.distributed) == (0, 0, 1, False)
    assert torch.device(args.device) == device
    assert distributed.is_master(args) and distributed.is_master(args, local=True)
    assert distributed.broadcast_object(args, {"a": 1}) == {"a": 1}
    assert distributed.gather_objects(3) == [3]
    assert distributed.run_on_master(lambda: "done") == "done"


def test_force_distributed_starts_a_group_of_one() -> None:
    runtime = distributed.init_runtime(ParallelConfig(force_distributed=True))
    try:
        assert runtime.distributed and runtime.owns_group
        mesh = distributed.build_layout(runtime, ParallelConfig()).mesh
        assert mesh is not None and mesh.size() == 1
        assert distributed.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]

        def fail() -> None:
            raise DataError("broken")

        assert distributed.run_on_all_ranks(lambda: 3) == 3
        for run in (distributed.run_on_master, distributed.run_on_all_ranks):
            with pytest.raises(DataError, match="broken") as caught:
                run(fail)
            assert caught.value.on_every_rank
    finally:
        distributed.shutdown(runtime)


def test_errors_of_all_ranks_are_raised_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(failures: list[object], failure: object) -> None:
        failures[:] = [None, DataError("no shard a"), DataError("no shard b"), DataError("no shard a")]

    runtime = distributed.init_runtime(ParallelConfig(force_distributed=True))
    try:
        monkeypatch.setattr(dist, "all_gather_object", all_gather)
        with pytest.raises(DataError, match=r"(?s)problems \(2\):.*1\. no shard a.*2\. no shard b$") as caught:
            distributed.run_on_all_ranks(lambda: "no error on this rank")
        assert caught.value.on_every_rank
    finally:
        distributed.shutdown(runtime)


def test_more_ranks_than_devices_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 ranks on this node need one CUDA device each, but only 2 are visible"):
        distributed.init_runtime(ParallelConfig())


def test_cached_teachers_use_the_device_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm.finetune.cache_writer import teacher_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    names = [None, "cuda", "cuda:0", "cpu"]
    assert [str(teacher_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError, match=r"3 ranks on this node need one CUDA device each.*or pass --device cuda:0 if"
    ):
        teacher_device(None)


def test_contradicting_launcher_environments_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--preset-world-size 4: the launcher started 1 ranks"):
        distributed.init_runtime(ParallelConfig(preset_world_size=4))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=2 announces 2 ranks without MASTER_ADDR and MASTER_PORT"):
        distributed.init_runtime(ParallelConfig())


def test_plain_process_in_a_slurm_shell_does_not_wait_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's shell has the variables of the job, but not those of a task that srun starts."""
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "12", "SLURM_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="SLURM_NTASKS=4 announces 4 ranks"):
        distributed.init_runtime(ParallelConfig())


def test_used_master_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: another process uses this port"):
            distributed.init_runtime(ParallelConfig())
        with pytest.raises(ConfigError, match=f"--dist-url tcp://127.0.0.1:{port}: another process uses this port"):
            distributed.init_runtime(ParallelConfig(dist_url=f"tcp://127.0.0.1:{port}"))


def test_hybrid_sharding_needs_equal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = distributed.init_runtime(ParallelConfig(force_distributed=True))
    try:
        uneven = distributed.Runtime(world_size=6, local_world_size=4)
        with pytest.raises(ConfigError, match="found 6 ranks, expected a multiple of the 4 ranks of a node"):
            distributed.build_layout(uneven, ParallelConfig(fsdp=True, fsdp_hybrid=True))
    finally:
        distributed.shutdown(runtime)


def test_find_blocks_of_other_models_by_class_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.ReLU()))
    assert [type(block) for block in find_blocks(model, "ReLU")] == [torch.nn.ReLU]
    with pytest.raises(ConfigError, match="no such layer, only Linear, ReLU, Sequential"):
        find_blocks(model, "LlamaDecoderLayer")


def differences(steps: list[list[float]], expected: list[list[float]]) -> float:
    return max(
        abs(a - b) for step, other in zip(steps, expected, strict=True) for a, b in zip(step, other, strict=True)
    )


@pytest.mark.processes
def test_settings_of_fsdp_on_two_ranks(ranks: Callable[..., object], tmp_path: Path) -> None:
    """Losses and gradient norms equal those of one process within 1e-5, and approximately in half precision.

    test_layouts.py compares all layouts.
    """
    jobs: list[dict[str, object]] = [
        {"layout": "fsdp", "accum_freq": 4, "tied": True, "checkpointing": True},
        {"layout": "hybrid", "accum_freq": 2},
        {"layout": "hybrid_o2", "accum_freq": 2},
        {"layout": "amp"},
        {"layout": "pure_bf16"},
    ]
    ranks(2, "trainer_worker", "out.json", *[json.dumps(job) for job in jobs])
    results = json.loads((tmp_path / "out.json").read_text())
    expected = {tied: trainer_worker.train("plain", tied=tied) for tied in (False, True)}
    assert expected[False][0] != expected[True][0]
    for job in jobs:
        steps = results[json.dumps(job, sort_keys=True)]
        difference = differences(steps, expected[bool(job.get("tied"))])
        if job["layout"] in ("amp", "pure_bf16"):
            assert 1e-5 < difference < 0.1, job
        else:
            assert difference < 1e-5, job


@pytest.mark.processes
def test_hybrid_sharding_over_two_nodes_of_two(ranks: Callable[..., object], tmp_path: Path) -> None:
    """The variable LOCAL_WORLD_SIZE makes four ranks look like two nodes of two."""
    jobs = [{"layout": "hybrid", "accum_freq": 2}, {"layout": "hybrid_o2", "tied": True}]
    jobs_json = [json.dumps(job) for job in jobs]
    ranks(4, "trainer_worker", "out.json", *jobs_json, env={"LOCAL_WORLD_SIZE": "2"})
    results = json.loads((tmp_path / "out.json").read_text())
    for job in jobs:
        expected = trainer_worker.train("plain", tied=bool(job.get("tied")))
        assert differences(results[json.dumps(job, sort_keys=True)], expected) < 1e-5


@pytest.mark.processes
@needs_eval_environment
def test_shutdown_does_not_deadlock_with_workers_that_release_tensors() -> None:
    """Without the kept references, torch 2.7 hangs within 40 rounds."""
    program = """
import faulthandler
import torch
import torch.distributed as dist
from open_lm.distributed.processes import Runtime, shutdown
from open_lm.errors import end_process

faulthandler.dump_traceback_later(60, exit=True)
for _ in range(100):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(3):
        dist.all_reduce(torch.ones(50_000))
    shutdown(Runtime(owns_group=True))
    assert not dist.is_initialized()
end_process(0)
"""
    subprocess.run([EVAL_PYTHON, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)


def test_meshes_do_not_split_a_group_that_is_bound_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def init_bound_group(*_: object) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)  # type: ignore[union-attr]

    monkeypatch.setattr(distributed, "_init_process_group", init_bound_group)
    runtime = distributed.init_runtime(ParallelConfig(force_distributed=True))
    try:
        assert dist.group.WORLD.bound_device_id is None  # type: ignore[union-attr]
    finally:
        distributed.shutdown(runtime)


def test_nccl_gets_the_device_and_the_allocator_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: started.append(options))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    device = torch.device("cuda", 0)
    for backend in ("nccl", "gloo"):
        distributed._init_process_group(ParallelConfig(dist_backend=backend), device, 0, 1)
    assert started[0]["device_id"] == device and "device_id" not in started[1]

    for name in distributed.ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    distributed._prefer_expandable_segments()  # the user's setting stays the only one
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    for version, name in (("2.10.0+cu128", "PYTORCH_CUDA_ALLOC_CONF"), ("2.11.0+cu130", "PYTORCH_ALLOC_CONF")):
        monkeypatch.setattr(torch, "__version__", version)
        distributed._prefer_expandable_segments()
        chosen = {key: os.environ.pop(key) for key in distributed.ALLOCATOR_NAMES if key in os.environ}
        assert chosen == {name: "expandable_segments:True"}
