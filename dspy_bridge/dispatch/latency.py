"""Per-command counts and latencies, in bounded memory."""

from __future__ import annotations

from collections import deque

# Quantiles tell of the last thousand calls of a command: 8 KB each, sorted in 0.1 ms when asked for.
WINDOW = 1000


class CommandStats:
    """Counts of one command since start; quantiles over its last `WINDOW` calls."""

    __slots__ = ("_recent", "count", "errors")

    def __init__(self) -> None:
        self.count = 0
        self.errors = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float, failed: bool) -> None:
        """One call that took `seconds` from receipt to reply."""
        self.count += 1
        self.errors += failed
        self._recent.append(seconds)

    def summary(self) -> dict[str, int | float]:
        """`{"count", "errors", "p50_ms", "p99_ms"}`, times in ms."""
        ordered = sorted(self._recent)

        def quantile(share: float) -> float:
            # The nearest rank: of one call, that call. Rounded up without math, which the first ping would wait for.
            return round(ordered[-int(-share * len(ordered) // 1) - 1] * 1000, 3)

        return {
            "count": self.count,
            "errors": self.errors,
            "p50_ms": quantile(0.5),
            "p99_ms": quantile(0.99),
        }
