"""Test the launcher: splitting the command line, exit codes, and stop signals."""

from __future__ import annotations

import ast
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm.utils.torchrun import install_script, main, split_command

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("torchrun_args", "script_args"),
    [
        ("--nproc-per-node 2 -m open_lm.main", "--model open_lm_11m --logs logs"),
        ("--standalone --nproc-per-node=2 train.py", "--logs x --nnodes 3"),
        ("--nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint host:1 --nproc_per_node 8 --max-restarts 0 -m a.b", ""),
        ("train.py", "-m x"),
    ],
)
def test_arguments_are_split_at_the_script(torchrun_args: str, script_args: str) -> None:
    from torch.distributed.run import get_args_parser

    found = split_command([*torchrun_args.split(), *script_args.split()], get_args_parser())
    assert found == (torchrun_args.split(), script_args.split())
    assert split_command([*torchrun_args.split(), "--", *script_args.split()], get_args_parser()) == found


def test_script_flags_are_not_parsed_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    # Write each line at once, so that the lines of two ranks do not interleave.
    script.write_text("import os, sys; os.write(1, f\"{os.environ['RANK']} {sys.argv[1:]}\\n\".encode())")
    command = [sys.executable, "-m", "open_lm.utils.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run([*command, "--logs", "x", "--r", "y"], capture_output=True, text=True, check=True)
    assert sorted(result.stdout.splitlines()) == [f"{rank} ['--logs', 'x', '--r', 'y']" for rank in range(2)]


@pytest.mark.parametrize(("code", "traceback"), [(0, False), (2, False), (130, False), (1, True)])
def test_no_traceback_after_a_rank_reported_its_error(tmp_path: Path, code: int, traceback: bool) -> None:
    script = tmp_path / "end.py"
    script.write_text(f"import sys; sys.exit({code})")
    command = [sys.executable, "-m", "open_lm.utils.torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (code, traceback)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("code", [0, 7])
def test_stop_signals_are_forwarded_to_the_workers(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys\n"
        "signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signals)\n"
        "os.write(1, b'ready\\n')\n"
        "os.write(1, signal.sigwait(signals).name.encode() + b'\\n')\n"
        f"sys.exit({code})\n"
    )
    command = [sys.executable, "-m", "open_lm.utils.torchrun", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, "--max-restarts", "3", str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read(len("ready\n") * 2)
        process.send_signal(number)
        rest = process.communicate(timeout=120)[0]
    assert output.split() == ["ready"] * 2 and set(rest.split()) == {number.name}
    assert (process.returncode == 0) == (code == 0)


def test_install_script_creates_torchrun(tmp_path: Path) -> None:
    install_script(tmp_path)
    result = subprocess.run([tmp_path / "torchrun", "--help"], capture_output=True, text=True, check=True)
    assert "--nproc-per-node" in result.stdout


def test_used_master_port_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("")
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-m", "open_lm.utils.torchrun", "--nproc-per-node", "1", "--master-port", port]
        result = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: --master-port {port}: another process uses this port" in result.stderr


def test_help_is_that_of_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--rdzv-endpoint" in capsys.readouterr().out


def test_only_parallelize_imports_the_sharding_modules_of_torch() -> None:
    """import-linter checks only packages; these are modules inside torch."""
    forbidden = ("torch.distributed.fsdp", "torch.nn.parallel")
    found = set()
    for path in (ROOT / "open_lm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith(forbidden) for name in names):
                found.add(path.relative_to(ROOT / "open_lm").as_posix())
    assert found == {"parallel/parallelize.py"}
