"""A limit on what is read of one answer of an LM, whose length only its sender knows. Imports DSPy.

Two ways lead to LMs: DSPy's own transports, and LiteLLM, over httpx (or httpx2, which newer OpenAI clients use).
On both an answer is counted as it comes, unpacked; past the limit its connection is closed and the call fails for good.
Nobody asks for compressed answers here, but some gateways send them.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge import connections

# In bytes, of each answer; set once, from the settings.
most = 32 * 1024 * 1024
# What is unpacked at once: a chunk of 64 KB may hold 64 MB.
_AT_ONCE = 64 * 1024
# Window bits with which zlib takes both gzip's headers and its own.
_GZIP_OR_DEFLATE = 47


class LMAnswerRefused(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An answer is longer than the limit, or packed so that its length cannot be known. No reason to try again."""


class _Count:
    def __init__(self) -> None:
        self._left = most

    def add(self, piece: bytes) -> None:
        self._left -= len(piece)
        if self._left < 0:
            raise LMAnswerRefused(f"the answer is longer than DSPY_BRIDGE_MAX_LM_BYTES allows: {most} bytes, unpacked")


def _packing(values: list[str]) -> str | None:
    """The one coding of a body, if any, by the values of its Content-Encoding headers."""
    codings = [coding.strip().lower() for value in values for coding in value.split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if len(codings) > 1:
        raise LMAnswerRefused(f"the answer is packed {len(codings)} times, though that was not asked for")
    return codings[0] if codings else None


# DSPy's own transports. They unpack what they have read, at most 64 KB, at once.


def counted(response: Any) -> Any:
    """The response of a sync transport, with its body counted."""
    try:
        _packing(response.headers_all("content-encoding"))
    except LMAnswerRefused:
        response.close()
        raise

    def chunks() -> Iterator[bytes]:
        count = _Count()
        try:
            for chunk in response:
                count.add(chunk)
                yield chunk
        finally:
            response.close()

    return _again(response, chunks(), lambda _consumed: response.close())


class Counted:
    """What `stream` of an async transport gives, with its response's body counted: to be awaited, or a context."""

    def __init__(self, opening: Any) -> None:
        self._opening = opening

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aenter__(self) -> Any:
        return await self._open()

    async def __aexit__(self, *raised: Any) -> Any:
        return await self._opening.__aexit__(*raised)

    async def _open(self) -> Any:
        try:
            response = await self._opening.__aenter__()
        except Exception as error:
            if not connections.ran_out(error):
                raise
            await connections.close_idle()
            response = await self._opening.__aenter__()
        try:
            _packing(response.headers_all("content-encoding"))
        except LMAnswerRefused:
            await response.aclose()
            raise

        async def chunks() -> AsyncIterator[bytes]:
            count = _Count()
            async with aclosing(aiter(response)) as received:
                async for chunk in received:
                    count.add(chunk)
                    yield chunk

        async def release(_consumed: bool) -> None:
            await response.aclose()

        return _again(response, chunks(), release)


def _again(response: Any, chunks: Any, release: Callable[[bool], Any]) -> Any:
    return type(response)(
        status=response.status,
        reason=response.reason,
        headers=response.headers,
        http_version=response.http_version,
        chunks=chunks,
        release=release,
    )


# LiteLLM. It and the clients that it uses turn errors into their own, so the first one is kept.


class _Call:
    def __init__(self) -> None:
        self.refused: LMAnswerRefused | None = None


_call: ContextVar[_Call | None] = ContextVar("lm_call", default=None)


def limiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls LiteLLM, sync or async, with all that it reads meanwhile counted."""

    @functools.wraps(call)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _watch_clients()
        with _limits():
            return call(*args, **kwargs)

    @functools.wraps(call)
    async def alimited(*args: Any, **kwargs: Any) -> Any:
        if not _watched.is_set():
            await asyncio.to_thread(_watch_clients)  # an import, as a rule
        with _limits():
            return await call(*args, **kwargs)

    return alimited if inspect.iscoroutinefunction(call) else limited


@contextmanager
def _limits() -> Iterator[None]:
    call = _Call()
    token = _call.set(call)
    try:
        yield
    except Exception:
        if call.refused is None:
            raise
    finally:
        _call.reset(token)
    if call.refused is not None:
        raise call.refused


# Set once the clients are watched; threads may want that at once.
_watched = threading.Event()
_watching = threading.Lock()


def _watch_clients() -> None:
    """Once in a process: have the clients of httpx count what they get for LiteLLM. Their other users see no change."""
    with _watching:
        if _watched.is_set():
            return
        for name in ("httpx", "httpx2"):
            with suppress(ImportError):
                _watch(importlib.import_module(name))
        _watched.set()


def _watch(httpx: Any) -> None:
    class Body(httpx.SyncByteStream):  # type: ignore[misc]
        def __init__(self, pieces: Callable[[bytes], Iterator[bytes]], stream: Any) -> None:
            self._pieces = pieces
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                yield from self._pieces(chunk)

        def close(self) -> None:
            self._stream.close()

    class AsyncBody(httpx.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, pieces: Callable[[bytes], Iterator[bytes]], stream: Any) -> None:
            self._pieces = pieces
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self._stream:
                for piece in self._pieces(chunk):
                    yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    def watch(response: Any) -> None:
        if (call := _call.get()) is not None:
            response.stream = Body(_reader(call, response), response.stream)

    async def awatch(response: Any) -> None:
        if (call := _call.get()) is not None:
            response.stream = AsyncBody(_reader(call, response), response.stream)

    for client, hook in ((httpx.Client, watch), (httpx.AsyncClient, awatch)):
        client.send = _hooked(client.send, hook)


def _hooked(send: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    def hooked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if _call.get() is not None:
            hooks = self.event_hooks
            if hook not in hooks["response"]:
                self.event_hooks = {**hooks, "response": [hook, *hooks["response"]]}
            # What was set for this request may be signed.
            if request.headers.get("accept-encoding") == self.headers.get("accept-encoding"):
                request.headers["accept-encoding"] = "identity"
        return send(self, request, *args, **kwargs)

    return hooked


def _reader(call: _Call, response: Any) -> Callable[[bytes], Iterator[bytes]]:
    """What unpacks and counts the chunks of a body; httpx is left nothing to unpack, which it does without a limit."""
    packed, unpacked, unpack = _Count(), _Count(), None
    try:
        coding = _packing(response.headers.get_list("content-encoding"))
        if coding in ("gzip", "x-gzip", "deflate"):
            unpack = zlib.decompressobj(_GZIP_OR_DEFLATE)
            del response.headers["content-encoding"]
        elif coding is not None:
            raise LMAnswerRefused(f"the answer is packed as {coding!r}, though that was not asked for")
    except LMAnswerRefused as error:
        call.refused = error
        raise

    def pieces(chunk: bytes) -> Iterator[bytes]:
        try:
            packed.add(chunk)
            if unpack is None:
                yield chunk
            # What follows the end of what is packed is dropped, as httpx does.
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
