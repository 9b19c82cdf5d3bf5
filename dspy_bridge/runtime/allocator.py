"""glibc malloc tuning and the OOM score; no-op elsewhere.

By default glibc adapts its thresholds to the largest block freed so far, up to 32 MB, and keeps smaller blocks; whether
it maps and unmaps memory for every payload of a megabyte differs from run to run. With fixed thresholds, 1 MB of
arguments takes 0.55 ms instead of 0.6 or 1.1, and ten runs with 8 MB of text leave 12 MB instead of 77.
"""

from __future__ import annotations

import gc
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Payloads from this length on call for tuning; before the first one, ctypes (5 ms) is not imported.
TUNE_BYTES = 1 << 18
# Payloads from this length on are followed by a trim, which takes 0.1 ms, or a few if there is much to free.
LARGE_BYTES = 4 << 20
# Between trims: after each of many payloads, the next one would only allocate the memory again.
_SECONDS_BETWEEN = 0.25
# Parameters of mallopt: the free memory kept at the end of the heap; the size from which blocks are mapped.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# From 0, the default, to 1000.
_OOM_SCORE = 500
_OOM_FILE = "/proc/self/oom_score_adj"

# Whether a large payload has passed since the last trim.
trim_due = False
_last = 0.0
_tuned = False
_libc: Any = None


def raise_oom_score() -> None:
    """If memory runs out, make Linux kill this process rather than the BEAM, which starts another one.

    A higher score stays. Child processes inherit it.
    """
    try:
        file = os.open(_OOM_FILE, os.O_RDWR)
    except OSError:
        return  # not Linux, or there is no /proc
    try:
        if int(os.read(file, 16)) < _OOM_SCORE:
            os.write(file, b"%d" % _OOM_SCORE)
    except (OSError, ValueError):
        pass  # it is only a preference
    finally:
        os.close(file)


def note_payload(length: int) -> None:
    """Record that a payload of `length` bytes passed."""
    global trim_due
    if length >= TUNE_BYTES:
        if not _tuned:
            _tune()
        if length >= LARGE_BYTES:
            trim_due = True


def room_for(payload: bytes) -> bool:
    """Whether there is memory to parse a payload, if the address space is limited (`ulimit -v`).

    Checked before parsing, as the parser is written in Rust, which aborts the process when an allocation fails.
    """
    if len(payload) < TUNE_BYTES:
        return True
    try:
        try:
            import resource
        except ImportError:
            return True  # a system without limits

        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            return True
        # The most that it takes: strings four times as long with a character past 16 bits, twice for a moment; in
        # addition objects, lists and their items.
        texts = (2 if payload.isascii() and b"\\u" not in payload else 6) * len(payload)
        objects, lists, items = payload.count(b"{"), payload.count(b"["), payload.count(b",")
        bytes(texts + 256 * objects + 160 * lists + 128 * items)  # allocated, never touched
    except MemoryError:
        return False
    return True


def trim() -> None:
    """Collect garbage and return memory to the system, if a large payload passed. For when one may have been freed."""
    global trim_due, _last
    if not trim_due or time.monotonic() - _last < _SECONDS_BETWEEN:
        return
    trim_due = False
    # DSPy leaves images in reference cycles; the automatic collection came up to 20 images later.
    gc.collect()
    if _libc is not None:
        _libc.malloc_trim(0)
    _last = time.monotonic()


def _tune() -> None:
    global _tuned, _libc
    _tuned = True
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
        _ = libc.malloc_trim
    except (ImportError, OSError, AttributeError, MemoryError):
        return  # not glibc
    _libc = libc
