"""A limit on what is read of one answer of an LM, whose length only its sender knows. Imports DSPy.

Two ways lead to LMs: DSPy's own transports, here, and LiteLLM (`litellm_limit`). On both an answer is counted as it
comes, unpacked; past the limit its connection is closed and the call fails for good. Nobody asks for compressed answers
here, but some gateways send them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import dspy

from dspy_bridge.lm import connections

# In bytes, of each answer; set once, from the settings.
most = 32 * 1024 * 1024


class LMAnswerRefused(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An answer is longer than the limit, or packed so that its length cannot be known. No reason to try again."""


class Count:
    """What is left to be read of one answer."""

    def __init__(self) -> None:
        self._left = most

    def add(self, piece: bytes) -> None:
        """Raises `LMAnswerRefused`."""
        self._left -= len(piece)
        if self._left < 0:
            raise LMAnswerRefused(f"the answer is longer than DSPY_BRIDGE_MAX_LM_BYTES allows: {most} bytes, unpacked")


def packing(values: list[str]) -> str | None:
    """The one coding of a body, if any, by the values of its Content-Encoding headers."""
    codings = [coding.strip().lower() for value in values for coding in value.split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if len(codings) > 1:
        raise LMAnswerRefused(f"the answer is packed {len(codings)} times, though that was not asked for")
    return codings[0] if codings else None


def counted(response: Any) -> Any:
    """The response of a sync transport, with its body counted.

    DSPy's transports unpack what they have read, at most 64 KB, at once: some 64 MB, where the limit is less.
    """
    try:
        packing(response.headers_all("content-encoding"))
    except LMAnswerRefused:
        response.close()
        raise

    def chunks() -> Iterator[bytes]:
        count = Count()
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
            # Nothing has been sent.
            await connections.close_idle()
            response = await self._opening.__aenter__()
        try:
            packing(response.headers_all("content-encoding"))
        except LMAnswerRefused:
            await response.aclose()
            raise

        async def chunks() -> AsyncIterator[bytes]:
            count = Count()
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
