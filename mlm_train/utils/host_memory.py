"""The C library and memory: what becomes of freed blocks (glibc only), locked pages and huge ones."""

import ctypes
import functools
import mmap
from typing import Any

from mlm_train.errors import UserError

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc's maximum on 64 bits
HUGE_PAGE = 2**21  # bytes


def keep_freed(every_size: bool = False) -> None:
    """Keep freed memory in the process, except blocks of more than 32 MiB; with every_size, those too.

    A micro-batch frees what the next one allocates again; memory returned in between would be mapped again
    page by page, each zeroed by the kernel first (docs/performance.md). every_size: only for work with few
    block sizes; with others, fragmentation would waste memory.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        if every_size:
            mallopt(MMAP_MAX, 0)
        else:
            mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Return freed blocks of 1 MiB or more to the system at once: what is resident is then what is in use."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**20)


def give_back() -> None:
    """Return freed memory to the system."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def lock_memory(address: int, size: int) -> None:
    """Read in the pages of mapped memory [address, address + size) and keep them until it is unmapped.

    Raises UserError where the limit of locked memory is lower.
    """
    lock = _function("mlock")
    if lock is None or lock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise UserError(
            f"{size / 2**20:,.0f} MiB cannot be locked in memory: raise `ulimit -l`, or leave the lock out"
        )


def will_need(address: int, size: int) -> None:
    """Have the system begin to read in the pages of mapped memory [address, address + size)."""
    _advise(address, size, mmap.PAGESIZE, mmap.MADV_WILLNEED)


def use_huge_pages(address: int, size: int) -> None:
    """Have memory [address, address + size), as yet unwritten, use huge pages: it is read faster.

    As far as the system has them, and lets programs ask (the default of most). Nothing is done for less than
    such a page; what else is in the first and the last one is in it too.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if advice is not None and size >= HUGE_PAGE:
        _advise(address, size, HUGE_PAGE, advice)


def _advise(address: int, size: int, page: int, advice: int) -> None:
    """madvise for the whole pages of so many bytes in which memory [address, address + size) is."""
    advise = _function("madvise")
    if advise is not None:
        start = address // page * page
        stop = -(-(address + size) // page) * page
        advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
