"""Freed memory is kept: a process that asks for as much again has no page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from sae.base.memory import MMAP_THRESHOLD, keep_freed_memory

ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**17)  # glibc's own; set, it does not grow with what is freed
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    return sum(map(len, [b"x" * 2**24 for _ in range(8)]))
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
    assert faults("given back") > pages / 4, "the test asks for enough to be given back"
    assert faults("kept") < pages / 100
