"""Optimizes a program: an evaluation's arguments and `optimize`. So many at once, in threads of their own."""

from __future__ import annotations

from dspy_bridge.errors import InvalidArgs, Overloaded
from dspy_bridge.runtime.worker_threads import WorkerThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dspy_bridge.commands.evaluation import Given as Evaluation
    from dspy_bridge.commands.program_loader import ProgramLoader
    from dspy_bridge.commands.program_registry import Entry
    from dspy_bridge.dispatch.call import Call
    from dspy_bridge.optimizing.arguments import Given as How

# Of an `execute_program`, but of single runs.
_NOT_WITH = ("config", "attempts", "max_concurrency", "item_timeout_ms")


class Given:
    """The arguments of an optimization: `how` is the argument `optimize`, the rest is as for an evaluation."""

    __slots__ = ("evaluation", "how", "inputs")

    def __init__(self, how: How, inputs: list[Any], evaluation: Evaluation) -> None:
        self.how = how
        self.inputs = inputs
        self.evaluation = evaluation


def read(args: dict[str, Any], inputs: dict[str, Any] | list[Any], evaluation: Evaluation | None) -> Given | None:
    """Those among the arguments of an `execute_program`, if it has `optimize`. Raises `InvalidArgs`."""
    if args.get("optimize") is None:
        return None
    if evaluation is None or isinstance(inputs, dict):
        raise InvalidArgs("optimize: only with a list of inputs and a metric")
    for name in _NOT_WITH:
        if args.get(name) is not None:
            raise InvalidArgs(f"{name}: not with optimize; give config with the program")
    from dspy_bridge.optimizing import arguments

    return Given(arguments.read(args["optimize"]), inputs, evaluation)


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

    async def run(self, given: Given, entry: Entry, lm: object, call: Call) -> dict[str, Any]:
        """As `optimizing.optimization.run`. The call's slot is free meanwhile."""
        if self._running >= self._most:
            raise Overloaded(f"{self._running} programs are being optimized: DSPY_BRIDGE_MAX_OPTIMIZES is {self._most}")
        self._running += 1
        limiter = call.services.limiter
        call.slot_transferred = True
        limiter.release()
        try:
            from dspy_bridge.optimizing import optimization

            # Optimizers change the program that they are given.
            program = await self._loader.build(entry.definition)
            return await optimization.run(
                given.how,
                program,
                given.evaluation.metric,
                given.inputs,
                given.evaluation.expected,
                lm,
                call,
                limiter,
                self._threads,
                stream=call.request.stream,
            )
        finally:
            self._running -= 1
            self._loader.removed(1)
