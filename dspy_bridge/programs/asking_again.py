"""Asks an LM again whose answer did not fit: runs a program up to so many times. Imports DSPy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from dspy_bridge.caller import Caller
from dspy_bridge.dispatch import error_replies
from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm.adapters import corrections
from dspy_bridge.logs import redaction

# A chunk of a stream, not the reply: short.
_MOST_CHARS = 300


async def run(
    once: Callable[[], Awaitable[dict[str, Any]]], most: int, fields: list[str], caller: Caller | None
) -> dict[str, Any]:
    """The outputs of the first attempt (`once`) that fit, of `most`; raises the last one's error.

    `fields`: the program's outputs. `caller`: who gets a status for each further attempt.
    """
    if most == 1:
        return await once()
    attempts = corrections.Attempts(most)
    # Not reset: a run has a task of its own.
    corrections.current.set(attempts)
    for _ in range(most - 1):
        try:
            return await once()
        except OutputInvalid as error:
            if not error.by_lm:
                raise
            attempts.next(error, fields if error.field is None else [error.field])
            wrong = error_replies.one_line(redaction.redact(str(error)), _MOST_CHARS)
        if caller is not None:
            await asyncio.sleep(0)  # messages from other threads go first
            await caller.stream_item({"status": f"asking again: {wrong}"})
    return await once()
