"""program_loader: when the load of a lazy program is tried again."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dspy_bridge.commands.program_loader import ProgramLoader
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
        both = await asyncio.gather(loader.load(entry), loader.load(entry), return_exceptions=True)
        for failed in both:
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
