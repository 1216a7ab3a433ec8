"""Memory of a process that trains on a CPU."""

from __future__ import annotations

import ctypes

# Of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed, and use it again; whether it can (glibc).

    By default it gives large blocks back to the kernel at once, which then has to find and clear pages for every
    activation of every step anew. The process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No blocks outside of the heap, no end of the heap given back, and the heap grown in large strides.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
