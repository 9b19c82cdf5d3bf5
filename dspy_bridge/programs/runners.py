"""How a program's module is called: on the event loop, or in a worker thread where it is sync. Imports DSPy."""

from __future__ import annotations

import asyncio
import copy
import functools
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, OutputInvalid, SetupFailed
from dspy_bridge.lm import dspy_internals
from dspy_bridge.programs import sandbox
from dspy_bridge.programs.remote_tools import HostTool
from dspy_bridge.programs.rewards import Reward
from dspy_bridge.runtime import large_inputs
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
        """Check the extra inputs, before any LM is asked. Raises `InvalidArgs`."""

    def adapter(self, chosen: dspy.Adapter | None) -> dspy.Adapter | None:
        """The adapter for a call, where one of the program's own was chosen or DSPy's default will not do."""
        return chosen

    @property
    def on_loop(self) -> bool:
        """Whether calls run on the event loop, not in a thread: the large ones of DSPy's modules never do."""
        return hasattr(self.module, "aforward") and not large_inputs.here.get()

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """One call; gives the prediction. Sync modules run in one of `threads`, with DSPy's context of now."""
        module = self.module
        if self.on_loop:
            return await module.acall(**values)
        return await threads.run(lambda: module(**values))


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
        """Native function calling is the adapter's to ask for, where the LM has it."""
        adapter = copy.copy(chosen or dspy.settings.adapter or dspy.ChatAdapter())
        adapter.use_native_function_calling = True
        return adapter

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """The prediction, its `tool_calls` with the results; those of one answer run at once."""
        prediction = await super().run({**values, "tools": list(self._tools.values())}, threads)
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

    def __init__(self, module: dspy.Module, answer: str, count: int) -> None:
        """`answer`: the output that is compared; `count`: how many answers DSPy wants."""
        super().__init__(module)
        self._answer, self._count = answer, count

    def check(self, inputs: dict[str, Any]) -> None:
        """`completions`: as many as M, each with its reasoning and its answer."""
        completions = inputs.get("completions")
        wanted = f"inputs.completions: expected a list of {self._count} objects with reasoning and {self._answer}"
        if not isinstance(completions, list) or len(completions) != self._count:
            raise InvalidArgs(wanted)
        for completion in completions:
            if not isinstance(completion, dict) or self._answer not in completion:
                raise InvalidArgs(wanted)
            if not isinstance(completion.get("rationale", completion.get("reasoning")), str):
                raise InvalidArgs(wanted)


class CodeRunner(Runner):
    """Modules that run code: always in a thread, since they wait for their sandbox there."""

    on_loop = False

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """As `Runner`'s; a cancelled call ends its sandbox, too."""

        def work() -> Any:
            ending = sandbox.Ending()
            sandbox.current.set(ending)
            try:
                return self.module(**values)
            finally:
                ending.returned.set()

        # Fields that may be absent are None for code.
        values = {**dict.fromkeys(self.module.signature.input_fields), **values}
        try:
            return await threads.run(work)
        except dspy.CodeInterpreterError as error:
            raise SetupFailed(f"the sandbox for the LM's code failed: {error}") from error
        except RuntimeError as error:
            # ProgramOfThought has no type of its own for it.
            if not str(error).startswith(dspy_internals.NO_MORE_HOPS):
                raise
            raise OutputInvalid(f"the code that the LM wrote failed each time: {error}") from error


class BestRunner(Runner):
    """BestOfN or Refine: a copy of it for each call, since they count failures in themselves."""

    def __init__(self, kind: Any, inner: dspy.Module, reward: Reward, chosen: dict[str, Any]) -> None:
        self._inner = inner
        self._reward = reward
        made = (
            kind(module=inner, reward_fn=reward, **chosen) if kind is dspy.BestOfN else _refine(inner, reward, chosen)
        )
        # Its predictors, and so its state, are the inner module's.
        super().__init__(made)

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """The best prediction; if there is none, the last failure is raised."""
        failures = _Failures()
        module = copy.copy(self.module)
        module.module = _Attempt(self._inner, failures)
        module.reward_fn = lambda *args: _guarded(failures, self._reward, *args)
        adapter = _without_advice_in_errors(dspy.settings.adapter or dspy.ChatAdapter(), failures)
        # DSPy adds to the trace whatever the setting; None, which keeps it from growing, would be a TypeError.
        with dspy.context(trace=[], adapter=adapter):
            try:
                prediction = await threads.run(lambda: module(**values))
            except _Failed:
                raise failures[-1] from None
        if prediction is None:
            raise failures[-1] if failures else OutputInvalid("no attempt gave an answer")
        return prediction


def _refine(inner: dspy.Module, reward: Reward, chosen: dict[str, Any]) -> dspy.Module:
    kind: Any = type(inner)
    made = copy.copy(_refine_of(kind))
    made.module, made.threshold, made.N = inner, chosen["threshold"], chosen["N"]
    made.fail_count = chosen.get("fail_count", made.N)
    made.reward_fn_code = reward.text
    return made


@functools.cache
def _refine_of(kind: Any) -> dspy.Module:
    """A Refine that has read the source of its module's class. That parses whole files: 10 ms or more each time."""

    def reward(_inputs: Any, _prediction: Any) -> float:
        """Refine wants the source of a reward, too."""
        return 0.0

    while True:
        try:
            return dspy.Refine(
                module=kind("question -> answer", **_NEEDED.get(kind, {})), N=1, reward_fn=reward, threshold=1.0
            )
        except SystemError:
            continue  # another thread parses, too: python/cpython issue 106905, in 3.11 and before


# What a constructor wants beside a signature.
_NEEDED: dict[type, dict[str, Any]] = {dspy.ReAct: {"tools": []}}


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


class _Failed(Exception):
    """What DSPy sees of a failure that is kept elsewhere."""


def _guarded(failures: _Failures, work: Any, /, *args: Any, **values: Any) -> Any:
    # A signature's input may have any name, also that of a parameter here.
    try:
        return work(*args, **values)
    except Exception as error:
        failures.append(error)
        raise _Failed(type(error).__name__) from None


def _without_advice_in_errors(adapter: dspy.Adapter, failures: _Failures) -> dspy.Adapter:
    """The same for the LM call of Refine's own, whose failures DSPy prints too."""

    class Guarded(type(adapter)):  # type: ignore[misc]  # DSPy ships no types
        # Refine makes another of the same class, without arguments.
        def __init__(self) -> None:
            self.__dict__.update(adapter.__dict__)

        def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            if signature is dspy_internals.OFFER_FEEDBACK.value:
                return _guarded(failures, adapter, lm, lm_kwargs, signature, demos, inputs)
            return adapter(lm, lm_kwargs, signature, demos, inputs)

    return Guarded()
