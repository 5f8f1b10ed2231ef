"""What the C library does with memory that a process on a CPU frees (glibc; elsewhere nothing is done)."""

import ctypes
from typing import Any

# Of glibc's malloc.h: mallopt's parameters.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the most that any glibc takes on 64 bits


def keep_freed(every_size: bool = False) -> None:
    """Freed memory stays with the process, blocks of more than 32 MiB apart, or those too.

    A micro-batch frees what the next one asks for again; given back in between, it would be asked for page
    by page, each zeroed by the system first (docs/performance.md). every_size: for work whose blocks are
    few and alike; others may leave holes that nothing fits into.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        if every_size:
            mallopt(MMAP_MAX, 0)
        else:
            mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, -1)


def give_back() -> None:
    """What was kept goes back to the system."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
