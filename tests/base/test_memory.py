"""Freed memory is kept: a process that asks for as much again has no page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from sae.base.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def step():
    return sum(float(part.sum()) for part in [torch.ones(2**22) for _ in range(8)])
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 8 * 2**24 // 4096
    # Where blocks happen to lie decides whether the top of the heap can be given back: four times out of six, about.
    assert any(faults("given back") > pages / 4 for _ in range(10)), "the test asks for enough to be given back"
    assert faults("kept") < pages / 100
