"""The limits on requests, answers and connecting where LiteLLM sends: over httpx, or httpx2 for OpenAI's clients.

A response hook of the client replaces the body of each response by one that counts. LiteLLM and the clients below it
turn errors into their own and try again, so the refusal is kept and raised at the end.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import admission, asking, connecting
from dspy_bridge.lm.transport.answer_limit import Count, LMAnswerRefused, not_redirected, packing
from dspy_bridge.logs import redaction

# What is unpacked at once: a chunk of 64 KB may hold 64 MB.
_AT_ONCE = 64 * 1024
# Window bits with which zlib takes both gzip's headers and its own.
_GZIP_OR_DEFLATE = 47


class _Call:
    def __init__(self) -> None:
        self.refused: dspy.LMError | None = None
        # When its answer has ended.
        self.leave: Callable[[], None] | None = None
        # The bodies of its answers, which it may not have read to their end.
        self.bodies: list[Any] = []

    def left(self) -> None:
        if self.leave is not None:
            self.leave()


_call: ContextVar[_Call | None] = ContextVar("lm_call", default=None)


def limiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which calls LiteLLM, sync or async, with everything counted that is read during it."""

    @functools.wraps(call)
    def limited(*args: Any, **kwargs: Any) -> Any:
        watch_clients()
        with _limits():
            return call(*args, **kwargs)

    @functools.wraps(call)
    async def alimited(*args: Any, **kwargs: Any) -> Any:
        with _limits() as of_call:
            try:
                return await call(*args, **kwargs)
            except BaseException:
                # DSPy 3.3 leaves a stream to the garbage collector when its reader is cancelled.
                for body in of_call.bodies:
                    with suppress(Exception):  # a connection that was broken already
                        await body.aclose()
                raise

    return alimited if inspect.iscoroutinefunction(call) else limited


@contextmanager
def _limits() -> Iterator[_Call]:
    call = _Call()
    token = _call.set(call)
    try:
        yield call
    except Exception:
        if call.refused is None:
            raise
    finally:
        _call.reset(token)
    if call.refused is not None:
        raise call.refused


_watched = threading.Event()
_watching = threading.Lock()


def watch_clients() -> None:
    """Once in a process: httpx's clients count what they receive for LiteLLM. Their other users see no change.

    It may import them.
    """
    with _watching:
        if _watched.is_set():
            return
        for library, sends in dspy_internals.HTTP_SENDS.items():
            if importlib.util.find_spec(library) is not None:
                _watch(importlib.import_module(library), *sends)
        if importlib.util.find_spec("aiohttp") is not None:
            dspy_internals.AIOHTTP_POST.wrap(_without_redirects)
        _watched.set()


def _watch(httpx: Any, send: dspy_internals.Name, async_send: dspy_internals.Name) -> None:
    class Body(httpx.SyncByteStream):  # type: ignore[misc]
        def __init__(self, call: _Call, response: Any) -> None:
            self._pieces = _reader(call, response)
            self._stream = response.stream
            self._call = call

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                yield from self._pieces(chunk)

        def close(self) -> None:
            try:
                self._stream.close()
            finally:
                self._call.left()

    class AsyncBody(httpx.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, call: _Call, response: Any) -> None:
            self._pieces = _reader(call, response)
            self._stream = response.stream
            self._call = call

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self._stream:
                for piece in self._pieces(chunk):
                    yield piece

        async def aclose(self) -> None:
            try:
                await self._stream.aclose()
            finally:
                self._call.left()

    def watch(response: Any) -> None:
        if (call := _call.get()) is not None:
            response.stream = Body(call, response)

    async def awatch(response: Any) -> None:
        if (call := _call.get()) is not None:
            response.stream = AsyncBody(call, response)
            call.bodies.append(response.stream)

    failures = (httpx.ConnectError, httpx.ConnectTimeout)
    send.wrap(lambda original: _hooked(watch, original, functools.partial(_connecting, failures)))
    async_send.wrap(lambda original: _hooked(awatch, original, functools.partial(_aconnecting, failures)))


