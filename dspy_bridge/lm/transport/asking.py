"""Who asks whom while an LM of ours is called: for the cache, and for connections. No DSPy here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Asking(NamedTuple):
    """`account`: the server and the key, as the cache tells them apart; `scope`: of the cache, as the client named it.

    `connect_timeout`: in seconds; `retries`: whether a failed attempt to connect is followed by others within it.
    `key_of`: the provider whose key the LM has from the peer's; None if its own options say where it is asked.
    """

    account: str
    scope: str | None
    connect_timeout: float
    retries: bool
    key_of: str | None = None


current: ContextVar[Asking | None] = ContextVar("asking", default=None)


@contextmanager
def of(asking: Asking | None) -> Iterator[None]:
    """Around a call of an LM."""
    token = current.set(asking)
    try:
        yield
    finally:
        current.reset(token)
