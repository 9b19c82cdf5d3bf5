"""A token bucket that may go into debt. Pure; the caller has the clock."""

from __future__ import annotations


class Bucket:
    """A token bucket: full at first, refilled evenly with `per_minute`, which is also its size, but at least 1.

    It may go into debt.
    """

    def __init__(self, per_minute: float) -> None:
        self._per_second = per_minute / 60
        self._size = max(per_minute, 1.0)
        # When it is full again. One number does not drift, as a level would that is brought up to date.
        self._full_at = 0.0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; not positive if it is."""
        return self._full_at - now - (self._size - amount) / self._per_second

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it is there or not."""
        self._full_at = max(self._full_at, now) + amount / self._per_second

    def take_some(self, amount: float, now: float) -> None:
        """Take `amount`, or what is there of it."""
        before = max(self._full_at, now)
        empty = now + self._size / self._per_second
        self._full_at = max(before, min(before + amount / self._per_second, empty))
