"""Runners call a program's module: on the event loop, or in a worker thread if it is sync. Imports DSPy."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, SetupFailed
from dspy_bridge.programs import sandbox
from dspy_bridge.programs.remote_tools import RemoteTool
from dspy_bridge.runtime import large_inputs, worker_threads
from dspy_bridge.runtime.worker_threads import WorkerThreads


class Runner:
    """One module and its calls, which may overlap: DSPy's modules keep no state of a call.

    `extra`: names of inputs that are not the signature's.
    """

    extra: tuple[str, ...] = ()

    def __init__(self, module: dspy.Module, *, takes_config: bool = True) -> None:
        self.module = module
        self.takes_config = takes_config

    def check(self, inputs: dict[str, Any]) -> None:
        """Check the extra inputs before any LM call. Raises `InvalidArgs`."""

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The adapter for a call; None for DSPy's default. `chosen`: the program's own."""
        return chosen

    @property
    def on_loop(self) -> bool:
        """Whether calls run on the event loop. Calls with large inputs run in a thread."""
        return hasattr(self.module, "aforward") and not large_inputs.here.get()

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """One call; returns the prediction."""
        module = self.module
        if self.on_loop:
            return await module.acall(**values)
        return await threads.run(lambda: module(**values))

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        """The `forward` of a program that is optimized: `module`, one of many copies, in one of DSPy's threads.

        `kind`: the class whose `forward` does the work.
        """
        if hasattr(kind, "forward"):
            return kind.forward(module, **values)
        job = worker_threads.current.get()
        assert job is not None, "optimizations run in worker threads"
        return job.on_loop(_run_async(kind, module, values))


async def _run_async(kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
    # On the event loop a sync call would wait for this very loop, if it went by the job.
    worker_threads.current.set(None)
    return await kind.aforward(module, **values)


class ToolCallRunner(Runner):
    """Predict or ChainOfThought with tools: runs the tool calls of the LM's answer, native ones if the LM has them."""

    def __init__(self, kind: Any, signature: type[dspy.Signature], tools: list[RemoteTool]) -> None:
        for name in ("tools", "tool_calls"):
            if name in signature.fields:
                raise InvalidArgs(f"signature: with tools, the field {name!r} is DSPy's; choose another name")
        signature = signature.append("tools", dspy.InputField(), list[dspy.Tool])
        signature = signature.append("tool_calls", dspy.OutputField(), dspy.ToolCalls)
        super().__init__(kind(signature))
        self._tools = {tool.name: tool for tool in tools}

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The chosen adapter with native function calling, which it uses if the LM has it."""
        adapter = copy.copy(chosen or dspy.settings.adapter or dspy.ChatAdapter())
        adapter.use_native_function_calling = True
        return adapter

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """The prediction, with results in its `tool_calls`; these run concurrently."""
        prediction = await super().run({**values, "tools": list(self._tools.values())}, threads)
        prediction.tool_calls = await self._results(prediction)
        return prediction

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        """As `Runner`'s. Tools are not a part of what demos are made of."""
        prediction = kind.forward(module, **values, tools=list(self._tools.values()))
        for _predictor, inputs, _outputs in (dspy.settings.trace or [])[-1:]:
            inputs.pop("tools", None)
        job = worker_threads.current.get()
        assert job is not None, "optimizations run in worker threads"
        # Not into this one, which the trace has.
        prediction = dspy.Prediction(**prediction)
        prediction.tool_calls = job.on_loop(self._results(prediction))
        return prediction

    async def _results(self, prediction: dspy.Prediction) -> list[dict[str, Any]]:
        asked = prediction.get("tool_calls")
        calls = [] if asked is None else asked.tool_calls
        return await asyncio.gather(*(self._call(call.name, call.args) for call in calls))

    async def _call(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        called = {"name": name, "args": args}
        tool = self._tools.get(name)
        if tool is None:
            return {**called, "error": f"there is no tool {name}"}
        try:
            return {**called, "result": await tool.acall(**args)}
        except Exception as error:  # an observation, as in ReAct: the other calls go on
            return {**called, "error": str(error)}


class ComparisonRunner(Runner):
    """MultiChainComparison: compares given completions."""

    extra = ("completions",)

    def __init__(self, module: dspy.Module, answer: str, count: int) -> None:
        """`answer`: the output that is compared; `count`: how many completions DSPy wants."""
        super().__init__(module)
        self._answer, self._count = answer, count

    def check(self, inputs: dict[str, Any]) -> None:
        """`completions` must be M objects, each with reasoning and answer."""
        completions = inputs.get("completions")
        if (
            not isinstance(completions, list)
            or len(completions) != self._count
            or not all(
                isinstance(one, dict)
                and self._answer in one
                and isinstance(one.get("rationale", one.get("reasoning")), str)
                for one in completions
            )
        ):
            raise InvalidArgs(
                f"inputs.completions: expected a list of {self._count} objects with reasoning and {self._answer}"
            )


class CodeRunner(Runner):
    """RLM, which runs code: always in a thread, where it waits for its sandbox."""

    on_loop = False

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """As `Runner`'s; a cancelled call ends its sandbox, too."""

        # The code sees None for absent inputs.
        values = {**dict.fromkeys(self.module.signature.input_fields), **values}
        return await threads.run(lambda: _in_sandbox(lambda: self.module(**values)))

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        """As `Runner`'s."""
        values = {**dict.fromkeys(self.module.signature.input_fields), **values}
        return _in_sandbox(lambda: kind.forward(module, **values))


def _in_sandbox(work: Callable[[], Any]) -> Any:
    ending = sandbox.Ending()
    token = sandbox.current.set(ending)
    try:
        return work()
    except dspy.CodeInterpreterError as error:
        raise SetupFailed(f"the sandbox for the LM's code failed: {error}") from error
    finally:
        sandbox.current.reset(token)
        ending.returned.set()
