"""Modules of a program's own that sit in a thread and never return."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import dspy

entered = threading.Semaphore(0)


def _sit() -> None:
    entered.release()
    threading.Event().wait()


class Sync(dspy.Module):
    """Only a sync `forward`."""

    def forward(self, **_: Any) -> Any:
        _sit()


class Constructor(dspy.Module):
    """Its constructor is what never returns."""

    def __init__(self) -> None:
        super().__init__()
        _sit()


class Threaded(dspy.Module):
    """An async one, with a thread of asyncio's."""

    async def aforward(self, **_: Any) -> Any:
        await asyncio.to_thread(_sit)
