"""program_loader: when a load is tried again; an import that fails leaves garbage collections on."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_bridge.commands.program_loader import ProgramLoader, _import
from dspy_bridge.commands.program_registry import Registry
from dspy_bridge.errors import InvalidArgs, LoadFailed, SetupFailed
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings


class Loads(ProgramLoader):
    """Its programs load as `outcomes` say, one after the other."""

    def __init__(self, *outcomes: Any) -> None:
        super().__init__(Settings({}), WorkerThreads())
        self.outcomes = list(outcomes)

    def _make(self, definition: dict[str, Any]) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.mark.parametrize(("error", "seconds"), [(InvalidArgs("signature: wrong"), 60), (SetupFailed("no DSPy"), 1)])
def test_a_failed_load_is_tried_again_later_and_not_before(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seconds: float
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    registry = Registry()
    registry.add_lazy("x", {"signature": "q -> a"})
    entry = registry.get("x")
    assert entry is not None
    loader = Loads(error, "the program")

    async def scenario() -> None:
        nonlocal now
        waiters = []
        while entry.failure is None:  # at each step of the loop
            waiters.append(asyncio.ensure_future(loader.load(entry)))
            await asyncio.sleep(0)
        for failed in await asyncio.gather(*waiters, return_exceptions=True):
            assert isinstance(failed, LoadFailed)
            assert str(failed) == f"program x could not be loaded: {error}"
        now += seconds - 0.1
        with pytest.raises(LoadFailed):
            await loader.load(entry)
        assert entry.details()["error"] == str(error)
        now += 0.2
        assert await loader.load(entry) == "the program" == await loader.load(entry)
        assert entry.details()["loaded"] and "error" not in entry.details()

    asyncio.run(scenario())


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_an_import_that_fails_leaves_collections_on(thawed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dspy_bridge.lm.dspy_setup.LMs")
    with pytest.raises(ImportError):
        _import.__wrapped__()
    assert gc.isenabled()


def test_a_program_is_built_again_if_python_parses_in_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [SystemError("AST constructor recursion depth mismatch"), "the program"]

    def program(*_: Any) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(ProgramLoader, "_load_dspy", lambda _: "the LMs")
    monkeypatch.setattr("dspy_bridge.programs.program.Program", program)
    assert ProgramLoader(Settings({}), WorkerThreads())._make({}) == "the program"
