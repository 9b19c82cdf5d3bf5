"""One execute's stream: what DSPy's field listeners hear goes to the caller as it comes. Imports DSPy.

DSPy sends the chunks of an LM's answer to `send_stream` of its settings, awaited by the very task that reads from the
provider: a caller that does not take more stops that reading, and nothing is stored in between.
"""

from __future__ import annotations

from typing import Any

import dspy
from dspy.streaming import StatusMessage, StreamListener
from dspy.utils.callback import BaseCallback

from dspy_bridge.calls import Call

# Adapters whose answers DSPy's listeners can read. None is the chat adapter.
_READABLE = frozenset((None, "ChatAdapter", "JSONAdapter", "XMLAdapter"))


class Stream:
    """What is told of one execute. In DSPy's settings it takes the place of the stream that `dspy.streamify` makes."""

    def __init__(self, module: dspy.Module, fields: list[str], adapter: dspy.Adapter | None, call: Call) -> None:
        """`fields`: the program's outputs, as far as they are texts.

        With them the reasoning is told that comes from the same predictor. What other predictors write is no output.
        """
        self._call = call
        self._fields = [*fields, "reasoning"]
        # Chunks told by field, which listeners hold back where they may be part of a marker.
        self._told: set[str] = set()
        self._listeners: dict[int, list[StreamListener]] = {}
        kind = None if adapter is None else type(adapter).__name__
        for name, predictor in module.named_predictors() if kind in _READABLE else ():
            outputs = predictor.signature.output_fields
            heard = [field for field in outputs if field in self._fields and outputs[field].annotation is str]
            if any(field in fields for field in heard):
                # New for each execute: one ends with its first answer (stanfordnlp/dspy issue 8425). A predictor may be
                # called several times in one, so each starts over after that.
                self._listeners[id(predictor)] = [
                    StreamListener(field, predict=predictor, predict_name=name, allow_reuse=True) for field in heard
                ]

    def settings(self) -> dict[str, Any]:
        """DSPy's settings for the execute."""
        return {
            "send_stream": self if self._listeners else None,
            "stream_listeners": [listener for listeners in self._listeners.values() for listener in listeners],
            "callbacks": [*dspy.settings.callbacks, _Steps(self._call)],
        }

    async def send(self, value: Any) -> None:
        """Called by DSPy with each chunk of an LM's answer, and by modules with what they want to be told."""
        if isinstance(value, StatusMessage):
            await self._call.tell({"status": value.message})
            return
        for listener in self._listeners.get(getattr(value, "predict_id", None) or 0, ()):
            await self._chunk(listener.receive(value))

    async def finish(self, outputs: dict[str, Any]) -> None:
        """The execute is over: what was held back, and whole what did not come in chunks (from a cache, say)."""
        for listeners in self._listeners.values():
            for listener in listeners:
                await self._chunk(listener.finalize())
        for field in self._fields:
            text = outputs.get(field)
            if field not in self._told and isinstance(text, str) and text:
                await self._call.tell({"field": field, "chunk": text})

    async def _chunk(self, heard: Any) -> None:
        if heard is not None and heard.chunk:
            self._told.add(heard.signature_field_name)
            await self._call.tell({"field": heard.signature_field_name, "chunk": str(heard.chunk)})


class _Steps(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Tells which tools are called. DSPy's own callback for that blocks the event loop until its message is taken."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name != "finish":
            self._call.note({"status": f"calling tool {instance.name}"})
