"""lookups: routes and proxies are those that DSPy finds itself."""

from __future__ import annotations

import dspy
import pytest

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import lookups

pytestmark = pytest.mark.filterwarnings("error")


def test_routes_are_those_of_dspy() -> None:
    """Also of a model that no provider has."""
    resolve = dspy_internals.RESOLVE.value
    resolved = lookups._resolving(resolve)
    for model, model_type in (("openai/gpt-4o-mini", "chat"), ("openai/o3", "responses"), ("anthropic/claude", "chat")):
        lm = dspy.LM(model, model_type=model_type)
        assert resolved(lm) == resolve(lm)
        assert resolved(lm) is resolved(lm)
    lm = dspy.LM("nobody/model")
    for function in (resolve, resolved, resolved):
        with pytest.raises(Exception) as raised:
            function(lm)
        assert type(raised.value).__name__ == "UnknownModelError"


def test_an_engine_that_would_ask_is_dspys() -> None:
    from dspy.lm15 import RouterConfig

    made = lookups._offline(dspy_internals.OFFLINE_ENGINE.value)
    assert isinstance(made(RouterConfig(env={}), model_type="chat"), lookups._Offline)
    for config in (None, RouterConfig(), RouterConfig(env={"OPENAI_API_KEY": "x"})):
        assert not isinstance(made(config), lookups._Offline)


def test_a_change_of_the_proxies_is_seen_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(lookups.time, "monotonic", lambda: now)
    asked: list[float] = []

    def getproxies() -> dict[str, str]:
        asked.append(now)
        return {"http": f"http://proxy:{len(asked)}"}

    proxies = lookups._now_and_then(getproxies)
    assert [proxies()["http"] for _ in range(1000)] == ["http://proxy:1"] * 1000
    now += 1.0
    assert proxies()["http"] == "http://proxy:2"
    assert len(asked) == 2
