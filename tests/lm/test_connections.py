"""connections: what is closed when descriptors run out, and how it shows that they did."""

from __future__ import annotations

import asyncio
import copy
import errno
import itertools
import os
import resource
import socket
import threading
from collections.abc import Iterator
from weakref import WeakSet

import pytest

from dspy_bridge.lm.transport import connections
from dspy_bridge.port import stdio


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LMs of other tests, whose event loops are closed, are left alone."""
    monkeypatch.setattr(connections, "_lms", WeakSet())


class LM:
    def __init__(self) -> None:
        self.use = connections.Use()
        self.closed = 0
        connections.register(self)

    async def aclose(self) -> None:
        self.closed += 1
        raise OSError("broken already")


def test_an_lm_that_is_called_is_closed_after_that_and_once() -> None:
    idle, busy = LM(), LM()
    with busy.use.call():
        with busy.use.call():
            asyncio.run(connections.close_idle())
            assert (idle.closed, busy.closed, busy.use.to_close()) == (1, 0, False)
        assert not busy.use.to_close(), "one call is still under way"
    assert busy.use.to_close()
    assert not busy.use.to_close(), "else each later call would close what it has just opened"


def test_a_deep_copy_has_calls_of_its_own() -> None:
    """As it has connections of its own; DSPy copies modules, LMs included."""
    use = connections.Use()
    with use.call():
        assert copy.deepcopy(use).may_close() and not use.may_close()


def chained(*errors: BaseException) -> BaseException:
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.EMFILE, "x"), True),
        (chained(RuntimeError(), ValueError(), OSError(errno.ENFILE, "x")), True),
        # asyncio's, for a host of several addresses.
        (OSError(f"Multiple exceptions: [Errno 24] {os.strerror(errno.EMFILE)}, [Errno 111] refused"), True),
        (chained(RuntimeError(), ConnectionRefusedError(errno.ECONNREFUSED, "refused")), False),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (ValueError("Too many open files"), False),
    ],
)
def test_what_shows_that_descriptors_ran_out(error: BaseException, wanted: bool) -> None:
    assert connections.ran_out(error) is wanted


@pytest.fixture
def few_files() -> Iterator[None]:
    """The limit of open files is where the next one would be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(2)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_name_that_is_not_found_while_descriptors_are_few_may_be_one(few_files: None) -> None:
    assert connections.ran_out(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    os.close(os.dup(2))


@pytest.mark.parametrize(("soft", "wanted"), [(64, 32), (1024, 992), (20, 1), (resource.RLIM_INFINITY, 1_000_000)])
def test_what_is_spare_is_the_limit_less_what_the_peer_needs(
    monkeypatch: pytest.MonkeyPatch, soft: int, wanted: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert stdio.spare() == wanted


def test_connections_are_closed_on_each_event_loop_that_has_some() -> None:
    """Runs with large inputs have a loop of their own."""
    other = asyncio.new_event_loop()
    thread = threading.Thread(target=other.run_forever)
    thread.start()
    closed: list[asyncio.AbstractEventLoop] = []

    class Noted(LM):
        async def aclose(self) -> None:
            closed.append(asyncio.get_running_loop())

    async def call(lm: LM) -> None:
        with lm.use.call():
            pass

    async def scenario() -> None:
        lm = Noted()
        await call(lm)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(lm), other))
        await connections.close_idle()
        assert closed == [asyncio.get_running_loop(), other]

    try:
        asyncio.run(scenario())
    finally:
        other.call_soon_threadsafe(other.stop)
        thread.join()
        other.close()
