"""What happens to each request that LiteLLM sends to an LM, as `outgoing` says for DSPy's own engine; bytes are not
counted.

LiteLLM's import takes seconds, so it is done in a thread before a call needs it: DSPy would do it in the middle of the
first call, on the event loop, where every other call and every deadline would wait for it. LiteLLM sends with httpx,
or httpx2 for OpenAI's clients, whose `send` is wrapped.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import importlib
import importlib.util
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import dspy

from dspy_bridge import tracing
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.lm_call import LMCall
from dspy_bridge.lm.transport import outgoing, routes
from dspy_bridge.logs import redaction
from dspy_bridge.runtime.daemon_threads import DaemonThreads

# One at a time.
_importing = DaemonThreads(1, "dspy_bridge-litellm")


@dspy_internals.LITELLM_ENGINE.replace
class _Engine(dspy_internals.LITELLM_ENGINE.value or object):  # type: ignore[misc]  # DSPy ships no types
    """That by which DSPy calls LiteLLM."""

    async def complete(self, request: Any) -> Any:
        async with _call(self, request):
            return await super().complete(request)

    async def complete_legacy(self, lm: Any, request: Any, **context: Any) -> Any:
        async with _call(self, request):
            return await super().complete_legacy(lm, request, **context)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        async with _call(self, request), aclosing(super().stream(request)) as events:
            async for event in events:
                yield event


@asynccontextmanager
async def _call(engine: Any, request: Any) -> AsyncIterator[None]:
    # Shielded: a cancelled waiter does not stop the import for the others. The next call tries again what failed.
    if not _import.cache_info().currsize:
        await asyncio.shield(asyncio.wrap_future(start()))
    # The request is an object with all options or a typed `Request`.
    options = {**engine.client_options, **(request if isinstance(request, dict) else {})}
    model = engine.wire_model or options.get("model") or request.model
    routes.refuse_elsewhere(model, options.get("custom_llm_provider"))
    async with outgoing.admitted():
        with _guarded():
            yield


@contextmanager
def _guarded() -> Iterator[None]:
    """Around a call of LiteLLM, whose requests are guarded. Raises our error in place of what LiteLLM makes of it."""
    before = lm_call.current.get()
    call = before or LMCall(None, lm_call.RunContext(None))
    call.by_litellm, call.refused = True, None
    lm_call.current.set(call)
    try:
        yield
    except Exception:
        if call.refused is None:
            raise
    finally:
        lm_call.current.set(before)
    if call.refused is not None:
        raise call.refused


def start() -> Future[None]:
    """Import LiteLLM, unless that is done."""
    return _importing.submit(_import)


@functools.cache
def _import() -> None:
    if not routes.has_litellm():
        raise dspy.LMNotConfiguredError(f"DSPy's own engine does not take this call; {routes.LITELLM}")
    # DSPy imports it lazily: then the module is there, and its first attribute runs it.
    _ = importlib.import_module("litellm").completion
    for library in ("httpx", "httpx2"):
        if importlib.util.find_spec(library) is not None:
            _watch_clients(library)
    # It runs before LiteLLM's own exit handlers, which were registered before.
    atexit.register(dspy_internals.silence_litellm)


@functools.cache
def _watch_clients(library: str) -> None:
    """Wrap the clients that LiteLLM sends with, once in a process. Their other users see no change."""
    httpx: Any = importlib.import_module(library)
    send, send_sync = httpx.AsyncClient.send, httpx.Client.send

    @functools.wraps(send)
    async def sent(self: Any, request: Any, **options: Any) -> Any:
        call = _guarded_call(request, options)
        if call is None:
            return await send(self, request, **options)

        async def attempt(seconds: float | None) -> Any:
            if seconds is not None:
                timeouts = {**request.extensions.get("timeout", {}), "connect": seconds}
                request.extensions = {**request.extensions, "timeout": timeouts}
            return await send(self, request, **options)

        with _noted(call):
            response = await outgoing.connect(attempt, call.target, str(request.url))
            try:
                return _checked(response, request)
            except BaseException:
                await response.aclose()
                raise

    @functools.wraps(send_sync)
    def sent_sync(self: Any, request: Any, **options: Any) -> Any:
        """For the few providers that LiteLLM asks in a thread of its own."""
        call = _guarded_call(request, options)
        response = send_sync(self, request, **options)
        if call is None:
            return response
        with _noted(call):
            try:
                return _checked(response, request)
            except BaseException:
                response.close()
                raise

    httpx.AsyncClient.send, httpx.Client.send = sent, sent_sync


@contextmanager
def _noted(call: LMCall) -> Iterator[None]:
    """Notes our errors for `_guarded`: LiteLLM, and the clients below it, make errors of their own of them."""
    try:
        yield
    except (outgoing.LMAnswerRefused, outgoing.LMUnreachable, lm_call.LMOverloaded) as error:
        call.refused = error
        raise


def _guarded_call(request: Any, options: dict[str, Any]) -> LMCall | None:
    """The call that sends the request, changed to what is guarded; None if no call of LiteLLM does."""
    call = lm_call.current.get()
    if call is None or not call.by_litellm:
        return None
    if call.refused is not None:
        raise call.refused  # LiteLLM tries again
    if _is_private(request):
        options["follow_redirects"] = False
        if (traceparent := tracing.current()) is not None:
            request.headers[tracing.TRACEPARENT] = traceparent
    return call


def _checked(response: Any, request: Any) -> Any:
    outgoing.check(response.status_code, response.headers.get, private=_is_private(request))
    return response


def _is_private(request: Any) -> bool:
    """Whether it has a prompt or a key; LiteLLM also gets images, for providers that take no addresses."""
    return request.method != "GET" or any(redaction.names_secret(name) for name in request.headers)
