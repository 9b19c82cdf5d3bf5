"""Runners call a program's module: on the event loop, or in a worker thread if it is sync. Imports DSPy."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, OutputInvalid, SetupFailed
from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.adapters import choice
from dspy_bridge.programs.remote_tools import RemoteTool
from dspy_bridge.programs.scores import Reward
from dspy_bridge.runtime import large_inputs, worker_threads
from dspy_bridge.runtime.worker_threads import WorkerThreads


class Runner:
    """One module and its calls, which may overlap: DSPy's modules keep no state of a call."""

    # Whether the program's adapter calls tools natively, if its definition does not say; None for DSPy's default.
    native_tools: bool | None = None

    def __init__(
        self, module: dspy.Module, *, takes_config: bool = True, one_answer: str | None = "of this program type"
    ) -> None:
        """`one_answer`: why a run gives one answer, however many the LM is asked for; None if it gives all."""
        self.module = module
        self.takes_config = takes_config
        self.one_answer = one_answer

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The adapter for a call; None for DSPy's default. `chosen`: the program's own."""
        return chosen

    @property
    def on_loop(self) -> bool:
        """Whether calls run on the event loop. Calls with large inputs run in a thread."""
        return hasattr(self.module, "aforward") and not large_inputs.here.get()

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
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

        async def on_loop() -> Any:
            # A sync call there would wait for this very loop, if it went by the job.
            worker_threads.current.set(None)
            return await kind.aforward(module, **values)

        return worker_threads.current_job().on_loop(on_loop())


class ToolCallRunner(Runner):
    """Predict or ChainOfThought with tools: runs the tool calls of the LM's answer, native ones if the LM has them."""

    native_tools = True

    def __init__(self, kind: Any, signature: type[dspy.Signature], tools: list[RemoteTool]) -> None:
        if taken := [name for name in ("tools", "tool_calls") if name in signature.fields]:
            raise InvalidArgs(f"signature: with tools, the field {taken[0]!r} is DSPy's; choose another name")
        signature = signature.append("tools", dspy.InputField(), list[dspy.Tool])
        signature = signature.append("tool_calls", dspy.OutputField(), dspy.ToolCalls)
        super().__init__(kind(signature), one_answer="with tools")
        self._tools = {tool.name: tool for tool in tools}

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The default adapter with native function calling, too, which it uses if the LM has it."""
        if chosen is None:
            chosen = copy.copy(choice.default())
            chosen.use_native_function_calling = True
        return chosen

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
        # Not into this one, which the trace has.
        prediction = dspy.Prediction(**prediction)
        prediction.tool_calls = worker_threads.current_job().on_loop(self._results(prediction))
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


class ScoredRunner(Runner):
    """BestOfN or Refine: several attempts, of which the reward chooses one."""

    def __init__(self, kind: Any, inner: dspy.Module, reward: Reward, chosen: dict[str, Any]) -> None:
        dspy_internals.silence_attempts()
        self._reward = reward
        made = kind(module=inner, reward_fn=reward, **chosen)
        # Refine would show its LM the source of the class.
        made.reward_fn_code = reward.text
        # Its predictors and its state are those of the inner module.
        super().__init__(made)

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """Refine makes another one of its class, without arguments; a two-step adapter has one."""
        if not isinstance(chosen, dspy.TwoStepAdapter):
            return chosen
        again = {"__init__": lambda self: self.__dict__.update(chosen.__dict__)}
        return type("TwoStepAdapter", (dspy.TwoStepAdapter,), again)()

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """The best prediction; raises the last failure if there is none."""
        # DSPy appends to the trace even if it is off: None would be a TypeError.
        with dspy.context(trace=[]):
            return await threads.run(lambda: self.forward(type(self.module), self.module, values))

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        """As `Runner`'s: with a copy for each call, since DSPy's objects count their failures."""
        failures: list[Exception] = []

        # Positional only: an input may have any name.
        def noting(work: Any, /, *args: Any, **values: Any) -> Any:
            try:
                return work(*args, **values)
            except Exception as error:
                failures.append(error)
                raise

        made = copy.copy(module)
        made.module = _Attempt(module.module, noting)
        made.reward_fn = functools.partial(noting, self._reward)
        # What optimizers run has been called already, so DSPy's callbacks have seen it.
        prediction = made(**values) if kind is type(module) else kind.forward(made, **values)
        if prediction is None:
            raise failures[-1] if failures else OutputInvalid("no attempt gave an answer")
        return prediction


class _Attempt(dspy.Module):  # type: ignore[misc]  # DSPy ships no types
    """Its errors, which DSPy drops, are noted. DSPy copies it for each attempt, but no functions."""

    def __init__(self, inner: dspy.Module, noting: Any) -> None:
        super().__init__()
        self.inner = inner
        self.noting = noting

    def forward(self, **values: Any) -> Any:
        return self.noting(self.inner, **values)


class CodeRunner(Runner):
    """RLM, which runs code: always in a thread, where it waits for its sandbox, which ends with the call."""

    on_loop = False

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """As `Runner`'s; a cancelled call ends its sandbox, too."""
        return await threads.run(lambda: self._in_sandbox(self.module, values))

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        return self._in_sandbox(functools.partial(kind.forward, module), values)

    def _in_sandbox(self, work: Callable[..., Any], values: dict[str, Any]) -> Any:
        token = _returned.set(threading.Event())
        try:
            # The code sees None for absent inputs.
            return work(**{**dict.fromkeys(self.module.signature.input_fields), **values})
        except dspy.CodeInterpreterError as error:
            raise SetupFailed(f"the sandbox for the LM's code failed: {error}") from error
        finally:
            _returned.get().set()
            _returned.reset(token)


# Set once the call of an RLM in this context has returned: nothing is left to end.
_returned: ContextVar[threading.Event] = ContextVar("returned")
# In seconds. A sandbox that is starting has no process to kill yet.
_KILL_AGAIN = 0.05


class Sandboxes:
    """Creates the interpreters of an RLM, of the kind that `dspy.configure(interpreter_factory=…)` chose."""

    @property
    def execution_instructions(self) -> str:
        """The sentence about the sandbox in RLM's prompt."""
        return str(getattr(self._chosen(), "execution_instructions", ""))

    def __call__(self) -> Any:
        interpreter, returned = self._chosen()(), _returned.get()
        if not isinstance(interpreter, dspy.PythonInterpreter):
            # Others, as DSPy's LocalInterpreter, cannot be ended while they start.
            interpreter.start()
        thread = threading.Thread(target=_end, args=(interpreter, returned), daemon=True)
        worker_threads.current_job().on_give_up(thread.start)
        return interpreter

    @staticmethod
    def _chosen() -> Any:
        return dspy.settings.get("interpreter_factory") or dspy.PythonInterpreter


def _end(interpreter: Any, returned: threading.Event) -> None:
    while not returned.is_set():
        if isinstance(interpreter, dspy.PythonInterpreter):
            # Its `shutdown` sends a message, which a busy sandbox does not read.
            process = getattr(interpreter, "deno_process", None)
            if process is not None:
                process.kill()
        else:
            with contextlib.suppress(Exception):  # user code; no caller is left
                interpreter.shutdown()
        returned.wait(_KILL_AGAIN)
