"""Counts and latencies of a command, in bounded memory."""

from __future__ import annotations

from collections import deque

# Quantiles are those of the last thousand calls: 8 KB for each command, sorted in 0.1 ms on request.
WINDOW = 1000


class CommandStats:
    """Counts of one command since start; quantiles over its last `WINDOW` calls."""

    __slots__ = ("_recent", "count", "errors")

    def __init__(self) -> None:
        self.count = 0
        self.errors = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float, failed: bool, count: int = 1) -> None:
        """Count a call, or `count` of them, that took `seconds` from receipt to reply."""
        self.count += count
        self.errors += failed
        if count == 1:
            self._recent.append(seconds)
        else:
            self._recent.extend([seconds] * count)

    def summary(self) -> dict[str, int | float]:
        """`{"count", "errors", "p50_ms", "p99_ms"}`, times in ms."""
        ordered = sorted(self._recent)

        def quantile(share: float) -> float:
            # The nearest rank. Rounded up without `math`, whose import the first ping would wait for.
            return round(ordered[-int(-share * len(ordered) // 1) - 1] * 1000, 3)

        return {
            "count": self.count,
            "errors": self.errors,
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
        }
