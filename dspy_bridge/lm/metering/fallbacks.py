"""Counts how often DSPy's adapters go on to a simpler format than the one that they were to use. Imports DSPy."""

from __future__ import annotations

import functools
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.metering import meter


def install() -> None:
    """Watch the adapters of this process. Those of `guarded_adapters` call `in_json` themselves."""
    dspy_internals.JSON_FALLBACK.wrap(lambda _fallback: in_json)
    dspy_internals.RESPONSE_FORMAT.wrap(_watch_format)


def in_json(adapter: Any) -> dspy.Adapter:
    """Called by DSPy where an answer could not be read: the adapter for another LM call, in JSON."""
    meter.fell_back()
    return dspy_internals.JSON_FALLBACK.value(adapter)


def _watch_format(choose: Any) -> Any:
    """DSPy chooses plain JSON for types that providers refuse in a schema."""

    @functools.wraps(choose)
    def watched(adapter: Any, lm: Any, lm_kwargs: dict[str, Any], signature: Any) -> None:
        choose(adapter, lm, lm_kwargs, signature)
        if meter.counting() and lm_kwargs.get("response_format") == meter.PLAIN_JSON and lm.supports_response_schema:
            meter.fell_back()

    return watched
