"""Puts the `traceparent` of an execute into the HTTP requests of its LM calls. Imports DSPy.

DSPy has no place for a header of one call. Among an LM's options it would be part of the cache's key, so that the cache
would never hit, and would have LiteLLM called instead of DSPy's own engine. So it is added where a request goes out,
behind the cache and the history: in the transports of DSPy's engine, and where DSPy calls LiteLLM. There each attempt
comes by, of every LM that is DSPy's, on the event loop and in threads. In the same places its answer is counted
(`answer_limit`). None of these is public: should a DSPy name one otherwise, the tests fail, and a peer says so and goes
without both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from dspy._vendor.lm15.transports import StdlibAsyncTransport, StdlibTransport
from dspy.clients import lm as dspy_lm
from dspy.clients.engines import AsyncLiteLLMEngine, LiteLLMEngine

from dspy_bridge import tracing
from dspy_bridge.lm import answer_limit, litellm_answer_limit

_LITELLM_CALLS = [
    prefix + suffix
    for prefix in ("litellm_", "alitellm_")
    for suffix in ("completion", "text_completion", "responses_completion")
]


@functools.cache
def install() -> None:
    """Does it; once in a process. All of it or nothing: raises `AttributeError` first."""
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (StdlibTransport, "stream", functools.partial(_sending, answer_limit.counted)),
        (StdlibAsyncTransport, "stream", functools.partial(_sending, answer_limit.Counted)),
        *((dspy_lm, name, _calling) for name in _LITELLM_CALLS),
        # Of calls with a typed `Request`, as a host's own module may make them.
        (LiteLLMEngine, "_arguments", _arguments),
        (AsyncLiteLLMEngine, "_arguments", _arguments),
        (LiteLLMEngine, "complete", litellm_answer_limit.limiting),
        (AsyncLiteLLMEngine, "complete", litellm_answer_limit.limiting),
    ]
    for place, name, carrying in [(place, name, wrap(getattr(place, name))) for place, name, wrap in places]:
        setattr(place, name, carrying)


def _sending(count: Callable[[Any], Any], stream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stream)
    def send(self: Any, request: Any) -> Any:
        if (traceparent := tracing.current()) is not None:
            # There is no other of that name: an LM with headers of its own goes through LiteLLM.
            headers = [*request.headers, (tracing.TRACEPARENT, traceparent)]
            request = dataclasses.replace(request, headers=headers)
        return count(stream(self, request))

    return send


def _calling(call: Callable[..., Any]) -> Callable[..., Any]:
    call = litellm_answer_limit.limiting(call)

    @functools.wraps(call)
    def carry(request: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return call(_with_header(request), *args, **kwargs)

    return carry


def _arguments(arguments: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(arguments)
    def carry(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _with_header(arguments(self, *args, **kwargs))

    return carry


def _with_header(options: dict[str, Any]) -> dict[str, Any]:
    """LiteLLM's keyword arguments, with the header. One of the LM's own gives way: that of the call says more.

    Among `headers`, not `extra_headers`: those LiteLLM also puts into the body that some providers get.
    """
    traceparent = tracing.current()
    if traceparent is None:
        return options
    carrying = {**options, "headers": options.get("headers") or {}}
    for key in ("headers", "extra_headers"):
        # What is no dict is LiteLLM's to refuse.
        if isinstance(given := carrying.get(key), dict):
            carrying[key] = {name: value for name, value in given.items() if name.lower() != tracing.TRACEPARENT}
    if isinstance(headers := carrying["headers"], dict):
        headers[tracing.TRACEPARENT] = traceparent
    return carrying
