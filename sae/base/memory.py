"""Memory that one step frees is kept for the next.

glibc hands large blocks back to the system as they are freed, and every step then pays a page fault for every 4 KiB
that it asks for again: on two CPU cores up to a third of a step whose codes are dense, as a gated coder's are at first.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 2**30
LARGEST = 2**25  # of a block that is kept; glibc allows no more


def keep_freed_memory() -> None:
    """Makes this process keep up to 1 GiB that it has freed, in blocks below 32 MiB; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
