"""Attempts to connect to an LM, without a network."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dspy_bridge.lm.transport import asking, connecting

URL = "http://lm.example:8080/v1/chat/completions"


class Refused(Exception):
    pass


def attempts(*outcomes: Any) -> Any:
    left = list(outcomes)

    def attempt(_seconds: float | None) -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def connect(outcomes: list[Any], *, on_loop: bool, retries: bool = True, seconds: float = 5) -> Any:
    attempt = attempts(*outcomes)

    async def aattempt(seconds: float | None) -> Any:
        return attempt(seconds)

    with asking.of(asking.Asking("account", None, seconds, retries)):
        if on_loop:
            return asyncio.run(connecting.aconnect(aattempt, URL, (Refused,)))
        return connecting.connect(attempt, URL, (Refused,))


@pytest.mark.parametrize("on_loop", [True, False])
def test_a_server_that_is_just_starting_is_tried_again(on_loop: bool) -> None:
    assert connect([Refused(), Refused(), "connected"], on_loop=on_loop) == "connected"


@pytest.mark.parametrize("on_loop", [True, False])
@pytest.mark.parametrize(("retries", "seconds", "text"), [(False, 5, "within 5 s"), (True, 0.05, "within 0.05 s")])
def test_the_error_names_host_and_port(on_loop: bool, retries: bool, seconds: float, text: str) -> None:
    with pytest.raises(connecting.LMUnreachable, match=rf"lm.example:8080 cannot be reached {text}: no"):
        connect([Refused("no"), "too late"], on_loop=on_loop, retries=retries, seconds=seconds)


@pytest.mark.parametrize("on_loop", [True, False])
@pytest.mark.parametrize("first", [0, 0.2, 0.5])
def test_all_attempts_together_have_the_time_of_one(on_loop: bool, first: float) -> None:
    """Where nothing answers an attempt takes all the time that it is given; the first may be refused."""
    given: list[float] = []

    def attempt(seconds: float | None) -> None:
        assert seconds is not None
        given.append(seconds if given else first)
        time.sleep(given[-1])
        raise Refused("no answer")

    async def aattempt(seconds: float | None) -> None:
        attempt(seconds)

    with asking.of(asking.Asking("account", None, 0.5, True)), pytest.raises(connecting.LMUnreachable):
        if on_loop:
            asyncio.run(connecting.aconnect(aattempt, URL, (Refused,)))
        else:
            connecting.connect(attempt, URL, (Refused,))
    assert len(given) == (1 if first == 0.5 else 2) and sum(given) <= 0.5


def test_an_lm_of_the_applications_own_is_tried_once() -> None:
    with pytest.raises(connecting.LMUnreachable, match=r"lm.example:443 cannot be reached: no"):
        connecting.connect(attempts(Refused("no"), "too late"), "https://lm.example/v1", (Refused,))
