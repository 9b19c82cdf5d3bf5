"""Programs by id, in the order of the frames that define them. Does not import DSPy.

The reading thread adds and removes entries as it reads, so that `execute_program` finds a program that was defined just
before it. A program is loaded later, once, when the first request needs it.
"""

from __future__ import annotations

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable
    from typing import Any


class Entry:
    """One definition under an id.

    `answered`: a reply has reported its creation. `lazy`: it is neither checked nor loaded before a run needs it.
    `failure`: the error, as a reply has it, of a lazy entry's last load, which is not repeated before `reload_at`.
    """

    def __init__(self, id: str, definition: dict[str, Any], lazy: bool = False) -> None:
        self.id = id
        self.definition = definition
        self.created_at = time.time()
        self.execution_count = 0
        self.last_executed: float | None = None
        self.lazy = lazy
        self.answered = lazy
        self.loaded = False
        self.failure: dict[str, Any] | None = None
        self.reload_at = 0.0
        # Set by the first request that needs the program.
        self.loading: asyncio.Future[Any] | None = None

    def details(self) -> dict[str, Any]:
        """The entry as `list_programs` reports it; times are unix seconds."""
        details = {
            "id": self.id,
            "program_type": self.definition.get("program_type", "predict"),
            "signature": self.definition["signature"],
            "created_at": self.created_at,
            "execution_count": self.execution_count,
            "last_executed": self.last_executed,
            "loaded": self.loaded,
        }
        if self.failure is not None:
            details.update(error=self.failure["error"], error_type=self.failure["error_type"])
        return details


class Registry:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order of creation. Of each id the entry that stays, then those whose creation is not answered yet.
        self._entries: dict[str, tuple[Entry, ...]] = {}

    def add(self, id: str, definition: dict[str, Any]) -> Entry:
        """Define or redefine `id`. The earlier entry is kept until `confirm`, and restored by `discard`."""
        with self._lock:
            entry = Entry(id, definition)
            self._entries[id] = (*self._entries.get(id, ()), entry)
            return entry

    def add_lazy(self, id: str, definition: dict[str, Any]) -> None:
        """Define or redefine `id` for good, unchecked."""
        with self._lock:
            self._entries.pop(id, None)
            self._entries[id] = (Entry(id, definition, lazy=True),)

    def get(self, id: str) -> Entry | None:
        """The latest entry of `id`, answered or not."""
        return self._entries.get(id, (None,))[-1]

    def confirm(self, entry: Entry) -> None:
        """The creation of `entry` succeeded: what it replaces goes."""
        with self._lock:
            entry.answered = True
            entries = self._entries.get(entry.id, ())
            if entry in entries[1:]:
                del self._entries[entry.id]
                self._entries[entry.id] = entries[entries.index(entry) :]

    def discard(self, entry: Entry) -> None:
        """The creation of `entry` failed or was cancelled: restore the earlier entry."""
        with self._lock:
            entries = tuple(other for other in self._entries.get(entry.id, ()) if other is not entry)
            if entries:
                self._entries[entry.id] = entries
            else:
                self._entries.pop(entry.id, None)

    def remove(self, ids: Iterable[str] | None) -> int:
        """Remove the given programs, or all; returns how many there were."""
        with self._lock:
            removed = list(self._entries) if ids is None else ids
            return sum(self._entries.pop(id, None) is not None for id in removed)

    def answered(self) -> list[Entry]:
        """For each id the last answered entry, oldest first."""
        found = []
        with self._lock:
            for entries in self._entries.values():
                for entry in reversed(entries):
                    if entry.answered:
                        found.append(entry)
                        break
        return found
