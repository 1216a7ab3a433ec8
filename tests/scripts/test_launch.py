"""Test scripts/launch.py with real runs on several nodes; machines are network namespaces with their own addresses."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from open_lm.cli.launch import Host, launch, parse_host, read_hosts
from open_lm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "scripts/launch.py")]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
GRACE_S = 20


# --- hosts and commands ---------------------------------------------------------------------------------------------
def test_hosts_file_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(
        "# ours\nnode1 slots=8\n\nme@node2:2222  # slow\nnode3 slots=4 address=10.0.0.3\n[fe80::1]:22\nfe80::2\n"
    )
    assert read_hosts(path) == [
        Host("node1", "node1", None, "8"),
        Host("me@node2", "node2", 2222),
        Host("node3", "10.0.0.3", None, "4"),
        Host("fe80::1", "fe80::1", 22),
        Host("fe80::2", "fe80::2"),
    ]


def test_all_problems_of_a_hosts_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    lines = ["a slots=0", "b slots=many", "c", "me@c", "d:99999", "e gpus=8", "-oProxyCommand=x", "f slots=8"]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        read_hosts(path)
    message = str(caught.value)
    assert all(f"line {number}: " in message for number in (1, 2, 4, 5, 6, 7)) and "line 8" not in message
    assert "slots=many" in message and "c is listed twice" in message and "'99999'" in message and "'gpus=8'" in message


@pytest.mark.parametrize("content", [None, "", "# node1\n"])
def test_a_hosts_file_without_hosts_is_rejected(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "hosts.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"hosts\.txt: .*expected"):
        read_hosts(path)


def test_all_invalid_options_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'trian' is neither a command of open-lm nor a file; did you mean train"):
        launch(["trian", "--model", "open_lm_1b"])
    with pytest.raises(ConfigError, match=r"(?s)nothing to run.*--nproc-per-node.*--nodes.*--grace.*--ssh"):
        launch(["--nproc-per-node", "x", "--nodes", "0", "--grace", "0", "--ssh", "rsh"])
    (tmp_path / "hosts.txt").write_text("localhost\nnode2\n")
    with pytest.raises(ConfigError, match="cannot reach localhost"):
        launch(["--hosts", str(tmp_path / "hosts.txt"), "-m", "x"])
    with pytest.raises(ConfigError, match=r"--nodes 3: found only 2 hosts in .*hosts\.txt"):
        launch(["--hosts", str(tmp_path / "hosts.txt"), "--nodes", "3", "-m", "x"])


def test_a_dry_run_prints_commands_without_variable_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    (tmp_path / "hosts.txt").write_text("me@node1:22 slots=8\nnode2\n")
    options = ["--hosts", str(tmp_path / "hosts.txt"), "--nproc-per-node", "4", "--python", "/my env/python"]
    assert launch([*options, "--dry-run", "-m", "open_lm.main", "--name", "a b;c"]) == 0
    first, run, variables, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("me@node1:22: ssh -o BatchMode=yes") and " -p 22 me@node1 " in first
    assert " node2 " in second and "-p" not in second.split()
    # Quoted once for the local shell and once for the remote shell.
    assert first.endswith(f"""''"'"'/my env/python'"'"'' {ROOT}/open_lm/cli/launch_node.py""")
    assert "--nnodes 2 --node-rank 0 --nproc-per-node 8" in run and run.endswith("-m open_lm.main --name 'a b;c'")
    assert "AWS_SECRET_ACCESS_KEY, " in variables and "NCCL_SOCKET_IFNAME" in variables
    assert "hidden" not in first + run + variables and "eth7" not in variables


def test_the_host_replaces_its_placeholder_in_another_remote_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts.txt").write_text("pod-0\n")
    launch(["--hosts", str(tmp_path / "hosts.txt"), "--ssh", "kubectl exec -i {host} --", "--dry-run", "x.py"])
    assert capsys.readouterr().out.startswith(f"pod-0: kubectl exec -i pod-0 -- {sys.executable} {ROOT}")


def test_parse_host_rejects_a_host_that_ssh_would_parse_as_an_option() -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_host(["me@-oProxyCommand=x"])


# --- nodes on this machine ------------------------------------------------------------------------------------------
@pytest.mark.processes
def test_all_unreachable_hosts_are_reported(tmp_path: Path) -> None:
    shell = program(tmp_path / "shell", 'echo "shell: no route to $1" >&2; exit 255')
    (tmp_path / "hosts.txt").write_text("node1\nnode2\n")
    options = ["--hosts", str(tmp_path / "hosts.txt"), "--ssh", str(shell)]
    done = subprocess.run([*LAUNCH, *options, "x.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "1. node1: shell: no route to node1" in done.stderr and "2. node2: shell: no route to node2" in done.stderr


@pytest.mark.processes
def test_the_error_of_ssh_is_reported(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("127.0.0.1:1\n")
    options = ["--hosts", str(tmp_path / "hosts.txt"), "--ssh", "ssh -o BatchMode=yes"]
    done = subprocess.run([*LAUNCH, *options, "x.py"], capture_output=True, text=True, check=False)
    expected = "Connection refused" if shutil.which("ssh") else "cannot run ssh on this machine"
    assert done.returncode == 2 and expected in done.stderr and done.stderr.startswith("error: ")


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


WORKER = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])  # remains when the rank is killed
print("pids", os.getpid(), child.pid, flush=True)
child.wait()
"""