def _without_redirects(post: Callable[..., Any]) -> Callable[..., Any]:
    async def check(response: Any) -> None:
        try:
            not_redirected(response.status, response.headers.get("location"))
        except LMAnswerRefused as error:
            if (call := _call.get()) is not None:
                call.refused = error
            raise

    @functools.wraps(post)
    def posting(self: Any, url: Any, **kwargs: Any) -> Any:
        if asking.current.get() is not None:
            kwargs = {**kwargs, "allow_redirects": False, "raise_for_status": check}
        return post(self, url, **kwargs)

    return posting


def _connecting(failures: Any, call: _Call, send: Callable[[float | None], Any], url: str) -> Any:
    try:
        call.leave = admission.admit_in_thread()
        return connecting.connect(send, url, failures)
    except BaseException as error:
        _failed(call, error)
        raise


async def _aconnecting(failures: Any, call: _Call, send: Callable[[float | None], Any], url: str) -> Any:
    try:
        call.leave = await admission.admit()
        return await connecting.aconnect(send, url, failures)
    except BaseException as error:
        _failed(call, error)
        raise


def _failed(call: _Call, error: BaseException) -> None:
    call.left()
    if isinstance(error, (connecting.LMUnreachable, admission.LMOverloaded)):
        call.refused = error


def _hooked(hook: Callable[..., Any], send: Callable[..., Any], connect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    def hooked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if asking.current.get() is not None and _is_private(request):
            kwargs["follow_redirects"] = False
        if (call := _call.get()) is not None:
            if call.refused is not None:
                raise call.refused  # LiteLLM tries again
            hooks = self.event_hooks
            if hook not in hooks["response"]:
                self.event_hooks = {**hooks, "response": [hook, *hooks["response"]]}
            # A value set for this request alone may be signed.
            if request.headers.get("accept-encoding") == self.headers.get("accept-encoding"):
                request.headers["accept-encoding"] = "identity"

            def attempt(seconds: float | None) -> Any:
                if seconds is not None:
                    timeouts = {**request.extensions.get("timeout", {}), "connect": seconds}
                    request.extensions = {**request.extensions, "timeout": timeouts}
                return send(self, request, *args, **kwargs)

            return connect(call, attempt, str(request.url))
        return send(self, request, *args, **kwargs)

    return hooked


def _is_private(request: Any) -> bool:
    """Whether it has a prompt or a key; LiteLLM also gets images, for providers that take no addresses."""
    return request.method != "GET" or any(redaction.names_secret(name) for name in request.headers)


def _reader(call: _Call, response: Any) -> Callable[[bytes], Iterator[bytes]]:
    """Unpacks and counts the chunks of a body: httpx, which unpacks without a limit, finds nothing left to unpack."""
    packed, unpacked, unpack = Count(), Count(), None
    try:
        received = admission.answered(response.status_code, response.headers.get)
        if _is_private(response.request):
            not_redirected(response.status_code, response.headers.get("location"))
        coding = packing(response.headers.get_list("content-encoding"))
        if coding in ("gzip", "x-gzip", "deflate"):
            unpack = zlib.decompressobj(_GZIP_OR_DEFLATE)
            del response.headers["content-encoding"]
        elif coding is not None:
            raise LMAnswerRefused(f"the answer is packed as {coding!r}, though that was not asked for")
    except dspy.LMError as error:
        call.refused = error
        raise

    def pieces(chunk: bytes) -> Iterator[bytes]:
        received()
        try:
            packed.add(chunk)
            if unpack is None:
                yield chunk
            # As httpx does, drop what follows the end of the packed data.
            while unpack is not None and not unpack.eof:
                piece = unpack.decompress(chunk, _AT_ONCE)
                unpacked.add(piece)
                yield piece
                chunk = unpack.unconsumed_tail
                if not chunk and len(piece) < _AT_ONCE:
                    return
        except LMAnswerRefused as error:
            call.refused = error
            raise

    return pieces
