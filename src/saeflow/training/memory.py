"""Memory that a step frees is kept for the next one."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc; elsewhere nothing changes.

    A step allocates scores and gradients of tens of megabytes, which glibc maps afresh each time: clearing
    their pages took 10 to 30 % of an encoder product. The price is that the process stays at its peak.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