# Rank 2 fails first, rank 0 two seconds later. The node of rank 2 exits last, because rank 3 waits for the other node.
FAILING = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), sys.argv[1]

def wait_for(name):
    while not os.path.exists(f"{folder}/{name}"):
        time.sleep(0.01)

def stop(*_):
    open(f"{folder}/asked", "w").close()
    while os.path.exists(f"/proc/{open(f'{folder}/other').read()}"):
        time.sleep(0.01)
    os._exit(1)

if rank == 0:
    print("value", os.environ["GIVEN"], flush=True)
    with open(f"{folder}/part", "w") as file:
        file.write(str(os.getppid()))
    os.rename(f"{folder}/part", f"{folder}/other")
    wait_for("asked")
    time.sleep(2)
    os._exit(4)
if rank == 2:
    wait_for("other")
    wait_for("ready")
    print("the cause", file=sys.stderr, flush=True)
    os._exit(3)
if rank == 3:
    signal.signal(signal.SIGTERM, stop)
    open(f"{folder}/ready", "w").close()
time.sleep(1000)
"""


@pytest.mark.processes
def test_the_node_that_failed_first_is_reported(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(FAILING)
    options = ["--nodes", "2", "--nproc-per-node", "2", "--env", "GIVEN"]
    done = subprocess.run(
        [*LAUNCH, *options, str(tmp_path / "worker.py"), str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GIVEN": "a value"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # the exit code of torchrun; its traceback reports 3
    assert done.stdout == "[node 0] value a value\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "[node 1] the cause" and "error: node 1 failed first, with exit code 1" in lines


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
def test_a_node_exits_after_its_launcher_is_killed(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    options = ["--nproc-per-node", "1", "--grace", "1", str(tmp_path / "worker.py")]
    with subprocess.Popen([*LAUNCH, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()[1:]]
        descriptors = [os.pidfd_open(pid) for pid in pids]  # readable once the process has exited
        process.kill()
    assert len(descriptors) == 2
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)


@pytest.mark.processes
def test_a_second_signal_kills_a_run_that_does_not_stop(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WORKER}")
    with start(["--nproc-per-node", "1", str(tmp_path / "worker.py")], tmp_path) as process:
        pids = [int(word) for word in until(process.stdout, "pids")[-1].split()[1:]]
        process.send_signal(signal.SIGINT)
        until(process.stdout, "SIGINT: asking all nodes to save and stop")
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGKILL and "SIGINT: killing all nodes" in rest
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


# --- nodes with their own addresses ----------------------------------------------------------------------------------
@dataclass
class Machines:
    """Two network namespaces connected by a virtual cable, and a remote shell `shell` for them."""

    shell: Path
    hosts: Path
    holders: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def processes(self, address: str) -> list[int]:
        """Return the ids of the running processes on a machine."""
        holder = self.holders[address].pid
        namespace = os.readlink(f"/proc/{holder}/ns/net")
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    os.readlink(folder / "ns/net") == namespace
                    and int(folder.name) != holder
                    and alive(int(folder.name))
                ):
                    pids.append(int(folder.name))
            except OSError:
                continue
        return pids


def hold(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process inside the namespace that `command` creates or enters. It exits when its input ends."""
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"{' '.join(command)} does not work here: {process.stderr.read().strip()}")
    return process


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"network namespaces need {tool}, which is not installed")
    folder = tmp_path_factory.mktemp("machines")
    outer = hold(["unshare", "--user", "--map-root-user", "--net"])

    def inside(process: subprocess.Popen[str]) -> list[str]:
        return ["nsenter", "--preserve-credentials", "--user", "--net", "--target", str(process.pid)]

    machines = Machines(folder / "shell", folder / "hosts.txt")
    for address in ADDRESSES:
        machines.holders[address] = hold([*inside(outer), "unshare", "--net"])
        (folder / address).write_text(str(machines.holders[address].pid))
    first, second = (str(holder.pid) for holder in machines.holders.values())
    cable = f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}"
    result = subprocess.run([*inside(outer), *cable.split()], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"cannot connect network namespaces: {result.stderr.strip()}")
    for address, holder in machines.holders.items():
        for command in (f"ip addr add {address}/24 dev eth0", "ip link set eth0 up", "ip link set lo up"):
            subprocess.run([*inside(holder), *command.split()], check=True)
    enter = "nsenter --preserve-credentials --user --net --target"
    program(machines.shell, f'host=$1; shift; exec {enter} "$(cat {folder}/$host)" sh -c "$*"')
    machines.hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    yield machines
    for process in (*machines.holders.values(), outer):
        process.communicate()


