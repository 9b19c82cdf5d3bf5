"""The programs that an optimizer has scored on its whole set: the best one, and what the client sees. Imports DSPy."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from statistics import fmean
from typing import Any

from dspy_bridge.optimizing.run import Run
from dspy_bridge.wire.json_values import encode_value

# Seconds between two items of progress.
_PROGRESS_EVERY = 0.1


class Candidates:
    """Called from all threads of a run. `state_of(module)`: the state of a program; `send`: an item of the stream."""

    def __init__(
        self,
        optimizer: str,
        whole: int | None,
        start: dict[str, Any],
        state_of: Callable[[Any], dict[str, Any]],
        run: Run,
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        """`whole`: how many examples a whole evaluation has, if that is known before. `start`: the state at first."""
        self._optimizer = optimizer
        self._whole = whole
        self._start = start
        self._baseline: float | None = None
        self._state_of = state_of
        self._run = run
        self._send = send
        self._lock = threading.Lock()
        self._best: tuple[float, dict[str, Any]] | None = None
        self.count = 0
        self._done = 0
        self._total: int | None = None
        self._next_progress = 0.0
        # Of programs that no `dspy.Evaluate` scores: their scores by the examples' ids.
        self._scored: weakref.WeakKeyDictionary[Any, dict[int, float]] = weakref.WeakKeyDictionary()

    def result(self, module: Any = None, stopped: str | None = None) -> dict[str, Any]:
        """The reply: of the best candidate, or of the optimizer's result if none was scored.

        Not always of its result: of equal scores it may choose another one than was announced.
        """
        made = self._start if module is None else self._state_of(module)
        with self._lock:
            score, state = self._best or (None, made)
            return {
                "state": state,
                "score": score,
                "baseline": self._baseline,
                "candidates": self.count,
                "stopped": stopped,
                "lm_calls": self._run.budget.spent["lm_calls"],
                "metric_calls": self._run.metric_calls,
            }

    def begin_evaluation(self, total: int) -> None:
        """A `dspy.Evaluate` of so many examples begins."""
        with self._lock:
            self._done, self._total = 0, total
        self.report()

    def end_evaluation(self, module: Any, scores: list[float], all_of_set: bool) -> None:
        """It has ended. `all_of_set`: it had all examples of its own set."""
        with self._lock:
            self._total = None
        if all_of_set and (self._whole is None or len(scores) >= self._whole):
            self._add(module, scores)

    def scored(self, module: Any, example: Any, score: float) -> None:
        """One run has its score. `module`: the program, where no `dspy.Evaluate` scores it."""
        whole: dict[int, float] | None = None
        with self._lock:
            self._done += 1
            if module is not None and self._whole is not None:
                scores = self._scored.setdefault(module, {})
                scores[id(example)] = score
                if len(scores) == self._whole:
                    whole = self._scored.pop(module)
        if whole is not None:
            self._add(module, list(whole.values()))
        self.report()

    def report(self) -> None:
        """Send the progress, at most ten times a second."""
        with self._lock:
            now = time.monotonic()
            if now < self._next_progress:
                return
            self._next_progress = now + _PROGRESS_EVERY
            progress = {
                "step": self._optimizer,
                "done": self._done,
                "total": self._total,
                "lm_calls": self._run.budget.spent["lm_calls"],
                "best": None if self._best is None else self._best[0],
            }
        self._send({"progress": progress})

    def _add(self, module: Any, scores: list[float]) -> None:
        score, state = fmean(scores), self._state_of(module)
        with self._lock:
            self.count += 1
            # The program as it was wins ties: a change that gains nothing is none.
            is_start = encode_value(state) == encode_value(self._start)
            if is_start and self._baseline is None:
                self._baseline = score
            best = self._best is None or score > self._best[0] or (is_start and score == self._best[0])
            item: dict[str, Any] = {"number": self.count, "score": score, "of": len(scores), "best": best}
            if best:
                self._best = score, state
                item["state"] = state
        # Not with the lock: this waits for the client, and the reply needs the lock.
        self._send({"candidate": item})
