"""Reuse of freed memory, tested in a separate process because the setting applies to the whole process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

_CODE = """
import json, resource, sys, torch
from open_lm.kernels.cpu_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10_000_000) for _ in range(4)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults() for _ in range(8)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_pages_are_reused() -> None:
    def page_faults(setting: str) -> list[int]:
        result = subprocess.run([sys.executable, "-c", _CODE, setting], check=True, capture_output=True, text=True)
        return json.loads(result.stdout)

    pages = 4 * 40_000_000 // 4096
    assert page_faults("default")[-1] > pages / 2
    assert page_faults("keep")[-1] < pages / 10
