"""Programs by id, in the order in which the frames about them came. No DSPy here.

The reading thread adds and removes entries as it reads, so that an execute finds the program that a create just before
it defined, loaded or not; loading happens later, on the event loop, once for whoever needs it first.
"""

from __future__ import annotations

import itertools
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable
    from typing import Any


class Entry:
    """One definition under an id. `answered`: its create was answered as a success."""

    __slots__ = (
        "answered",
        "created_at",
        "definition",
        "execution_count",
        "failed",
        "id",
        "last_executed",
        "loading",
        "number",
        "previous",
    )

    def __init__(self, id: str, number: int, definition: dict[str, Any], previous: Entry | None) -> None:
        self.id = id
        # Of all entries in the order in which they were made: the system's clock may be set back.
        self.number = number
        self.definition = definition
        self.previous = previous
        self.created_at = time.time()
        self.execution_count = 0
        self.last_executed: float | None = None
        self.answered = False
        self.failed = False
        # Of its loading, started by the first request that needs it.
        self.loading: asyncio.Future[Any] | None = None

    def details(self) -> dict[str, Any]:
        """The entry as `list_programs` tells it; times are unix seconds."""
        return {
            "id": self.id,
            "program_type": self.definition.get("program_type", "predict"),
            "signature": self.definition["signature"],
            "created_at": self.created_at,
            "execution_count": self.execution_count,
            "last_executed": self.last_executed,
        }


class Registry:
    """All programs of the peer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._numbers = itertools.count()

    def add(self, id: str, definition: dict[str, Any]) -> Entry:
        """Define `id` anew. What it was before stays until `confirm`, and comes back with `discard`."""
        with self._lock:
            entry = Entry(id, next(self._numbers), definition, self._entries.pop(id, None))
            self._entries[id] = entry
            return entry

    def get(self, id: str) -> Entry | None:
        """The latest definition of `id`, answered or not."""
        return self._entries.get(id)

    def confirm(self, entry: Entry) -> bool:
        """The create of `entry` succeeded. Returns whether it replaced another."""
        with self._lock:
            replaced = entry.previous is not None
            entry.answered = True
            entry.previous = None
            return replaced

    def discard(self, entry: Entry) -> None:
        """The create of `entry` failed or was given up: its id means again what it meant before."""
        with self._lock:
            entry.failed = True
            if self._entries.get(entry.id) is entry:
                before = working(entry)
                if before is None:
                    del self._entries[entry.id]
                else:
                    self._entries[entry.id] = before

    def remove(self, ids: Iterable[str] | None) -> int:
        """Forget the programs named, or all; returns how many there were."""
        with self._lock:
            if ids is None:
                count = len(self._entries)
                self._entries.clear()
                return count
            return sum(self._entries.pop(id, None) is not None for id in dict.fromkeys(ids))

    def answered(self) -> list[Entry]:
        """The entries whose creates have been answered, oldest first."""
        with self._lock:
            found = []
            for entry in self._entries.values():
                seen: Entry | None = entry
                while seen is not None and not seen.answered:
                    seen = seen.previous
                if seen is not None:
                    found.append(seen)
        return sorted(found, key=lambda entry: entry.number)


def working(entry: Entry) -> Entry | None:
    """`entry`, or the one before it if it failed, and so on."""
    seen: Entry | None = entry
    while seen is not None and seen.failed:
        seen = seen.previous
    return seen
