"""LMs without a network: `offline/echo` and `offline/script`. They answer at once.

Each is a `dspy.LM` on an engine of ours, so a call passes all of DSPy: adapter, LM, parser. A callback notes what the
adapter formats, so the engine knows which fields to answer.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import dspy
from dspy.utils.callback import BaseCallback

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.event_loop_lm import LoopLM

try:
    from dspy import lm15
except ImportError:  # DSPy 3.3, where an LM has no engine
    lm15 = None
# Whether an LM's `engine` may be chosen.
ENGINES = lm15 is not None


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


class _WithoutEngine:
    """The methods by which an LM answers in DSPy 3.3, in OpenAI's format."""

    supports_function_calling = supports_reasoning = supports_response_schema = False
    supported_params: frozenset[str] = frozenset()
    model: str
    answer: Answer

    def forward(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **_options: Any) -> Any:
        texts = [str(message.get("content")) for message in messages or [{"content": prompt}]]
        text, usage = _reply(self.answer, texts)
        message = SimpleNamespace(content=text, provider_specific_fields={})
        names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
        return SimpleNamespace(
            model=self.model,
            choices=[SimpleNamespace(index=0, message=message, finish_reason="stop")],
            usage={name: usage[given] for name, given in names.items()},
        )

    async def aforward(self, *args: Any, **options: Any) -> Any:
        response = self.forward(*args, **options)
        stream = dspy_internals.SEND_STREAM.there and dspy.settings[dspy_internals.SEND_STREAM.attribute]
        if stream:
            for word in words(response.choices[0].message.content):
                choice = SimpleNamespace(delta=SimpleNamespace(content=word), finish_reason=None)
                predictor = dspy.settings[dspy_internals.CALLER_PREDICT.attribute]
                await stream.send(SimpleNamespace(predict_id=id(predictor), choices=[choice]))
        return response


class OfflineLM(*((LoopLM,) if ENGINES else (_WithoutEngine, LoopLM))):  # type: ignore[misc]
    """No network, no model: the answers are `answer`'s."""

    # For `meta`: DSPy knows no price of it.
    costs_nothing = True

    def __init__(self, name: str, answer: Answer, **options: Any) -> None:
        """`options`: those of `dspy.LM`; those of a connection are ignored."""
        options = {key: value for key, value in options.items() if key not in _CONNECTION}
        engines = {"engine": _Engine(name, answer), "async_engine": _AsyncEngine(name, answer)} if ENGINES else {}
        super().__init__(name, **{"cache": False, **options, **engines})
        self.answer = answer


_CONNECTION = frozenset(
    ("api_key", "api_base", "base_url", "headers", "extra_headers", "timeout", "api_version", "organization", "project")
)


class _Engine:
    def __init__(self, name: str, answer: Answer) -> None:
        self._name = name
        self._answer = answer

    def complete(self, request: Any) -> Any:
        text, usage = _reply(self._answer, [message.text or "" for message in request.messages])
        return lm15.Response(
            id=None,
            model=self._name,
            message=lm15.Message.assistant([lm15.TextPart(text)]),
            finish_reason="stop",
            usage=lm15.Usage(**usage),
        )


class _AsyncEngine:
    def __init__(self, name: str, answer: Answer) -> None:
        self._name = name
        self._engine = _Engine(name, answer)

    async def complete(self, request: Any) -> Any:
        return self._engine.complete(request)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        response = self._engine.complete(request)
        yield lm15.StreamStartEvent(model=self._name)
        for word in words(response.message.text or ""):
            yield lm15.StreamDeltaEvent(lm15.TextDelta(word))
        yield lm15.StreamEndEvent(finish_reason="stop", usage=response.usage)


def _reply(answer: Answer, texts: list[str]) -> tuple[str, dict[str, int]]:
    """The answer to messages, and how many words it took."""
    text = answer(texts, _asked.get())
    read, written = sum(len(given.split()) for given in texts), len(text.split())
    return text, {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}


def words(text: str) -> list[str]:
    """The pieces in which an answer is streamed."""
    return re.findall(r"\s*\S+|\s+", text)
