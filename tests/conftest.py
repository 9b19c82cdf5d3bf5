"""Fixtures: peers with `offline/echo`, and loopback LMs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import reacts
from lm_server import Answer, LMServer, chat
from peer import Peer
from shared_peers import close, shared_peer

PARIS = chat(answer="Paris")
Server = TypeVar("Server", bound=LMServer)


# Options of an LM that DSPy asks by LiteLLM.
BY_LITELLM: dict[str, Any] = {"engine": "litellm"}


# For `make test-slow`: LiteLLM's import takes each peer 3 s. Other tests with LiteLLM share one.
SLOW_BY_LITELLM = pytest.param(BY_LITELLM, id="litellm", marks=pytest.mark.slow)


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
def idle_lms() -> Iterator[list[LMServer]]:
    """Loopback LMs that no test uses at present."""
    servers: list[LMServer] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start_lm(idle_lms: list[LMServer]) -> Iterator[Callable[..., LMServer]]:
    """Starts loopback LMs."""
    with reusable(idle_lms, LMServer) as start:
        yield start


@contextmanager
def reusable(lms: list[Server], kind: Callable[..., Server]) -> Iterator[Callable[..., Server]]:
    """Starts LMs, or reuses those of earlier tests.

    The first has the same address each time, so that tests can share a peer that calls it.
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


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, with the test module's `HOST` as the module `host`."""
    folder: Path = tmp_path_factory.mktemp("host")
    (folder / "host.py").write_text(request.module.HOST)
    return folder


def lm_env(server: LMServer, **options: Any) -> dict[str, str]:
    """Settings of a peer that asks `server`."""
    return {"DSPY_BRIDGE_LM": "openai/stub-model", "DSPY_BRIDGE_LM_OPTIONS": json.dumps(server.options(**options))}


@pytest.fixture
def make(
    request: pytest.FixtureRequest, start_lm: Callable[..., LMServer]
) -> Iterator[Callable[..., tuple[Peer, LMServer]]]:
    """Makes a program `qa` and the LM that it asks, which answers what the function is given.

    The LM's name is `PRICED` of the test's module, if it has one.
    """
    model = getattr(request.module, "PRICED", "openai/stub")
    with shared_peer(env=lm_env(start_lm())) as peer:

        def make(answer: Any, lm: dict[str, Any] | None = None, **program: Any) -> tuple[Peer, LMServer]:
            server = start_lm(answer)
            own = {"model": model, **server.options(**(lm or {}))}
            create = {"id": "qa", "signature": "question -> answer", "lm": own, **program}
            reply = peer.call("create_program", create)
            assert reply["success"], reply
            return peer, server

        yield make


class Deselected:
    """Prints at the end how many tests were not selected, which pytest-xdist does not show."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.count = 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.count += len(items)
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["deselected"] = self.count

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Each process collects all tests.
        self.count = node.workeroutput.get("deselected", 0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.count:
            terminalreporter.write_line(f"{self.count} deselected")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("agents"):
        metafunc.parametrize("react", ["v1", "v2"], indirect=True)


@pytest.fixture(autouse=True)
def react(request: pytest.FixtureRequest) -> Iterator[str]:
    """DSPy's ReAct in the peers of a test with the mark `agents`."""
    reacts.version = getattr(request, "param", "v1")
    yield reacts.version
    reacts.version = "v1"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deselected(config))
    # A busy machine is no failure.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
