"""What happens to each request that LiteLLM sends to an LM, as `outgoing` says for DSPy's own engine.

LiteLLM's import takes seconds, so it is done in a thread before a call needs it: DSPy would do it in the middle of the
first call, on the event loop, where every other call and every deadline would wait for it. LiteLLM sends with httpx,
or httpx2 for OpenAI's clients, whose `send` is wrapped. It counts what is received, not what that is unpacked to.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import importlib
import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
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

    class Body(httpx.SyncByteStream, httpx.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any, answer: outgoing.Answer, call: LMCall) -> None:
            self._stream, self._answer, self._call = stream, answer, call

        def __iter__(self) -> Iterator[bytes]:
            return map(self._counted, self._stream)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self._stream:
                yield self._counted(chunk)

        def _counted(self, chunk: bytes) -> bytes:
            with _noted(self._call):
                return self._answer.piece(chunk)

        def close(self) -> None:
            self._stream.close()

        async def aclose(self) -> None:
            await self._stream.aclose()

    httpx.Client.send = _sending_sync(Body, httpx.Client.send)
    httpx.AsyncClient.send = _sending(Body, httpx.AsyncClient.send)


@contextmanager
def _noted(call: LMCall) -> Iterator[None]:
    """Notes our errors for `_guarded`: LiteLLM, and the clients below it, make errors of their own of them."""
    try:
        yield
    except (outgoing.LMAnswerRefused, outgoing.LMUnreachable, lm_call.LMOverloaded) as error:
        call.refused = error
        raise


def _guarded_call(client: Any, request: Any, options: dict[str, Any]) -> LMCall | None:
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
    # A value set for this request alone may be signed.
    if request.headers.get("accept-encoding") == client.headers.get("accept-encoding"):
        request.headers["accept-encoding"] = "identity"
    return call


def _check(body: Any, response: Any, request: Any, call: LMCall) -> None:
    answer = outgoing.Answer(response.status_code, response.headers.get, private=_is_private(request))
    response.stream = body(response.stream, answer, call)


def _sending(body: Any, send: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    async def sent(self: Any, request: Any, **options: Any) -> Any:
        call = _guarded_call(self, request, options)
        if call is None:
            return await send(self, request, **options)
        stream = options.pop("stream", False)

        async def attempt(seconds: float | None) -> Any:
            if seconds is not None:
                timeouts = {**request.extensions.get("timeout", {}), "connect": seconds}
                request.extensions = {**request.extensions, "timeout": timeouts}
            return await send(self, request, stream=True, **options)

        with _noted(call):
            response = await outgoing.connect(attempt, call.target, str(request.url))
            try:
                _check(body, response, request, call)
                if not stream:
                    await response.aread()
            except BaseException:
                await response.aclose()
                raise
            return response

    return sent


def _sending_sync(body: Any, send: Callable[..., Any]) -> Callable[..., Any]:
    """For the few providers that LiteLLM asks in a thread of its own."""

    @functools.wraps(send)
    def sent(self: Any, request: Any, **options: Any) -> Any:
        call = _guarded_call(self, request, options)
        if call is None:
            return send(self, request, **options)
        stream = options.pop("stream", False)
        with _noted(call):
            response = send(self, request, stream=True, **options)
            try:
                _check(body, response, request, call)
                if not stream:
                    response.read()
            except BaseException:
                response.close()
                raise
            return response

    return sent


def _is_private(request: Any) -> bool:
    """Whether it has a prompt or a key; LiteLLM also gets images, for providers that take no addresses."""
    return request.method != "GET" or any(redaction.names_secret(name) for name in request.headers)
