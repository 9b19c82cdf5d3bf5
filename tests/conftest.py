"""Fixtures: peers with `offline/echo`, and loopback LMs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from lm_server import Answer, LMServer, chat
from peer import Peer
from shared_peers import close, shared_peer

PARIS = chat(answer="Paris")
Server = TypeVar("Server", bound=LMServer)


@pytest.fixture(scope="session", autouse=True)
def no_peer_is_left() -> Iterator[None]:
    yield
    close()


@pytest.fixture
def echo_peer() -> Iterator[Peer]:
    """A peer whose LM is `offline/echo`. Other tests may have used it."""
    with shared_peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        yield peer


@pytest.fixture
def fresh_echo_peer() -> Iterator[Peer]:
    """A peer whose LM is `offline/echo`, just started."""
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        yield peer


@pytest.fixture(scope="session")
def lms() -> Iterator[list[LMServer]]:
    """Loopback LMs that no test uses at present."""
    servers: list[LMServer] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start_lm(lms: list[LMServer]) -> Iterator[Callable[..., LMServer]]:
    """Starts loopback LMs."""
    with lent(lms, LMServer) as start:
        yield start


@contextmanager
def lent(lms: list[Server], kind: Callable[..., Server]) -> Iterator[Callable[..., Server]]:
    """Starts LMs, or reuses those of earlier tests.

    The first has the same address each time, so that tests can share a peer that asks it.
    """
    used: list[Server] = []

    def start(answer: Callable[[dict[str, Any]], Answer] | Answer = PARIS) -> Server:
        answers = answer if callable(answer) else lambda _request: answer
        if len(used) == len(lms):
            lms.append(kind(answers))
        used.append(lms[len(used)])
        used[-1].serve(answers)
        return used[-1]

    yield start
    for number, server in enumerate(used):
        if not server.becomes_idle(1):
            server.stop()
            lms[number] = kind(lambda _request: PARIS)


def lm_env(server: LMServer, **options: Any) -> dict[str, str]:
    """Settings of a peer that asks `server`."""
    return {"DSPY_BRIDGE_LM": "openai/stub-model", "DSPY_BRIDGE_LM_OPTIONS": json.dumps(server.options(**options))}
