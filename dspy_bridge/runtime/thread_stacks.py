"""The stacks of threads where the C library is musl, as in Alpine.

Its threads have 128 KB, or 1 MB with Alpine's Python; glibc's have what the main thread has, 8 MB. Python counts its
recursion in C by what glibc gives: the event loop's thread crashed at LM answers that were nested thousands deep.
"""

from __future__ import annotations

import os
import sys
import threading

STACK_BYTES = 8 << 20


def enlarge() -> None:
    """Give threads that are started from now on as much stack as with glibc. Only what is touched takes memory."""
    if sys.platform == "linux" and not _glibc():
        threading.stack_size(STACK_BYTES)


def _glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (OSError, ValueError):
        return False
