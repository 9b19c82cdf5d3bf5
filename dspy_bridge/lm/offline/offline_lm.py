"""LMs without a network: `offline/echo` and `offline/script`. They answer at once.

Each is a `dspy.LM` on an engine of ours, so a call passes all of DSPy: adapter, LM, parser. A callback notes what the
adapter formats, so the engine knows which fields to answer.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import dspy
from dspy import lm15
from dspy.utils.callback import BaseCallback

from dspy_bridge.lm.event_loop_lm import LoopLM


class Asked(NamedTuple):
    """What an adapter formatted for the LM call that follows."""

    adapter: dspy.Adapter
    signature: type[dspy.Signature]
    inputs: dict[str, Any]


# The answer to messages, given their texts and what was formatted; None for a prompt that no adapter made.
Answer = Callable[[list[str], Asked | None], str]

# Of the LM call that this context makes next.
_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


class WatchFormat(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """A DSPy callback, which these LMs need: it notes what the adapter formats."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        # A `format` that calls its parent's comes here twice, the second time without names.
        if "signature" in inputs and "inputs" in inputs:
            _asked.set(Asked(instance, inputs["signature"], inputs["inputs"]))


_CONNECTION = frozenset(
    ("api_key", "api_base", "base_url", "headers", "extra_headers", "timeout", "api_version", "organization", "project")
)


class OfflineLM(LoopLM):
    """No network, no model: the answers are `answer`'s."""

    # For `meta`: DSPy knows no price of it.
    costs_nothing = True

    def __init__(self, name: str, answer: Answer, **options: Any) -> None:
        """`options`: those of `dspy.LM`; those of a connection are ignored."""
        options = {key: value for key, value in options.items() if key not in _CONNECTION}
        engines = {"engine": _Engine(name, answer), "async_engine": _AsyncEngine(name, answer)}
        super().__init__(name, **{"cache": False, **options, **engines})


class _Engine:
    def __init__(self, name: str, answer: Answer) -> None:
        self._name = name
        self._answer = answer

    def complete(self, request: Any) -> Any:
        texts = [message.text or "" for message in request.messages]
        text = self._answer(texts, _asked.get())
        read, written = sum(len(given.split()) for given in texts), len(text.split())
        return lm15.Response(
            id=None,
            model=self._name,
            message=lm15.Message.assistant([lm15.TextPart(text)]),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=read, output_tokens=written, total_tokens=read + written),
        )


class _AsyncEngine(_Engine):
    async def complete(self, request: Any) -> Any:
        return super().complete(request)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        response = super().complete(request)
        yield lm15.StreamStartEvent(model=self._name)
        for word in re.findall(r"\s*\S+|\s+", response.message.text or ""):
            yield lm15.StreamDeltaEvent(lm15.TextDelta(word))
        yield lm15.StreamEndEvent(finish_reason="stop", usage=response.usage)