def options(machines: Machines) -> list[str]:
    return ["--hosts", str(machines.hosts), "--ssh", str(machines.shell), "--grace", str(GRACE_S)]


def training(folder: Path, steps: int, *flags: str) -> list[str]:
    """Return the arguments of a small training run whose losses do not depend on the number of steps."""
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 8, "vocab_size": 100}
    (folder / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    return [
        "-m", "open_lm.main", "--model", str(folder / "model.json"), "--dataset-type", "synthetic", "--workers", "0",
        "--global-batch-size", "4", "--train-num-samples", str(steps * 4 * 8), "--epochs", "1", "--precision", "fp32",
        "--lr", "1e-2", "--warmup", "2", "--lr-scheduler", "const", "--log-every-n-steps", "1", "--logs", str(folder),
        "--fsdp", *flags,
    ]  # fmt: skip


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "WANDB_MODE": "offline"}


def start(command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCH, *command], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(command: Sequence[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *command], check=False, cwd=cwd, env={**ENV, **env}, capture_output=True, text=True)


def until(stream: IO[str] | None, text: str) -> list[str]:
    """Return the lines up to the first one that contains `text`."""
    assert stream is not None
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail(f"{text!r} was not printed:\n{''.join(lines)}")


def losses(run: Path) -> dict[int, float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.processes
def test_two_machines_stop_resume_and_train_like_one(machines: Machines, tmp_path: Path) -> None:
    command = [*options(machines), *training(tmp_path, 10**6, "--name", "two")]
    with start(command, tmp_path) as process:
        until(process.stdout, "Train Epoch")
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, rest
    assert "SIGTERM: asking all nodes to save and stop" in rest and "Warning: Process group" not in rest
    assert not any(machines.processes(address) for address in ADDRESSES)
    stopped = max(losses(tmp_path / "two"))
    resumed = [*training(tmp_path, stopped + 5, "--name", "two", "--resume", "latest")]
    done = finished([*options(machines), *resumed], tmp_path)
    assert done.returncode == 0, done.stderr
    single_node = ["--nproc-per-node", "2", *training(tmp_path, stopped + 5, "--name", "one")]
    done = finished(single_node, tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "one")) == stopped + 5


@pytest.mark.processes
def test_the_other_nodes_stop_after_a_machine_dies(machines: Machines, tmp_path: Path) -> None:
    command = [*options(machines), "--output", "first", *training(tmp_path, 10**6, "--name", "dies")]
    with start(command, tmp_path) as process:
        until(process.stdout, "Train Epoch")
        for pid in machines.processes(ADDRESSES[1]):
            os.kill(pid, signal.SIGKILL)
        rest = process.communicate(timeout=4 * GRACE_S)[0]
    assert process.returncode == 255, rest
    lines = [line for line in rest.splitlines() if not line.startswith("[")]
    lost = "lost the connection before the run finished; stopped the other nodes"
    assert lines[0] == f"error: {ADDRESSES[1]}: {lost}"
    assert lines[1].endswith("lines of the other nodes omitted)")
    assert not any(machines.processes(address) for address in ADDRESSES)


@pytest.mark.processes
def test_an_invalid_flag_is_reported_once(machines: Machines, tmp_path: Path) -> None:
    command = [*options(machines), *training(tmp_path, 5, "--name", "mistake", "--global-batch-size", "3")]
    done = finished(command, tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.count("error: ") == 1 and "--global-batch-size 3" in done.stderr and "Traceback" not in done.stderr
    )
    assert f"[{ADDRESSES[0]}] error: " in done.stderr
