"""An LM whose sync calls, made in a thread, run on the event loop: there they can stream and be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals, journal, lm_call
from dspy_bridge.runtime import event_loop

_PARAMS = {
    "response_schema": ("response_format",),
    "function_calling": ("tools", "tool_choice", "parallel_tool_calls"),
    "reasoning": ("reasoning_effort",),
}


def _support(capability: str) -> property:
    """As `dspy.LM`'s property, unless the option says it."""

    def supported(lm: LoopLM) -> bool:
        known = lm.supports
        return bool(getattr(super(LoopLM, lm), f"supports_{capability}") if known is None else capability in known)

    return property(supported)


class LoopLM(dspy.LM):  # type: ignore[misc]  # DSPy ships no types
    """A `dspy.LM` that is called within the limits of its account."""

    # What the server can do, of `lm_options.CAPABILITIES`; None: what DSPy knows by the model's name.
    supports: frozenset[str] | None = None
    # Set by who makes it.
    target: lm_call.Target | None = None

    def __deepcopy__(self, _memo: object) -> LoopLM:
        # A copy of a program has the same LM: another one would open connections of its own.
        return self

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        run, ticket = lm_call.run(), None
        if run.journal is not None:
            ticket = run.journal.ticket(run.item, self, prompt, messages, kwargs)
        async with run.slot() or nullcontext():
            with lm_call.of(self.target, ticket):
                return await super().acall(prompt, messages=messages, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _on_loop(self.acall, *args, **kwargs)

    supports_function_calling = _support("function_calling")
    supports_reasoning = _support("reasoning")
    supports_response_schema = _support("response_schema")

    @property
    def supported_params(self) -> set[str]:
        """As `dspy.LM`'s. A server without schemas may still have JSON mode, also a `response_format`."""
        params = set(super().supported_params)
        if self.supports is None:
            return params
        for capability, names in _PARAMS.items():
            if capability in self.supports:
                params.update(names)
            elif capability != "response_schema" or not self.supports:
                params.difference_update(names)
        return params


def _on_loop(work: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    event_loop.refuse_sync_call()
    call, job, loop = work(*args, **kwargs), lm_call.job(), lm_call.main_loop()
    if job is not None:
        return job.on_loop(call, lm=True)
    # In a thread that a module started without its context.
    return asyncio.run(call) if loop is None else asyncio.run_coroutine_threadsafe(call, loop).result()


@dspy_internals.ASYNC_CALL.replace
async def _aexecute(lm: Any, call: Any) -> Any:
    """Each call of an LM: replayed or recorded, if its run has a journal."""
    run = lm_call.run()
    if run.journal is None:
        return await _asked(lm, call, run)
    recording = journal.Recording(lm, call, run)
    if (entry := await recording.begin()) is not None:
        return await recording.replay(entry)
    try:
        result = await _asked(lm, call, run)
    except Exception as error:
        await recording.failed(error)
        raise
    else:
        await recording.answered(result)
        return result
    finally:
        recording.close()


async def _asked(lm: Any, call: Any, run: lm_call.RunContext) -> Any:
    if run.budget is None or _is_of_dspy(lm, call):
        return await dspy_internals.ASYNC_CALL.value(lm, call)
    await run.begin_request()
    try:
        return await dspy_internals.ASYNC_CALL.value(lm, call)
    finally:
        run.end_request(sent=True)


def _is_of_dspy(lm: Any, call: Any) -> bool:
    """Whether DSPy's own engine or LiteLLM asks: `transport` counts their requests."""
    return call.managed and isinstance(lm.engine, str) and dspy_internals.TRANSPORT.there


@dspy_internals.CALL.replace
def _execute(lm: Any, call: Any) -> Any:
    """Sync calls of LMs that your application made come to the event loop, too."""
    # An engine of its own may have no async counterpart, and so may a `forward`.
    if call.managed and isinstance(lm.engine, str) and dspy_internals.ASYNC_CALL.there:
        return _on_loop(_aexecute, lm, call)
    run = lm_call.run()
    if run.journal is None:
        return _asked_here(lm, call, run)
    recording = journal.Recording(lm, call, run)
    if (entry := _on_loop(recording.begin)) is not None:
        return _on_loop(recording.replay, entry)
    try:
        result = _asked_here(lm, call, run)
    except Exception as error:
        _on_loop(recording.failed, error)
        raise
    else:
        _on_loop(recording.answered, result)
        return result
    finally:
        recording.close()


def _asked_here(lm: Any, call: Any, run: lm_call.RunContext) -> Any:
    if run.budget is None:
        return dspy_internals.CALL.value(lm, call)
    _on_loop(run.begin_request)
    try:
        return dspy_internals.CALL.value(lm, call)
    finally:
        run.end_request(sent=True)


@dspy_internals.EXECUTE.replace
def _execute_all(executor: Any, function: Any, data: Any) -> Any:
    """DSPy's executor runs a batch, `dspy.Parallel` and evaluations in threads and waits for them."""
    event_loop.refuse_sync_call()
    if lm_call.run().examples_once:
        # DSPy runs the last ones again that take 120 s. A bar that is not finished is drawn by another thread, or by
        # the garbage collector, which nobody can tell from the application's own output.
        executor.timeout = 0
        executor.disable_progress_bar = True
    return dspy_internals.EXECUTE.value(executor, function, data)
