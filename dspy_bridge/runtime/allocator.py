"""What the system is told of memory. Where it does not listen (another libc, another kernel) this does nothing.

Large payloads: by itself glibc adapts to the largest block freed so far, up to 32 MB: blocks below stay with it, and
whether a megabyte is fetched from the system and given back for every payload changes from run to run. Fixed limits
make 1 MB of arguments take 0.55 ms instead of 0.6 or 1.1, and after ten executes with 8 MB of text the peer had 12 MB
more instead of 77.
"""

from __future__ import annotations

import gc
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# From this payload length on it matters; until one comes, ctypes (5 ms) is not imported.
TUNE_BYTES = 1 << 18
# Payloads from this length on are followed by a trim: 0.1 ms, a few ms where there is much to give back.
LARGE_BYTES = 4 << 20
# Not after each of many: the next one would only fetch the memory again.
_SECONDS_BETWEEN = 0.25
# mallopt's names for: keep at most so much free memory at the end of the heap; blocks from here on have no heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# 0 is what processes have, 1000 the most.
_OOM_SCORE = 500
_OOM_FILE = "/proc/self/oom_score_adj"

# Whether something large has passed since.
trim_due = False
_last = 0.0
_tuned = False
_libc: Any = None


def raise_oom_score() -> None:
    """Where memory runs out, Linux is to kill this process and not the BEAM, which would start another one.

    It would take the largest, which may be either. A score that is higher already stays. What is started from here on
    has it, too.
    """
    try:
        file = os.open(_OOM_FILE, os.O_RDWR)
    except OSError:
        return  # no Linux, or no /proc
    try:
        if int(os.read(file, 16)) < _OOM_SCORE:
            os.write(file, b"%d" % _OOM_SCORE)
    except (OSError, ValueError):
        pass  # more is not at stake
    finally:
        os.close(file)


def note_payload(length: int) -> None:
    """A payload of `length` bytes passed."""
    global trim_due
    if length >= TUNE_BYTES:
        if not _tuned:
            _tune()
        if length >= LARGE_BYTES:
            trim_due = True


def room_for(payload: bytes) -> bool:
    """Whether there is memory for what a payload holds, where the address space has a limit (`ulimit -v`).

    To be asked before it is read: the parser is written in Rust, which ends the process where it gets none.
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
        # At most: a character past 16 bits makes a text four times as long, twice for a moment; and what objects, lists
        # and their items take beside it.
        texts = (2 if payload.isascii() and b"\\u" not in payload else 6) * len(payload)
        objects, lists, items = payload.count(b"{"), payload.count(b"["), payload.count(b",")
        bytes(texts + 256 * objects + 160 * lists + 128 * items)  # asked for, never touched
    except MemoryError:
        return False
    return True


def trim() -> None:
    """Collect and trim if something large passed, and not a moment ago. To be called when one may have been dropped."""
    global trim_due, _last
    if not trim_due or time.monotonic() - _last < _SECONDS_BETWEEN:
        return
    trim_due = False
    # DSPy leaves an image in a cycle; by itself the collection that finds it came after up to 20 more of them.
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
        return  # no glibc
    _libc = libc
