"""Fixtures: a peer with `offline/echo`, a loopback LM and a peer that asks it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from typing import Any

import pytest
from lm_server import Answer, LMServer, chat
from peer import Peer

PARIS = chat(answer="Paris")
# What `make test-dspy` has installed.
DSPY = tuple(int(part) for part in version("dspy").split(".")[:2])


class LacksFeature(Exception):
    """Raised by a test that has seen the peer refuse what this older DSPy does not have: it ends there, and passes."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Ends a test that raised `LacksFeature`."""
    try:
        return (yield)
    except LacksFeature:
        return True


@pytest.fixture
def echo_peer() -> Iterator[Peer]:
    """A peer whose LM is `offline/echo`."""
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        yield peer


@pytest.fixture
def start_lm() -> Iterator[Callable[..., LMServer]]:
    """Starts loopback LMs."""
    servers = []

    def start(answer: Callable[[dict[str, Any]], Answer] | Answer = PARIS) -> LMServer:
        servers.append(LMServer(answer if callable(answer) else lambda _request: answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def lm_env(server: LMServer, **options: Any) -> dict[str, str]:
    """Settings of a peer that asks `server`."""
    return {"DSPY_BRIDGE_LM": "openai/stub-model", "DSPY_BRIDGE_LM_OPTIONS": json.dumps(server.options(**options))}
