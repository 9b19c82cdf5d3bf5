"""How a program's module is called: on the event loop where it can, in a worker thread where it is sync. Imports DSPy."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import dspy

from dspy_bridge import sync_threads
from dspy_bridge.errors import InvalidArgs, OutputInvalid
from dspy_bridge.rewards import Reward
from dspy_bridge.sync_threads import THREADS
from dspy_bridge.tools import HostTool


class Runner:
    """One module and its calls, which may overlap: DSPy's modules keep no state of a call.

    `extra`: names of inputs that are not the signature's.
    """

    extra: tuple[str, ...] = ()

    def __init__(self, module: dspy.Module, *, takes_config: bool = True) -> None:
        self.module = module
        self.takes_config = takes_config

    def check(self, inputs: dict[str, Any]) -> None:
        """Check the extra inputs, before any LM is asked. Raises `InvalidArgs`."""

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The adapter for a call, where one of the program's own was chosen or DSPy's default will not do."""
        return chosen

    async def run(self, values: dict[str, Any]) -> Any:
        """One call; gives the prediction."""
        module = self.module
        if hasattr(module, "aforward"):
            return await module.acall(**values)
        return await THREADS.run(lambda: module(**values))


class ToolCallRunner(Runner):
    """Predict or ChainOfThought with tools: the LM says which to call, natively where it can, and they are called."""

    def __init__(self, kind: Any, signature: type[dspy.Signature], callers: list[HostTool]) -> None:
        for name in ("tools", "tool_calls"):
            if name in signature.fields:
                raise InvalidArgs(f"signature: with tools, the field {name!r} is DSPy's; choose another name")
        signature = signature.append("tools", dspy.InputField(), list[dspy.Tool])
        signature = signature.append("tool_calls", dspy.OutputField(), dspy.ToolCalls)
        super().__init__(kind(signature))
        self._tools = {tool.name: tool for tool in callers}

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """Native function calling is the adapter's to ask for."""
        kind = type(chosen or dspy.settings.adapter or dspy.ChatAdapter())
        if kind in (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter):
            return kind(use_native_function_calling=True)
        return chosen

    async def run(self, values: dict[str, Any]) -> Any:
        """The prediction, its `tool_calls` with the results; those of one answer run at once."""
        prediction = await super().run({**values, "tools": list(self._tools.values())})
        asked = prediction.get("tool_calls")
        calls = [] if asked is None else asked.tool_calls
        prediction.tool_calls = await asyncio.gather(*(self._call(call.name, call.args) for call in calls))
        return prediction

    async def _call(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        called = {"name": name, "args": args}
        tool = self._tools.get(name)
        if tool is None:
            return {**called, "error": f"there is no tool {name}"}
        try:
            return {**called, "result": await tool.acall(**args)}
        except Exception as error:  # an observation, as in ReAct: what the LM got wrong fails nothing else
            return {**called, "error": str(error)}


class ComparisonRunner(Runner):
    """MultiChainComparison: answers that there are already are compared."""

    extra = ("completions",)

    def check(self, inputs: dict[str, Any]) -> None:
        """`completions`: as many as M, each with its reasoning and its answer."""
        completions = inputs.get("completions")
        answer = self.module.last_key
        wanted = f"inputs.completions: expected a list of {self.module.M} objects with reasoning and {answer}"
        if not isinstance(completions, list) or len(completions) != self.module.M:
            raise InvalidArgs(wanted)
        for completion in completions:
            if not isinstance(completion, dict) or answer not in completion:
                raise InvalidArgs(wanted)
            if not isinstance(completion.get("rationale", completion.get("reasoning")), str):
                raise InvalidArgs(wanted)


class CodeRunner(Runner):
    """Modules that run code in a sandbox: always in a thread, since they wait for it there."""

    async def run(self, values: dict[str, Any]) -> Any:
        """As `Runner`'s; giving up ends the sandbox, too."""
        factory = dspy.settings.get("interpreter_factory") or dspy.PythonInterpreter

        def make() -> Any:
            interpreter = factory()
            job = sync_threads.current.get()
            if job is not None:
                job.on_give_up(lambda: _end(interpreter))
            return interpreter

        # RLM tells its LM what the sandbox can do.
        make.execution_instructions = getattr(factory, "execution_instructions", "")  # type: ignore[attr-defined]
        # Fields that may be absent are None for code.
        values = {**dict.fromkeys(self.module.signature.input_fields), **values}
        with dspy.context(interpreter_factory=make):
            return await THREADS.run(lambda: self.module(**values))


def _end(interpreter: Any) -> None:
    """From another thread than its own, which waits for it and goes on when its process is gone."""
    process = getattr(interpreter, "deno_process", None)
    if process is not None:
        process.kill()
    elif not isinstance(interpreter, dspy.PythonInterpreter):
        interpreter.shutdown()


class BestRunner(Runner):
    """BestOfN or Refine: a new one for each call, since they count failures in themselves."""

    def __init__(self, kind: Any, inner: dspy.Module, reward: Reward, chosen: dict[str, Any]) -> None:
        self._kind = kind
        self._inner = inner
        self._reward = reward
        self._chosen = chosen
        # Its predictors, and so its state, are the inner module's.
        super().__init__(self._made(inner, reward))

    async def run(self, values: dict[str, Any]) -> Any:
        """The best prediction; if there is none, the last failure is raised."""
        failures = _Failures()
        module = self._made(_Attempt(self._inner, failures), lambda *args: _guarded(failures, self._reward, *args))
        # DSPy adds to the trace whatever the setting; None, which keeps it from growing, would be a TypeError.
        with dspy.context(trace=[]):
            prediction = await THREADS.run(lambda: module(**values))
        if prediction is None:
            raise failures[-1] if failures else OutputInvalid("no attempt gave an answer")
        return prediction

    def _made(self, inner: dspy.Module, reward: Any) -> dspy.Module:
        # A function whose source Refine can find; what the LM is told of it follows.
        made = self._kind(module=inner, reward_fn=lambda inputs, prediction: reward(inputs, prediction), **self._chosen)
        if hasattr(made, "reward_fn_code"):
            made.module_code = inspect.getsource(type(self._inner))
            made.reward_fn_code = self._reward.text
        return made


class _Failures(list[Exception]):
    """What went wrong; shared by the copies that DSPy makes of a module for each attempt."""

    def __deepcopy__(self, _memo: object) -> _Failures:
        return self


class _Attempt(dspy.Module):  # type: ignore[misc]  # DSPy ships no types
    """DSPy prints why an attempt failed: the text, which may hold contents, is kept here, out of the log."""

    def __init__(self, inner: dspy.Module, failures: _Failures) -> None:
        super().__init__()
        self.inner = inner
        self.failures = failures

    def forward(self, **values: Any) -> Any:
        return _guarded(self.failures, self.inner, **values)


def _guarded(failures: _Failures, work: Any, *args: Any, **values: Any) -> Any:
    try:
        return work(*args, **values)
    except Exception as error:
        failures.append(error)
        raise RuntimeError(type(error).__name__) from None
