"""A limit on the length of an LM's answer, counted while it is read and unpacked. Imports DSPy.

Here for DSPy's own transports; for LiteLLM see `litellm_answer_limit`. Past the limit the connection is closed and the
call fails for good. Compressed answers are not asked for, but some gateways send them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import dspy

from dspy_bridge.lm.transport import admission, connecting

# Bytes of each answer; set once, from the settings.
most = 32 * 1024 * 1024


class LMAnswerRefused(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An answer is too long, packed so that its length cannot be known, or a redirect. Not worth a retry."""


class Count:
    """Counts the bytes of one answer."""

    def __init__(self) -> None:
        self._left = most

    def add(self, piece: bytes) -> None:
        """Raises `LMAnswerRefused`."""
        self._left -= len(piece)
        if self._left < 0:
            raise LMAnswerRefused(f"the answer is longer than DSPY_BRIDGE_MAX_LM_BYTES allows: {most} bytes, unpacked")


def packing(values: list[str]) -> str | None:
    """The coding of a body, if any, from the values of its Content-Encoding headers."""
    codings = [coding.strip().lower() for value in values for coding in value.split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if len(codings) > 1:
        raise LMAnswerRefused(f"the answer is packed {len(codings)} times, though that was not asked for")
    return codings[0] if codings else None


def not_redirected(status: int, location: str | None) -> None:
    """Raises `LMAnswerRefused` for a redirect, which would take the prompt and the key to another server."""
    if 300 <= status < 400:
        to = urlsplit(location or "").hostname or "another path"
        raise LMAnswerRefused(f"the server answers with a redirect ({status}) to {to}; no redirect is followed")


def counted(response: Any, ended: Callable[[], None]) -> Any:
    """The response of a sync transport with its body counted. `ended` is called when it is closed.

    DSPy's transports unpack the 64 KB that they read at once, which may be 64 MB: more than the limit.
    """
    try:
        received = admission.answered(response.status, response.header)
        not_redirected(response.status, response.header("location"))
        packing(response.headers_all("content-encoding"))
    except dspy.LMError:
        response.close()
        raise

    def close(_consumed: bool = True) -> None:
        try:
            response.close()
        finally:
            ended()

    def chunks() -> Iterator[bytes]:
        count = Count()
        try:
            for chunk in response:
                received()
                count.add(chunk)
                yield chunk
        finally:
            close()

    return _with_body(response, chunks(), close)


class Counted:
    """What an async transport's `stream` returns, awaitable and a context manager, with the body counted."""

    def __init__(self, stream: Callable[[float | None], Any], url: str) -> None:
        self._stream = stream
        self._url = url
        self._opening: Any = None
        self._leave: Callable[[], None] = _nothing

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aenter__(self) -> Any:
        return await self._open()

    async def __aexit__(self, *raised: Any) -> Any:
        try:
            return await self._opening.__aexit__(*raised)
        finally:
            self._leave()

    async def _connect(self, seconds: float | None) -> Any:
        self._opening = self._stream(seconds)
        return await self._opening.__aenter__()

    async def _open(self) -> Any:
        self._leave = await admission.admit()
        try:
            return await self._admitted()
        except BaseException:
            self._leave()
            raise

    async def _admitted(self) -> Any:
        response = await connecting.aconnect(self._connect, self._url, connecting.failures())
        try:
            received = admission.answered(response.status, response.header)
            not_redirected(response.status, response.header("location"))
            packing(response.headers_all("content-encoding"))
        except dspy.LMError:
            await response.aclose()
            raise

        async def chunks() -> AsyncIterator[bytes]:
            count = Count()
            async with aclosing(aiter(response)) as pieces:
                async for chunk in pieces:
                    received()
                    count.add(chunk)
                    yield chunk

        async def release(_consumed: bool) -> None:
            try:
                await response.aclose()
            finally:
                self._leave()

        return _with_body(response, chunks(), release)


def _nothing() -> None:
    pass


def _with_body(response: Any, chunks: Any, release: Callable[[bool], Any]) -> Any:
    return type(response)(
        status=response.status,
        reason=response.reason,
        headers=response.headers,
        http_version=response.http_version,
        chunks=chunks,
        release=release,
    )
