"""What work leaves behind in this process's memory."""

import ctypes
import gc
import resource
from pathlib import Path


def kept_each_time(work, times=3):
    """KiB of memory that the process holds more after each of several like rounds of `work`, at
    least.

    What is kept of a piece of work is kept in every round. A single round may rise for reasons of
    the process's own: a heap in pieces after the tests before, a buffer that another thread made.
    """
    rises = []
    for _ in range(times):
        before = _held()
        work()
        rises.append(_held() - before)
    return min(rises)


def _held():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts no longer
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024
