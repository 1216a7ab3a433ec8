"""Define shared fixtures: the shared data folder, an S3 server on loopback, a torchrun command."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy
from hypothesis import settings
from strict_s3 import KINDS, StrictS3

pytest_plugins = ["datapreprocess_helpers"]
# Two test processes share two cores. OpenMP threads of torch that wait for each other would waste their time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("no_deadline", deadline=None)  # no test depends on the speed of the machine
settings.load_profile("no_deadline")
# The fork server of a test process imports these modules once, for all tests that fork processes from it.
multiprocessing.set_forkserver_preload([
    "open_lm.training.run", "open_lm.training.build", "open_lm.training.trainer", "torch._dynamo",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.nn.attention.bias", "pytest",
    "open_lm.datapreprocess.make_2048", "open_lm.datapreprocess.engine", "tokenizers", "fastokens", "zstandard",
    "boto3", "s3fs", "open_lm.hf.importing", "open_lm.hf.exporting", "open_lm.report.collect", "open_lm.report.page",
])  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]

# Fixtures that start a process or a server: the tests that use them have the mark `processes`.
PROCESS_FIXTURES = frozenset({"torchrun", "ranks", "forked_python", "local_ray", "s3_endpoint", "strict_s3", "wheel"})
_started_processes: list[str] = []  # by the current test; `make test-fast` omits the tests that start any


def _record_process(event: str, args: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and Path(str(args[0])).name.startswith(("python", "bash", "torchrun")):
        _started_processes.append(str(args[0]))
    elif event == "os.fork":
        _started_processes.append("os.fork")


sys.addaudithook(_record_process)


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes, and put their files, which take longest, first."""
    slow_files = set()
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
        if item.get_closest_marker("processes"):
            slow_files.add(item.path)
    items.sort(key=lambda item: item.path not in slow_files)  # short files are left to even out the end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts a process without the mark `processes`."""
    _started_processes.clear()
    result = yield
    if _started_processes and item.get_closest_marker("processes") is None:
        pytest.fail(f"starts a process ({_started_processes[0]}): mark the test with @pytest.mark.processes")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    """Escape names that are not UTF-8 in captured output: test processes send it as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder with golden files, corpus and tokenizers. Skip the test if it is missing."""
    path = Path(os.environ.get("OPEN_LM_SHARED", ROOT.parent / "shared"))
    if not (path / "compat").is_dir():
        pytest.skip(f"shared data not found at {path}; set OPEN_LM_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Start an S3 server (moto) on loopback, one per test process, and yield its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket and return its name. Set AWS_ENDPOINT_URL and credentials for this process and its children."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def faulty_s3(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Yield a proxy of the S3 server that injects the faults in its `.rules`, for this process and its children."""
    from s3fs import S3FileSystem

    with FaultyProxy(s3_endpoint) as proxy:
        proxy.bucket = s3_bucket
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()  # a cached instance keeps its first endpoint
        yield proxy
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a module on forked ranks: ranks(2, "open_lm.main", "--model", ...) from tmp_path.

    Like `torchrun`, but without the time to start torchrun and to import torch in each rank.
    """
    from rank_processes import run_ranks

    def run(world_size: int, module: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        result = run_ranks(world_size, module, *args, folder=tmp_path, **options)
        if result.returncode != 0:
            output = f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
            pytest.fail(f"{world_size} ranks of {module} exited with code {result.returncode}\n{output}")
        return result

    return run


@pytest.fixture(scope="session")
def forked_python() -> Iterator[str]:
    """Yield the path of a `python` whose programs start without the time to import torch and the package."""
    from forked_python import ForkedPython

    with tempfile.TemporaryDirectory(prefix="python-") as folder:
        yield str(ForkedPython(Path(folder)).path)


@pytest.fixture(params=KINDS)
def strict_s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictS3]:
    """Yield an S3 server that does not know checksum fields, in turn of every kind; it has the bucket "bucket"."""
    from s3fs import S3FileSystem

    with StrictS3(request.param) as store:
        for name, value in {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1",
                            "ENDPOINT_URL": store.endpoint}.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()  # a cached instance keeps its first endpoint
        yield store
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def torchrun(tmp_path: Path, forked_python: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a module under torchrun in tmp_path: torchrun(2, "open_lm.main", "--model", …)."""

    def run(
        processes: int, module: str, *args: str, check: bool = True, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [forked_python, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", module, *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        result = subprocess.run(
            command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout_s
        )
        if check and result.returncode != 0:
            output = f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
            pytest.fail(f"{' '.join(command)} exited {result.returncode}\n{output}")
        return result

    return run
