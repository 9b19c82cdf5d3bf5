"""What the LM calls of one request, or of one optimization, may take together. Imports no DSPy."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from dspy_bridge.errors import BudgetSpent

# How often a call that waits for others looks again, in seconds.
POLL = 0.01


class Budget:
    """Limits of LM calls, tokens and US dollars; None: no limit. From any thread.

    `lm_calls` is exact. Tokens and money are known when an answer has come: they are passed by at most the calls in
    flight. So that these are few near the limit, a call waits while those in flight may take the rest.
    """

    def __init__(self, lm_calls: int | None = None, tokens: int | None = None, usd: float | None = None) -> None:
        self._limits: dict[str, float | None] = {"lm_calls": lm_calls, "tokens": tokens, "usd": usd}
        self.spent: dict[str, Any] = {"lm_calls": 0, "tokens": 0, "usd": 0.0}
        # The largest answer so far, by what it took.
        self._largest = {"tokens": 0.0, "usd": 0.0}
        self._in_flight = 0
        self._lock = threading.Lock()

    @property
    def limits_usd(self) -> bool:
        return self._limits["usd"] is not None

    def shown(self) -> dict[str, Any]:
        """`{"lm_calls", "tokens", "usd"}`: what is spent."""
        return {**self.spent, "usd": round(self.spent["usd"], 12)}

    async def reserve(self, tokens: float) -> None:
        """Before a request; `tokens`: an estimate, used until there is an answer. Raises `BudgetSpent`.

        Every call is followed by `release`.
        """
        # Calls come from several threads and event loops, which share no asyncio.Event.
        while not self._reserved(tokens):  # noqa: ASYNC110
            await asyncio.sleep(POLL)

    def _reserved(self, tokens: float) -> bool:
        with self._lock:
            for name, limit in self._limits.items():
                if limit is not None and self.spent[name] >= limit:
                    if self._in_flight:
                        return False  # their answers are paid: the run is not ended before it has them
                    raise BudgetSpent(f"budget.{name}: {self.spent[name]:g} of {limit:g} are spent", name)
            for name, most in self._largest.items():
                limit = self._limits[name]
                if limit is None or not self._in_flight:
                    continue
                # A price is not known before an answer has come.
                each = most or (tokens if name == "tokens" else limit)
                if self.spent[name] + (self._in_flight + 1) * each > limit:
                    return False
            self._in_flight += 1
            self.spent["lm_calls"] += 1
            return True

    def release(self, *, sent: bool) -> None:
        """The request has its answer or its error; or it was not sent after all."""
        with self._lock:
            self._in_flight -= 1
            self.spent["lm_calls"] -= not sent

    def spend(self, tokens: int, usd: float, lm_calls: int = 0) -> None:
        """Of an answer. `lm_calls`: of one that was replayed, for which there was no request."""
        with self._lock:
            for name, count in (("lm_calls", lm_calls), ("tokens", tokens), ("usd", usd)):
                self.spent[name] += count
            for name, count in (("tokens", tokens), ("usd", usd)):
                self._largest[name] = max(self._largest[name], count)
