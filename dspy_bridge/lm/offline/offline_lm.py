"""LMs without a network, which answer at once: what `offline/echo` has in common with `offline/script`, and that one.

Each is a `dspy.LM` on an engine of ours, so a call passes all of DSPy: adapter, LM, parser. A callback notes what the
adapter formats, so the engine knows which fields to answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import dspy
from dspy import lm15
from dspy.utils.callback import BaseCallback

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.wire.json_values import encode_value


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


# An LM whose answers the client chooses, for tests.
SCRIPT = "offline/script"
# The key of an object's answer to all questions without one of their own.
_ANY = "*"
# Fields of DSPy's modules, which an object of fields may leave out.
_LEFT_OUT: dict[str, Any] = {"reasoning": "", "rationale": "", "next_thought": "", "next_tool_args": {}}


class NoAnswer(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """The script has no answer to what the LM was asked."""

    def __init__(self, text: str) -> None:
        super().__init__(text, model=SCRIPT)


class Script:
    """The answers of one LM, or of several with one list.

    `answers` is a list, from which each LM call takes the next one, or an object of texts and answers. An answer is a
    string, which is sent as it is, or an object of output fields, which is written in the adapter's format.
    """

    def __init__(self, answers: object) -> None:
        """Raises `InvalidArgs`."""
        if not isinstance(answers, (list, dict)) or not answers:
            raise InvalidArgs("lm.answers: expected a list of answers, or an object of texts and answers")
        for where, one in answers.items() if isinstance(answers, dict) else enumerate(answers):
            if not isinstance(one, (str, dict)):
                place = short(where) if isinstance(where, str) else where
                raise InvalidArgs(f"lm.answers[{place}]: expected text, or an object of output fields")
        # A copy: it grows.
        self._answers = answers if isinstance(answers, dict) else list(answers)
        self._taken = 0
        # LMs are called in several threads.
        self._lock = threading.Lock()

    def answer(self, texts: list[str], asked: Asked | None) -> str:
        """The answer to messages, whose texts are given. Raises `NoAnswer`."""
        chosen = self._next() if isinstance(self._answers, list) else self._matching(self._answers, texts[-1])
        if isinstance(chosen, str):
            return chosen
        if asked is None:
            return encode_value(chosen).decode()
        return _written(self._for_react(chosen, asked.signature.output_fields), asked)

    def _for_react(self, fields: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """The fields of DSPy's ReAct by trajectory for the one by history, and the other way round."""
        step = {"next_thought": fields["next_thought"]} if "next_thought" in fields else {}
        if "next_thought" in outputs and "next_tool_name" not in outputs:
            if fields.keys() <= outputs.keys():
                return fields
            call = {"name": fields.get("next_tool_name", "submit"), "args": fields.get("next_tool_args", {})}
            if call["name"] in ("finish", "submit"):
                # By trajectory the outputs are the next answer.
                ends = "next_tool_name" in fields and isinstance(self._answers, list)
                call = {"name": "submit", "args": self._next() if ends else fields}
            return {**step, "tool_calls": [call]}
        calls = fields.get("tool_calls")
        if "tool_calls" in outputs or not calls:
            return fields
        call = dspy.ToolCalls.model_validate(calls).tool_calls[0]
        if "next_tool_name" not in outputs:
            return dict(call.args)
        if call.name != "submit":
            return {**step, "next_tool_name": call.name, "next_tool_args": call.args}
        if isinstance(self._answers, list):
            with self._lock:
                self._answers.insert(self._taken, call.args)
        return {**step, "next_tool_name": "finish"}

    def _next(self) -> Any:
        with self._lock:
            if self._taken == len(self._answers):
                raise NoAnswer(f"all {self._taken} answers are used")
            self._taken += 1
            return self._answers[self._taken - 1]

    def _matching(self, answers: dict[str, Any], question: str) -> Any:
        # The longest text says most about the question.
        found = max((text for text in answers if text != _ANY and text in question), key=len, default=_ANY)
        if found not in answers:
            raise NoAnswer(f"the last message contains none of the {len(answers)} texts of its answers")
        return answers[found]


def _written(fields: dict[str, Any], asked: Asked) -> str:
    """An answer of these fields alone, in the adapter's format."""
    signature = asked.signature
    for name in fields:
        if name not in signature.output_fields:
            expected = ", ".join(signature.output_fields)
            raise NoAnswer(f"its answer has an unknown field {short(name)}; expected {expected}")
    values = {name: _LEFT_OUT[name] for name in signature.output_fields if name in _LEFT_OUT} | fields
    for name, field in signature.output_fields.items():
        if name not in values:
            signature = signature.delete(name)
        elif field.annotation is dspy.ToolCalls:
            values[name] = dspy.ToolCalls.model_validate(values[name])
    return written(asked.adapter, signature, values)


def written(adapter: dspy.Adapter, signature: Any, values: dict[str, Any]) -> str:
    """An answer in the adapter's format."""
    if isinstance(adapter, dspy.XMLAdapter):
        values = dict(values)
        for name, field in signature.output_fields.items():
            if field.annotation is dspy.ToolCalls:
                # DSPy 3.4 writes and reads JSON inside of XML.
                calls = json.dumps(values[name].format(), default=str)
                values[name] = calls.replace("&", "\\u0026").replace("<", "\\u003c")
            elif field.annotation is dspy.Reasoning and values[name] == "":
                values[name] = "…"  # it cannot read an empty one
    text: str = adapter.format_assistant_message_content(signature, values)
    return text
