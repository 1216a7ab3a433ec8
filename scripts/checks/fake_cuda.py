"""A fake CUDA device: fake tensors take the code of CUDA, also in a torch that was built without it.

Autograd needs a device behind such tensors, which a library compiled from fake_cuda.cpp provides to a process that
preloads it. Nothing is computed or allocated.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from open_lm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = "OPEN_LM_FAKE_CUDA"  # set in the process that has the fake device
DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda(ranks: int) -> Iterator[None]:
    """Let the package find a CUDA device and create fake tensors on it, as rank 0 of `ranks`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.attention import bias
    from torch.nn.parallel import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from open_lm.distributed import processes
    from open_lm.kernels import document_attention
    from open_lm.model import attention
    from open_lm.optim import matrix_assignment
    from open_lm.training import build

    def init_group(*_: Any) -> None:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    def gather_copies(objects: list[Any], value: Any, group: Any = None) -> None:
        objects[:] = [value] * len(objects)

    cpu: Any = torch.cpu
    patches: list[Any] = [
        mock.patch.dict(os.environ, {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(torch.cuda, "Stream", lambda *_, **__: cpu.Stream()),
        mock.patch.object(torch.cuda, "Event", lambda *_, **__: cpu.Event()),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: cpu.current_stream()),
        mock.patch.object(torch.cuda, "stream", cpu.stream),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(bias, "causal_lower_right", lambda *_: None),
        mock.patch.object(document_attention, "_compiled_flex_attention", lambda: _fused_attention),
        mock.patch.object(attention, "supports_flex_attention", lambda device: True),
        mock.patch.object(processes, "select_device", lambda *_, **__: DEVICE),
        mock.patch.object(processes, "_init_process_group", init_group),
        mock.patch.object(processes, "_set_pg_timeout", lambda *_: None),
        mock.patch.object(build, "device_peak_flops", lambda *_: None),
        mock.patch.object(build, "_create_model", _create_model),
        mock.patch.object(dist, "all_gather_object", gather_copies),
        mock.patch.object(dist, "broadcast_object_list", lambda *_, **__: None),
        mock.patch.object(DeviceMesh, "__init__", _with_real_tensors(DeviceMesh.__init__)),
        mock.patch.object(DeviceMesh, "__getitem__", _with_real_tensors(DeviceMesh.__getitem__)),
        mock.patch.object(build, "build_layout", _with_real_tensors(build.build_layout)),
        mock.patch.object(matrix_assignment, "_shard_group", _with_real_tensors(matrix_assignment._shard_group)),
        # DDP compares parameters and reorders its buckets with collectives that the fake group cannot run.
        mock.patch.object(distributed, "_verify_param_shape_across_processes", lambda *_: None),
        mock.patch.object(dist.Reducer, "_rebuild_buckets", lambda _: False),
        mock.patch.object(dist.Logger, "set_runtime_stats_and_log", lambda _: None),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _fused_attention(queries: Tensor, keys: Tensor, values: Tensor, *_: Any, **settings: Any) -> Tensor:
    """Dispatch one fused attention kernel; fake tensors of a torch without CUDA have no choice of kernels."""
    keys, values = (x.expand_as(queries) if x.shape[1] == 1 else x for x in (keys, values))
    operator = torch.ops.aten._scaled_dot_product_efficient_attention.default
    mixed: Tensor = operator(queries, keys, values, None, True, is_causal=settings.get("is_causal", False))[0]
    return mixed


def _create_model(config: Any, layout: Any) -> nn.Module:
    """Create the model on the fake device: fake tensors can be neither initialized nor moved."""
    from open_lm.distributed.precision import parameter_dtype
    from open_lm.model.transformer import Transformer, create_params

    class UninitializedTransformer(Transformer):
        def reset_parameters(self, seed: int | None = None) -> None: ...

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(parameter_dtype(config.precision.precision))
    try:
        with DEVICE:
            return UninitializedTransformer(create_params(config.model))
    finally:
        torch.set_default_dtype(default_dtype)


def _with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with FakeTensorMode disabled, because it reads tensor values."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def fake_device_problem() -> str | None:
    """Return why this machine cannot have the fake device, or None if it can."""
    if torch.backends.cuda.is_built():
        return "fake CUDA tensors need a torch that was built without CUDA (its CPU wheel), found one with CUDA"
    if sys.platform != "linux":
        return f"fake CUDA tensors need Linux, found {sys.platform}"
    if shutil.which(_compiler()[0]) is None:
        return f"fake CUDA tensors need a C++ compiler, found no {_compiler()[0]}: install g++ or set CXX"
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def run_with_fake_device(program: Path, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program with the fake device in a process of its own and return its output.

    Raise ConfigError if `fake_device_problem` finds one, or if the library cannot be compiled.
    """
    if problem := fake_device_problem():
        raise ConfigError(problem)
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fake_cuda.so")
        compiler = [*_compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{home / 'include'}"]
        linked = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        source = Path(__file__).with_name("fake_cuda.cpp")
        try:
            subprocess.run(
                [*compiler, str(source), *linked, "-o", str(library)], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"{source.name} cannot be compiled: {getattr(error, 'stderr', error)}") from error
        path = os.pathsep.join([str(ROOT / "scripts" / "bench"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, PRELOADED: "1", "LD_PRELOAD": str(library), "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, str(program), *argv], check=False, env=env, stdout=subprocess.PIPE, text=True
        )
