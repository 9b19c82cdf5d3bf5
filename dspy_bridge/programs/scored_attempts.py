"""Runs BestOfN and Refine, and keeps the errors of their attempts out of the log. Imports DSPy."""

from __future__ import annotations

import copy
from typing import Any

import dspy

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import dspy_internals
from dspy_bridge.programs.runners import Runner
from dspy_bridge.programs.scores import Reward
from dspy_bridge.runtime.worker_threads import WorkerThreads


class BestRunner(Runner):
    """BestOfN or Refine: a copy for each call, since their objects count failures."""

    def __init__(self, kind: Any, inner: dspy.Module, reward: Reward, chosen: dict[str, Any]) -> None:
        self._reward = reward
        made = kind(module=inner, reward_fn=reward, **chosen)
        # Refine would show its LM the source of the class.
        made.reward_fn_code = reward.text
        # Its predictors and its state are those of the inner module.
        super().__init__(made)

    async def run(self, values: dict[str, Any], threads: WorkerThreads) -> Any:
        """The best prediction; raises the last failure if there is none."""
        failures = _Failures()
        module = self._with_guards(self.module, failures)
        # DSPy appends to the trace even if it is off: None would be a TypeError.
        with dspy.context(trace=[], adapter=_guarded_adapter(failures)):
            try:
                return _there(await threads.run(lambda: module(**values)), failures)
            except _Failed:
                raise failures[-1] from None

    def forward(self, kind: Any, module: dspy.Module, values: dict[str, Any]) -> Any:
        """As `Runner`'s."""
        failures = _Failures()
        guarded = self._with_guards(module, failures)
        with dspy.context(adapter=_guarded_adapter(failures)):
            try:
                return _there(kind.forward(guarded, **values), failures)
            except _Failed:
                raise failures[-1] from None

    def _with_guards(self, module: dspy.Module, failures: _Failures) -> dspy.Module:
        """A copy for one call. Its inner module is its own: that of an optimized program differs."""
        guarded = copy.copy(module)
        guarded.module = _Attempt(module.module, failures)
        guarded.reward_fn = lambda *args: _guarded(failures, self._reward, *args)
        return guarded


def _there(prediction: Any, failures: _Failures) -> Any:
    if prediction is None:
        raise failures[-1] if failures else OutputInvalid("no attempt gave an answer")
    return prediction


def _guarded_adapter(failures: _Failures) -> dspy.Adapter:
    return _without_advice_in_errors(dspy.settings.adapter or dspy.ChatAdapter(), failures)


class _Failures(list[Exception]):
    """Shared by the copies that DSPy makes of a module for each attempt."""

    def __deepcopy__(self, _memo: object) -> _Failures:
        return self


class _Attempt(dspy.Module):  # type: ignore[misc]  # DSPy ships no types
    """Collects the errors of attempts. DSPy prints their messages, which may hold contents of requests."""

    def __init__(self, inner: dspy.Module, failures: _Failures) -> None:
        super().__init__()
        self.inner = inner
        self.failures = failures

    def forward(self, **values: Any) -> Any:
        return _guarded(self.failures, self.inner, **values)


class _Failed(Exception):
    """Raised to DSPy in place of a collected error."""


def _guarded(failures: _Failures, work: Any, /, *args: Any, **values: Any) -> Any:
    # Positional only: an input may have any name.
    try:
        return work(*args, **values)
    except Exception as error:
        failures.append(error)
        raise _Failed(type(error).__name__) from None


def _without_advice_in_errors(adapter: dspy.Adapter, failures: _Failures) -> dspy.Adapter:
    """The same for Refine's own LM call, whose errors DSPy prints too."""

    class Guarded(type(adapter)):  # type: ignore[misc]  # DSPy ships no types
        # Refine creates another one of this class, without arguments.
        def __init__(self) -> None:
            self.__dict__.update(adapter.__dict__)

        def __call__(self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
            if signature is dspy_internals.OFFER_FEEDBACK.value:
                return _guarded(failures, adapter, lm, lm_kwargs, signature, demos, inputs)
            return adapter(lm, lm_kwargs, signature, demos, inputs)

    return Guarded()
