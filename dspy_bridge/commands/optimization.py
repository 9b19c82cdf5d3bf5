"""Optimizes programs: the arguments are those of an evaluation and `optimize`. At most N at once, in own threads."""

from __future__ import annotations

from dspy_bridge.errors import Overloaded
from dspy_bridge.runtime.worker_threads import WorkerThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dspy_bridge.commands.program_loader import ProgramLoader
    from dspy_bridge.commands.program_registry import Entry
    from dspy_bridge.dispatch.call import Call
    from dspy_bridge.optimizing.arguments import Optimize


def read(args: dict[str, Any]) -> Optimize | None:
    """The argument `optimize` of an `execute_program`, if there is one. Raises `InvalidArgs`."""
    if args.get("optimize") is None:
        return None
    from dspy_bridge.optimizing import arguments

    return arguments.read(args["optimize"])


class Optimizations:
    """Those under way."""

    def __init__(self, most: int, loader: ProgramLoader) -> None:
        self._most = most
        self._loader = loader
        self._threads = WorkerThreads()
        self._running = 0

    def added_to(self, counts: dict[str, int]) -> dict[str, int]:
        """Counts of `WorkerThreads`, with the optimizers' threads that run or are abandoned."""
        own = self._threads.counts()
        return {**counts, **{name: counts[name] + own[name] for name in ("running", "abandoned")}}

    async def run(self, entry: Entry, how: Optimize, args: dict[str, Any], call: Call) -> dict[str, Any]:
        """As `optimizing.optimization.run`. The call's slot is free meanwhile."""
        if self._running >= self._most:
            raise Overloaded(f"{self._running} programs are being optimized: DSPY_BRIDGE_MAX_OPTIMIZES is {self._most}")
        self._running += 1
        limiter = call.limiter
        call.slot_transferred = True
        limiter.release()
        try:
            from dspy_bridge.optimizing import optimization

            # Optimizers change the program that they are given.
            program = await self._loader.build(entry.definition)
            return await optimization.run(
                how,
                program,
                args["metric"],
                args["inputs"],
                args.get("expected"),
                args.get("lm"),
                call,
                limiter,
                self._threads,
                stream=call.request.stream,
            )
        finally:
            self._running -= 1
            self._loader.removed(1)
