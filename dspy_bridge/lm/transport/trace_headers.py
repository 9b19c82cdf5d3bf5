"""Puts the `traceparent` of a run into the HTTP requests of its LM calls, sends them as the limits of their account
allow, limits the time that connecting takes, and counts what is read of their answers.

DSPy has no place for a header of one call: an LM's options are part of the cache's key, so the cache would never hit,
and a header among them makes DSPy call LiteLLM in place of its own engine. So the functions that send requests are
wrapped: the transports of DSPy's engine, and where DSPy calls LiteLLM. Every attempt of every LM of DSPy's passes
there, on event loops and in threads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from dspy_bridge import tracing
from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import admission, answer_limit, connecting, routes
from dspy_bridge.lm.transport.litellm_answer_limit import limiting
from dspy_bridge.lm.transport.litellm_loading import after_import, streaming_after_import


def install() -> None:
    """Wrap them, once in a process."""
    dspy_internals.TRANSPORT.wrap(functools.partial(_sending, _open))
    dspy_internals.ASYNC_TRANSPORT.wrap(functools.partial(_sending, answer_limit.Counted))
    for call in dspy_internals.LITELLM_CALLS:
        call.wrap(lambda send: _calling(limiting(send)))
    for call in dspy_internals.ASYNC_LITELLM_CALLS:
        call.wrap(lambda send: after_import(_calling(limiting(send))))
    for arguments in dspy_internals.LITELLM_ARGUMENTS:
        arguments.wrap(_arguments)
    dspy_internals.LITELLM_ENGINE.wrap(limiting)
    dspy_internals.ASYNC_LITELLM_ENGINE.wrap(lambda complete: after_import(limiting(complete)))
    dspy_internals.ASYNC_LITELLM_STREAM.wrap(streaming_after_import)


def _open(opening: Callable[[float | None], Any], url: str) -> Any:
    leave = admission.admit_in_thread()
    try:
        return answer_limit.counted(connecting.connect(opening, url, connecting.failures()), leave)
    except BaseException:
        leave()
        raise


def _sending(send_to: Callable[..., Any], stream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stream)
    def send(self: Any, request: Any) -> Any:
        changes: dict[str, Any] = {}
        if (traceparent := tracing.current()) is not None:
            # The only one: an LM with headers of its own goes through LiteLLM.
            changes["headers"] = [*request.headers, (tracing.TRACEPARENT, traceparent)]

        def opening(seconds: float | None) -> Any:
            timeout = {} if seconds is None else {"connect_timeout": seconds}
            changed = {**changes, **timeout}
            return stream(self, dataclasses.replace(request, **changed) if changed else request)

        return send_to(opening, request.url)

    return send


def _calling(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def send(request: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        routes.refuse_elsewhere(request)
        return call(_with_header(request), *args, **kwargs)

    return send


def _arguments(arguments: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(arguments)
    def add_header(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = arguments(self, *args, **kwargs)
        routes.refuse_elsewhere(given)
        return _with_header(given)

    return add_header


def _with_header(options: dict[str, Any]) -> dict[str, Any]:
    """LiteLLM's keyword arguments with the header, which replaces one of the LM's own.

    It goes into `headers`, not `extra_headers`: those LiteLLM also puts into the body that some providers get.
    """
    traceparent = tracing.current()
    if traceparent is None:
        return options
    changed = {**options, "headers": options.get("headers") or {}}
    for key in ("headers", "extra_headers"):
        # Anything but a dict is LiteLLM's to refuse.
        if isinstance(given := changed.get(key), dict):
            changed[key] = {name: value for name, value in given.items() if name.lower() != tracing.TRACEPARENT}
    if isinstance(headers := changed["headers"], dict):
        headers[tracing.TRACEPARENT] = traceparent
    return changed
