"""Gives the memory of large payloads back to the system. Only glibc needs to be asked; elsewhere this does nothing.

Freed blocks of up to 32 MB stay with glibc for the next ones, the more of them the larger they were: after a few
executes with 8 MB of text the peer was half as big again as before.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Payloads from this length on are worth it; trimming takes some 0.1 ms and, with much to give back, a few ms.
LARGE_BYTES = 1 << 20
# Not after each of many large payloads: the next one would only fetch the memory again.
_SECONDS_BETWEEN = 0.25

# Whether something large has passed since.
due = False
_last = 0.0
_trim: Callable[[int], object] | None = None


def seen(length: int) -> None:
    """A payload of `length` bytes passed."""
    global due
    if length >= LARGE_BYTES:
        due = True


def give_back() -> None:
    """Trim if something large passed, and not a moment ago. To be called when one may just have been dropped."""
    global due, _last
    if not due or time.monotonic() - _last < _SECONDS_BETWEEN:
        return
    due = False
    (_trim or _find_trim())(0)
    _last = time.monotonic()


def _find_trim() -> Callable[[int], object]:
    global _trim
    try:
        import ctypes

        _trim = ctypes.CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError):
        _trim = _nothing
    return _trim


def _nothing(_pad: int) -> None:
    """What a system without `malloc_trim` does."""
