"""Keeps loaded programs out of Python's full garbage collections, which hold up everything while they run.

A collection walks every object that there is. With 10,000 programs one took 210 ms, and under load there was one
every 1,500 executes. Frozen objects are not walked. But what is frozen is not collected either, and a program that was
removed is a cycle (classes are), so after enough removals everything is thawed, collected once and frozen again.
"""

from __future__ import annotations

import gc
import threading

# Changes between two settlings. A removed program is 15 KB: fewer than this many are not worth a collection.
EVERY = 256


class GcFreezer:
    """Counts programs loaded and removed; `settle` when it is due, on a thread where nobody waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded = 0
        self._removed = 0

    def loaded(self) -> bool:
        """A program was loaded. Returns whether `settle` is due."""
        with self._lock:
            self._loaded += 1
            return self._loaded >= EVERY

    def removed(self, count: int) -> bool:
        """So many programs were removed or replaced. Returns whether `settle` is due."""
        with self._lock:
            self._removed += count
            return self._removed >= EVERY

    def settle(self) -> None:
        """Freeze what is there; if programs were removed, only after collecting them."""
        with self._lock:
            removed, self._loaded, self._removed = self._removed, 0, 0
        if removed:
            gc.unfreeze()
            gc.collect()
        gc.freeze()
