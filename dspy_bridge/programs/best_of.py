"""BestOfN and Refine: their runs, with the reasons of failed attempts kept out of the log. Imports DSPy."""

from __future__ import annotations

import copy
import functools
from typing import Any

import dspy

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import dspy_internals
from dspy_bridge.programs import runners
from dspy_bridge.programs.rewards import Reward
from dspy_bridge.runtime.worker_threads import WorkerThreads


class BestRunner(runners.Runner):
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
