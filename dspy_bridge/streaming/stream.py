"""Streams the fields of an LM's answer to the caller. Imports DSPy.

DSPy sends the pieces of an answer to its setting `send_stream`, awaited by the task that reads from the provider: a
slow caller slows that reading, and nothing is buffered in between.
"""

from __future__ import annotations

import asyncio
import functools
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_bridge.dispatch.call import Call
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.adapters import guarded_adapters
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.streaming import field_parsers

_READERS: dict[type, type[field_parsers.Reader]] = {
    dspy.ChatAdapter: field_parsers.ChatReader,
    dspy.JSONAdapter: field_parsers.JSONReader,
    dspy.XMLAdapter: field_parsers.XMLReader,
}
_READERS |= {guarded_adapters.GUARDED[kind]: reader for kind, reader in _READERS.items()}
# Fields of DSPy's modules before the outputs.
_BEFORE = ("reasoning", "rationale")
# The answer to the LM call that this context makes: its `format`, None for adapters other than those above, and its
# `reader`.
_answer: ContextVar[Any] = ContextVar("answer", default=None)


def _is_text(annotation: Any, *more: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, (str, dspy.Reasoning, *more))


class Stream:
    """The stream of one call. In DSPy's settings it replaces the stream of `dspy.streamify`."""

    def __init__(self, module: dspy.Module, signature: type[dspy.Signature], call: Call, *, on_loop: bool) -> None:
        """`signature`: the program's. `on_loop`: whether the module runs on the event loop.

        Streams its outputs of text, and the reasoning of the predictors that write its outputs. Code comes in one
        piece: the LM writes it in a block of Markdown, which is not a part of it. If several
        predictors write a field, the last one is assumed to be the one whose value counts.
        """
        self._call = call
        self._on_loop = on_loop
        fields = [name for name, field in signature.output_fields.items() if _is_text(field.annotation, dspy.Code)]
        self._fields = list(dict.fromkeys((*_BEFORE, *fields)))
        self._sent: dict[str, list[str]] = {}
        # Predictors and what is streamed of each, by their ids.
        self._streamed: dict[int, tuple[dspy.Predict, set[str]]] = {}
        self._in_pieces = dspy_internals.SEND_STREAM.there and dspy_internals.STREAM_LISTENERS.there
        left, unwritten = set(self._fields), set(signature.output_fields)
        for predictor in reversed(module.predictors()):
            outputs = predictor.signature.output_fields
            names = {name for name in left if name in outputs and _is_text(outputs[name].annotation)}
            # From a thread only these LMs can stream.
            streams = on_loop or isinstance(predictor.lm or dspy.settings.lm, LoopLM)
            # DSPy refuses to stream decisions.
            if streams and getattr(predictor, "submits", False):
                self._streamed[id(predictor)] = predictor, left
            elif streams and names and not unwritten.isdisjoint(outputs) and not getattr(predictor, "fields", None):
                self._streamed[id(predictor)] = predictor, names
                left -= names
                unwritten -= outputs.keys()

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"callbacks": [*dspy.settings.callbacks, _Watch(self._call)]}
        if self._in_pieces:
            settings[dspy_internals.SEND_STREAM.attribute] = self if self._streamed or self._on_loop else None
            # DSPy sends the answers of the listeners' predictors, and without listeners all answers.
            predictors = [predictor for predictor, _ in self._streamed.values()] or [None]
            listeners = [SimpleNamespace(predict=predictor) for predictor in predictors]
            settings[dspy_internals.STREAM_LISTENERS.attribute] = listeners
        return settings

    async def replay(self, result: Any) -> None:
        """The answer that a journal has, in one piece."""
        names = dspy_internals.CALLER_MODULES
        callers = dspy.settings[names.attribute] if names.there else None
        output = result.outputs[0] if result.outputs else None
        output = output if isinstance(output, dict) else {"text": output}
        # As DSPy has them in a stream.
        calls = [
            SimpleNamespace(index=index, function=SimpleNamespace(**call["function"]))
            for index, call in enumerate(output.get("tool_calls") or ())
        ]
        delta = SimpleNamespace(content=output.get("text"), tool_calls=calls)
        choice = SimpleNamespace(delta=delta, finish_reason="stop")
        piece = SimpleNamespace(predict_id=id(callers[-1]) if callers else 0, choices=[choice])
        await self.send(piece, replayed=True)

    async def send(self, piece: Any, *, replayed: bool = False) -> None:
        """Called by DSPy with each piece of an LM's answer."""
        chunks = self._read(piece)
        for field, text in chunks:
            self._sent.setdefault(field, []).append(text)
            item = {"field": field, "chunk": text, **({"replayed": True} if replayed else {})}
            # From sync code it may be called on another loop.
            await lm_call.on_main_loop(self._call.stream_item(item))
        # DSPy notes for any piece that something was streamed. If nothing was sent and the answer cannot be parsed, the
        # adapter makes a second attempt, in JSON.
        for progress in dspy_internals.ADAPTER_CALLS.value.get() if dspy_internals.ADAPTER_CALLS.there else ():
            progress.emitted = progress.sent = bool(chunks) or getattr(progress, "sent", False)

    def _read(self, piece: Any) -> list[field_parsers.Chunk]:
        answer = _answer.get()
        streamed = self._streamed.get(getattr(piece, "predict_id", None) or 0)
        if streamed is None or answer is None or answer.format is None or not piece.choices:
            return []
        choice = piece.choices[0]
        if getattr(choice, "index", 0):
            return []
        if answer.reader is None:
            submits = getattr(streamed[0], "submits", False)
            make = functools.partial(field_parsers.SubmitReader, text=answer.format) if submits else answer.format
            answer.reader = make(streamed[1])
        chunks = list(answer.reader.feed(choice.delta.content or ""))
        if isinstance(answer.reader, field_parsers.SubmitReader):
            for call in getattr(choice.delta, "tool_calls", None) or ():
                chunks += answer.reader.native(
                    call.index, getattr(call.function, "name", None), call.function.arguments
                )
        if choice.finish_reason is not None:
            # Further completions (`n`) follow; the first one is the result.
            answer.format = None
        return chunks

    def begin_anew(self) -> None:
        """An LM is asked again: the client drops the chunks up to now."""
        for field in self._sent:
            self._call.stream_item_threadsafe({"field": field, "reset": True})
        self._sent.clear()

    async def finish(self, outputs: dict[str, Any]) -> None:
        """Send the unsent rest of each field; the whole of it if the answer came from a cache."""
        await asyncio.sleep(0)  # messages from other threads go first
        for field in self._fields:
            text = outputs.get(field)
            sent = "".join(self._sent.get(field, ()))
            if not isinstance(text, str) or text == sent:
                continue
            if not text.startswith(sent):
                await self._call.stream_item({"field": field, "reset": True})
                sent = ""
            await self._call.stream_item({"field": field, "chunk": text[len(sent) :]})


class _Watch(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """Records the format of the next answer, and sends a status for each tool call.

    DSPy's own callback for tools blocks the event loop until its message is received.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the next LM call."""
        _answer.set(SimpleNamespace(format=_READERS.get(type(instance)), reader=None))

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name not in ("finish", "submit"):  # the end of a ReAct
            self._call.stream_item_threadsafe({"status": f"calling tool {instance.name}"})
