"""Records of a run about itself: environment.json and energy."""

from __future__ import annotations

import getpass
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from open_lm.config.devices import tdp_watts
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError
from open_lm.monitor import energy, environment
from open_lm.monitor.energy import CPU_CORE_WATTS, CpuEstimate, open_meter
from open_lm.monitor.environment import EnvironmentFile, code_state, describe
from open_lm.monitor.run_folder import RunPaths
from open_lm.report.run_records import RunRecords

HOMES = "/" + "home"  # the parent of home folders
DATA = {
    "sources": [
        {"name": f"{HOMES}/me/raw", "fingerprint": "ab12", "weight": "1", "num_sequences": 7, "shards": []},
    ]
}


def records(tmp_path: Path, kind: str = "device", step: int = 0) -> RunRecords:
    paths = RunPaths(str(tmp_path), "run")
    paths.prepare(None)
    return RunRecords(paths, Runtime(), SimpleNamespace(energy=kind, report="none"), step=step, data=DATA)


def starts(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "run/environment.json").read_text())["starts"]


# ---------------------------------------------------------------------------------------------- environment.json
def test_each_start_adds_a_record_and_energy_continues(tmp_path: Path) -> None:
    first = records(tmp_path)
    first.progress = lambda: {"step": 3, "tokens": 300, "flops": 1e9}
    sum(i * i for i in range(300_000))  # some CPU time
    measured = first.rank_times.exchange_energy()["energy/kwh"]
    first.update()
    assert starts(tmp_path)[0]["progress"]["tokens"] == 300, "written before the run ends"
    first.finish()
    second = records(tmp_path, step=3)
    before, after = starts(tmp_path)
    assert (before["step"], after["step"]) == (0, 3) and "progress" not in after
    assert before["progress"]["energy_is_estimate"] and "W per core" in before["progress"]["energy_method"]
    assert 0 < measured * 3.6e6 <= before["progress"]["energy_joules"] + 0.001
    total = second.rank_times.exchange_energy()["energy/kwh"] * 3.6e6
    assert total > before["progress"]["energy_joules"]


def test_a_record_describes_devices_packages_code_and_data_without_names_and_paths(tmp_path: Path) -> None:
    records(tmp_path).finish()
    text = (tmp_path / "run/environment.json").read_text()
    (record,) = starts(tmp_path)
    assert record["devices"] == [{"name": "cpu", "memory_bytes": None, "ranks": 1}] and record["world_size"] == 1
    assert record["packages"]["torch"] == torch.__version__ and record["cpu"]["model"]
    assert re.fullmatch(r"[0-9a-f]{64}", record["code"]["fingerprint"])
    assert record["data"]["sources"] == [{"fingerprint": "ab12", "weight": "1", "num_sequences": 7}]
    private = [str(Path.home()), f"{HOMES}/me", str(tmp_path), socket.gethostname()]
    private += [getpass.getuser()] if getpass.getuser() != "root" else []
    assert not [name for name in private if len(name) > 1 and name in text]


def test_the_code_of_a_checkout_has_commit_and_modifications(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "a.py").write_text("a = 1\n")
    assert environment._git_state(tmp_path) == {}
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert environment._git_state(tmp_path) == {"commit": commit, "modified": False}
    (tmp_path / "a.py").write_text("a = 2\n")
    state = environment._git_state(tmp_path)
    assert (state["commit"], state["modified"], len(state["diff_sha256"])) == (commit, True, 64)
    before = environment._source_fingerprint(tmp_path)
    (tmp_path / "a.py").write_text("a = 3\n")
    assert environment._source_fingerprint(tmp_path) != before
    assert code_state() is code_state(), "read once per process"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "starts": []}', '{"format": 1, "starts": [1]}'])
def test_a_damaged_file_is_replaced_with_a_warning(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "environment.json"
    path.write_text(content)
    EnvironmentFile(str(path), describe(Runtime(), 0)).update({"step": 1})
    assert len(json.loads(path.read_text())["starts"]) == 1
    assert "cannot read the earlier starts of the run" in caplog.text


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "environment.json").mkdir()
    EnvironmentFile(str(tmp_path / "environment.json"), {}).update({"step": 1})
    assert "cannot record the start and its progress" in caplog.text


# ---------------------------------------------------------------------------------------------- energy
def test_a_cpu_is_estimated_from_its_busy_time() -> None:
    meter = open_meter("device", Runtime())
    assert isinstance(meter, CpuEstimate) and meter.is_estimate
    start = CpuEstimate._seconds()
    sum(i * i for i in range(500_000))
    used = CpuEstimate._seconds() - start
    assert meter.joules() == pytest.approx(used * CPU_CORE_WATTS, rel=0.5) and used > 0
    assert open_meter("none", Runtime()) is None


def test_nominal_powers_are_found_by_words() -> None:
    assert tdp_watts("NVIDIA H100 80GB HBM3") == 700 and tdp_watts("NVIDIA H100 PCIe") == 350
    assert tdp_watts("NVIDIA A100-SXM4-80GB") == 400 and tdp_watts("NVIDIA RTX A4000") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_counter_of_a_device_rises() -> None:
    device: Any = torch.device("cuda", 0)
    meter = open_meter("device", Runtime(device=device))
    assert isinstance(meter, energy.NvmlCounter) and not meter.is_estimate
    matrix = torch.ones(8192, 8192, device=device)
    for _ in range(50):
        matrix = (matrix @ matrix).clamp(max=1)
    torch.cuda.synchronize()
    assert 0 < meter.joules() < 1e5


def test_a_machine_without_a_driver_has_no_counter() -> None:
    with pytest.raises(OSError):
        energy.NvmlCounter("GPU-0", "libnvidia-ml-missing.so")


@pytest.mark.processes  # codecarbon asks programs for the processor
def test_codecarbon_measures_the_machine_without_network_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("codecarbon")

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    meter = open_meter("codecarbon", Runtime())
    assert meter is not None and meter.method.startswith("codecarbon ")
    sum(i * i for i in range(300_000))
    meter.close()
    assert 0 < meter.joules() < 1e5, "Ws of a few seconds"
    other = open_meter("codecarbon", Runtime(1, 1, 2, 2))
    assert other is not None and other.joules() == 0, "one rank of each machine measures"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_codecarbon_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ConfigError, match=r"--energy codecarbon: the package codecarbon.*open_lm\[report\]"):
        open_meter("codecarbon", Runtime())
