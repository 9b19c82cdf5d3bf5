"""What DSPy looks up for each LM call, looked up less often: the provider of a model's name, and the proxies."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from dspy_bridge.lm import dspy_internals

# The provider is a function of the model's name, which a client chooses.
_MOST = 256
# How long a change of the proxies, which are in the environment, may go unseen, in seconds.
_PROXIES_SECONDS = 1.0


def install() -> None:
    """Put these in DSPy's place, once in a process."""
    if dspy_internals.OFFLINE_ENGINE.there:
        dspy_internals.RESOLVE.wrap(_resolving)
        dspy_internals.OFFLINE_ENGINE.wrap(_offline)
    dspy_internals.PROXIES.wrap(_now_and_then)


@functools.lru_cache(_MOST)
def route(model: str, model_type: str) -> Any:
    """DSPy's routing of a model, of which it makes an engine for each call; the same without a network or a key."""
    engine = dspy_internals.OFFLINE_ENGINE.value
    return engine(_no_environment(), model_type=model_type).resolve(model)


@functools.cache
def _no_environment() -> Any:
    from dspy.lm15 import RouterConfig

    return RouterConfig(env={})


def _resolving(resolve: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(resolve)
    def resolved(lm: Any) -> Any:
        return resolve(lm) if getattr(lm, "_providers", ()) else route(lm.model, lm.model_type)

    return resolved


class _Offline:
    """In place of an engine that only routes."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type

    def resolve(self, model: str) -> Any:
        return route(model, self._model_type)


def _offline(engine: Callable[..., Any]) -> Callable[..., Any]:
    def made(config: Any = None, *, model_type: str = "chat") -> Any:
        plain = config is not None and config == _no_environment()
        return _Offline(model_type) if plain else engine(config, model_type=model_type)

    return made


def _now_and_then(getproxies: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    found: dict[str, str] = {}
    until = 0.0

    @functools.wraps(getproxies)
    def proxies() -> dict[str, str]:
        nonlocal found, until
        now = time.monotonic()
        if now >= until:
            found, until = getproxies(), now + _PROXIES_SECONDS
        return found

    return proxies
