"""One execute's stream: the fields of an LM's answer go to the caller as they come. Imports DSPy.

DSPy sends the pieces of an LM's answer to `send_stream` of its settings, awaited by the very task that reads from the
provider: a caller that does not take more stops that reading, and nothing is stored in between.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.streaming import StatusMessage
from dspy.utils.callback import BaseCallback

from dspy_bridge.caller import Caller
from dspy_bridge.lm import dspy_internals, guarded_adapters
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.streaming import field_parsers
from dspy_bridge.streaming.json_fields import JSONReader

_READERS: dict[type, type[field_parsers.Reader]] = {
    dspy.ChatAdapter: field_parsers.ChatReader,
    dspy.JSONAdapter: JSONReader,
    dspy.XMLAdapter: field_parsers.XMLReader,
    guarded_adapters.ChatAdapter: field_parsers.ChatReader,
    guarded_adapters.JSONAdapter: JSONReader,
    guarded_adapters.XMLAdapter: field_parsers.XMLReader,
}
# What DSPy's modules let an LM write before the outputs.
_BEFORE = ("reasoning", "rationale")
# An LM that never waits leaves the event loop to others this often, in seconds.
_STRETCH = 0.005


class _Answer:
    """The answer to one LM call; other adapters' than those above nobody can read."""

    def __init__(self, adapter: dspy.Adapter) -> None:
        self.format = _READERS.get(type(adapter))
        self.reader: field_parsers.Reader | None = None


# Of the LM call that is about to be made in this context, or under way.
_answer: ContextVar[_Answer | None] = ContextVar("answer", default=None)


class Stream:
    """What is told of one execute. In DSPy's settings it takes the place of the stream that `dspy.streamify` makes."""

    def __init__(self, module: dspy.Module, fields: list[str], call: Caller, *, on_loop: bool) -> None:
        """`fields`: the program's outputs, as far as they are texts. `on_loop`: the module does not run in a thread.

        With the fields the reasoning is told that comes from the same predictor. What other predictors write is no
        output; of several that write the same one, the last is taken for the one whose answer counts.
        """
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._on_loop = on_loop
        self._left = time.monotonic()
        self._fields = list(dict.fromkeys((*_BEFORE, *fields)))
        self._told: dict[str, list[str]] = {}
        # By predictor.
        self._heard: dict[int, set[str]] = {}
        self._predictors: list[dspy.Predict] = []
        self._in_pieces = dspy_internals.SEND_STREAM.there and dspy_internals.STREAM_LISTENERS.there
        left = set(self._fields)
        for predictor in reversed(module.predictors()):
            outputs = predictor.signature.output_fields
            heard = {name for name in left if name in outputs and outputs[name].annotation is str}
            # From a thread only these LMs can stream.
            streams = on_loop or isinstance(predictor.lm or dspy.settings.lm, LoopLM)
            # DSPy refuses to stream decisions, which its 3.3 does not have.
            if streams and not heard.isdisjoint(fields) and not getattr(predictor, "fields", None):
                self._heard[id(predictor)] = heard
                self._predictors.append(predictor)
                left -= heard

    def settings(self) -> dict[str, Any]:
        """DSPy's settings for the execute."""
        settings: dict[str, Any] = {"callbacks": [*dspy.settings.callbacks, _Watch(self._call)]}
        if self._in_pieces:
            stream = self if self._predictors or self._on_loop else None
            # All that DSPy wants to know of a listener: whose answers to send. Without any it would send all.
            listeners = [SimpleNamespace(predict=predictor) for predictor in self._predictors or (None,)]
            settings[dspy_internals.SEND_STREAM.attribute] = stream
            settings[dspy_internals.STREAM_LISTENERS.attribute] = listeners
        return settings

    async def send(self, value: Any) -> None:
        """Called by DSPy with each piece of an LM's answer, and by modules with what they want to be told."""
        if isinstance(value, StatusMessage):
            # DSPy's helper for sync code sends it on an event loop of its own.
            if asyncio.get_running_loop() is self._loop:
                await self._call.stream_item({"status": str(value.message)})
            else:
                self._call.stream_item_threadsafe({"status": str(value.message)})
            return
        told = False
        for field, text in self._read(value):
            told = True
            self._told.setdefault(field, []).append(text)
            telling = self._call.stream_item({"field": field, "chunk": text})
            if asyncio.get_running_loop() is self._loop:
                await telling
            else:
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(telling, self._loop))
        _allow_another_try(told)
        if time.monotonic() - self._left > _STRETCH:
            await asyncio.sleep(0)
            self._left = time.monotonic()

    def _read(self, piece: Any) -> list[field_parsers.Told]:
        answer = _answer.get()
        heard = self._heard.get(getattr(piece, "predict_id", None) or 0)
        if heard is None or answer is None or answer.format is None or not piece.choices:
            return []
        choice = piece.choices[0]
        if getattr(choice, "index", 0):
            return []
        if answer.reader is None:
            answer.reader = answer.format(heard)
        told = list(answer.reader.feed(choice.delta.content or ""))
        if choice.finish_reason is not None:
            # What follows is another completion (`n`); the first one is the result.
            answer.format = None
        return told

    async def finish(self, outputs: dict[str, Any]) -> None:
        """The execute is over: what was not told in pieces is told now, whole (from a cache, say) or the rest."""
        await asyncio.sleep(0)  # what another thread has noted goes first
        for field in self._fields:
            text = outputs.get(field)
            if isinstance(text, str) and (rest := field_parsers.rest("".join(self._told.get(field, ())), text)):
                await self._call.stream_item({"field": field, "chunk": rest})


def _allow_another_try(told: bool) -> None:
    """An adapter tries again, in JSON, if the answer cannot be read, but not once something of it was shown.

    DSPy takes any piece for shown; here that is only what the caller was told.
    """
    for progress in dspy_internals.ADAPTER_CALLS.value.get() if dspy_internals.ADAPTER_CALLS.there else ():
        progress.told = told or getattr(progress, "told", False)
        progress.emitted = progress.told


class _Watch(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Notes which format an answer will have, and tells which tools are called.

    DSPy's own callback for tools blocks the event loop until its message is taken.
    """

    def __init__(self, call: Caller) -> None:
        self._call = call

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        _answer.set(_Answer(instance))

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name != "finish":
            self._call.stream_item_threadsafe({"status": f"calling tool {instance.name}"})
