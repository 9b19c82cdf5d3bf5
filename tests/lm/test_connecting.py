"""Attempts to connect to an LM, without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dspy_bridge.lm import rate_limits
from dspy_bridge.lm.lm_call import Target
from dspy_bridge.lm.rate_limits import Limits
from dspy_bridge.lm.transport import outgoing

URL = "http://lm.example:8080/v1/chat/completions"


class ConnectError(Exception):
    pass


def connect(attempt: Any, *, retries: bool = True, seconds: float = 5) -> Any:
    target = Target("account", None, seconds, retries, None, rate_limits.lane("account", Limits()))
    return asyncio.run(outgoing.connect(attempt, target, URL))


def attempts(*outcomes: Any) -> Any:
    left = list(outcomes)

    async def attempt(_seconds: float) -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def test_a_server_that_is_just_starting_is_tried_again() -> None:
    assert connect(attempts(ConnectError(), ConnectError(), "connected")) == "connected"


@pytest.mark.parametrize(("retries", "seconds", "text"), [(False, 5, "within 5 s"), (True, 0.05, "within 0.05 s")])
def test_the_error_names_host_and_port(retries: bool, seconds: float, text: str) -> None:
    with pytest.raises(outgoing.LMUnreachable, match=rf"lm.example:8080 cannot be reached {text}: no"):
        connect(attempts(ConnectError("no"), "too late"), retries=retries, seconds=seconds)


@pytest.mark.parametrize("first", [0, 0.2, 0.5])
def test_all_attempts_together_have_the_time_of_one(first: float) -> None:
    """Where nothing answers an attempt takes all the time that it is given; the first may be refused."""
    given: list[float] = []

    async def attempt(seconds: float) -> None:
        given.append(seconds if given else first)
        await asyncio.sleep(given[-1])
        raise ConnectError("no answer")

    with pytest.raises(outgoing.LMUnreachable):
        connect(attempt, seconds=0.5)
    assert len(given) == (1 if first == 0.5 else 2) and sum(given) <= 0.5
