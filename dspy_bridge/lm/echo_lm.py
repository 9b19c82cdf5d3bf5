"""`offline/echo`: an LM without a network, for demos, self-tests and CI. It answers at once.

It is a `dspy.LM` on an engine of ours, so a call passes all of DSPy: adapter, LM, parser. A callback notes what the
adapter formats, so the engine knows which fields to answer: text fields echo the inputs, others get a value of their
type, always the same for the same question.
"""

from __future__ import annotations

import re
import types
from collections.abc import AsyncIterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin

import dspy
import pydantic
from dspy.utils.callback import BaseCallback

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.event_loop_lm import LoopLM

try:
    from dspy import lm15
except ImportError:  # DSPy 3.3, where an LM has no engine
    lm15 = None
# Whether an LM's `engine` may be chosen.
ENGINES = lm15 is not None

NAME = "offline/echo"

# Adapter, signature and inputs of the LM call that this context makes next.
_asked: ContextVar[tuple[dspy.Adapter, type[dspy.Signature], dict[str, Any]] | None] = ContextVar("asked", default=None)

_BY_FORMAT = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "https://example.org/",
    "email": "echo@example.org",
}


class WatchFormat(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    """A DSPy callback, which `EchoLM` needs: it notes what the adapter formats."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        # A `format` that calls its parent's comes here twice, the second time without names.
        if "signature" in inputs and "inputs" in inputs:
            _asked.set((instance, inputs["signature"], inputs["inputs"]))


class _WithoutEngine:
    """The methods by which an LM answers in DSPy 3.3, in OpenAI's format."""

    supports_function_calling = supports_reasoning = supports_response_schema = False
    supported_params: frozenset[str] = frozenset()

    def forward(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **_options: Any) -> Any:
        text, usage = _reply([str(message.get("content")) for message in messages or [{"content": prompt}]])
        message = SimpleNamespace(content=text, provider_specific_fields={})
        names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
        return SimpleNamespace(
            model=NAME,
            choices=[SimpleNamespace(index=0, message=message, finish_reason="stop")],
            usage={name: usage[given] for name, given in names.items()},
        )

    async def aforward(self, *args: Any, **options: Any) -> Any:
        response = self.forward(*args, **options)
        stream = dspy_internals.SEND_STREAM.there and dspy.settings[dspy_internals.SEND_STREAM.attribute]
        if stream:
            for word in _words(response.choices[0].message.content):
                choice = SimpleNamespace(delta=SimpleNamespace(content=word), finish_reason=None)
                predictor = dspy.settings[dspy_internals.CALLER_PREDICT.attribute]
                await stream.send(SimpleNamespace(predict_id=id(predictor), choices=[choice]))
        return response


class EchoLM(*((LoopLM,) if ENGINES else (_WithoutEngine, LoopLM))):  # type: ignore[misc]
    """For demos, self-tests and CI: no network, no model, the same answer to the same question."""

    # For `meta`: DSPy knows no price of it.
    costs_nothing = True

    def __init__(self, **options: Any) -> None:
        """`options`: those of `dspy.LM`; those of a connection are ignored."""
        options = {name: value for name, value in options.items() if name not in _CONNECTION}
        engines = {"engine": _Engine(), "async_engine": _AsyncEngine()} if ENGINES else {}
        super().__init__(NAME, **{"cache": False, **options, **engines})


_CONNECTION = frozenset(
    ("api_key", "api_base", "base_url", "headers", "extra_headers", "timeout", "api_version", "organization", "project")
)


class _Engine:
    def complete(self, request: Any) -> Any:
        text, usage = _reply([message.text or "" for message in request.messages])
        return lm15.Response(
            id=None,
            model=NAME,
            message=lm15.Message.assistant([lm15.TextPart(text)]),
            finish_reason="stop",
            usage=lm15.Usage(**usage),
        )


class _AsyncEngine:
    async def complete(self, request: Any) -> Any:
        return _Engine().complete(request)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        response = _Engine().complete(request)
        yield lm15.StreamStartEvent(model=NAME)
        for word in _words(response.message.text or ""):
            yield lm15.StreamDeltaEvent(lm15.TextDelta(word))
        yield lm15.StreamEndEvent(finish_reason="stop", usage=response.usage)


def _reply(texts: list[str]) -> tuple[str, dict[str, int]]:
    """The answer to messages, and how many words it took."""
    asked = _asked.get()
    text = _echo(texts[-1]) if asked is None else _answer(*asked)
    read, written = sum(len(given.split()) for given in texts), len(text.split())
    return text, {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+", text)


def _answer(adapter: dspy.Adapter, signature: type[dspy.Signature], inputs: dict[str, Any]) -> str:
    names = [name for name in signature.input_fields if name in inputs and name not in ("trajectory", "tools")]
    said = _echo(" | ".join(str(inputs[name]) for name in names))
    outputs = {}
    step = _react_step(signature, inputs, said)
    for name, field in signature.output_fields.items():
        if name in step:
            outputs[name] = step[name]
        elif field.annotation is dspy.ToolCalls:
            calls = [
                {"name": tool.name, "args": _tool_args(tool, inputs, said)} for tool in inputs.get("tools", ())[:1]
            ]
            outputs[name] = dspy.ToolCalls.from_dict_list(calls)
        elif field.annotation is str and not field.metadata:
            outputs[name] = said
        else:
            outputs[name] = _typed(field.rebuild_annotation(), name)
    text: str = adapter.format_assistant_message_content(signature, outputs)
    return text


def _react_step(signature: type[dspy.Signature], inputs: dict[str, Any], said: str) -> dict[str, Any]:
    """For a ReAct: it calls its first tool once, with text arguments that echo the first input, then finishes."""
    if "next_tool_name" not in signature.output_fields:
        return {}
    callers = dspy.settings[dspy_internals.CALLER_MODULES.attribute] if dspy_internals.CALLER_MODULES.there else None
    tools: dict[str, dspy.Tool] = next((module.tools for module in callers or () if hasattr(module, "tools")), {})
    name, tool = next(iter(tools.items()), ("finish", None))
    if tool is None or inputs.get("trajectory"):
        return {"next_tool_name": "finish", "next_tool_args": {}}
    return {"next_tool_name": name, "next_tool_args": _tool_args(tool, inputs, said)}


def _tool_args(tool: dspy.Tool, inputs: dict[str, Any], said: str) -> dict[str, Any]:
    asked = next((value for value in inputs.values() if isinstance(value, str) and value), said)
    return {
        arg: asked if schema.get("type") == "string" else _value(schema, schema.get("$defs", {}), arg)
        for arg, schema in tool.args.items()
    }


def _echo(text: str) -> str:
    return f"echo: {text}"


def _typed(annotation: Any, name: str) -> Any:
    """A simple value of a type: containers by their arguments, all else by its JSON schema."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        return _typed(next((kind for kind in arguments if kind is not type(None)), arguments[0]), name)
    if origin is dict:
        return {_typed(arguments[0], "key"): _typed(arguments[1], name)}
    if origin in (list, set, frozenset):
        return [_typed(arguments[0], name)]
    if origin is tuple:
        return [_typed(kind, name) for kind in arguments if kind is not ...]
    schema = pydantic.TypeAdapter(annotation).json_schema()
    return _value(schema, schema.get("$defs", {}), name)


def _value(schema: dict[str, Any], definitions: dict[str, Any], name: str, depth: int = 0) -> Any:
    """A simple value that fits a JSON schema as pydantic writes it."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if schema.get("examples"):
        return schema["examples"][0]
    for choices in ("anyOf", "oneOf", "allOf"):
        if choices in schema:
            return _value(schema[choices][0], definitions, name, depth)
    kind = schema.get("type", "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind == "object":
        return _object(schema, definitions, depth)
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * max(1, schema.get("minItems", 1))
        # A type that contains itself ends in an empty list.
        return [] if depth > 8 else [_value(item, definitions, name, depth + 1) for item in items]
    if kind in ("integer", "number"):
        return _number(schema, kind)
    plain: dict[str, Any] = {"boolean": True, "null": None}
    if kind in plain:
        return plain[kind]
    text = _BY_FORMAT.get(schema.get("format", ""), _echo(name))
    return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]


def _number(schema: dict[str, Any], kind: str) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if "minimum" not in schema and "exclusiveMinimum" not in schema and high is not None:
        low = min(low, high - 1)
    middle = low + 1 if high is None else (low + high) / 2
    if "multipleOf" in schema:
        step = schema["multipleOf"]
        middle = step * (middle // step + (0 if high is not None else 1))
    return int(middle) if kind == "integer" else float(middle)


def _object(schema: dict[str, Any], definitions: dict[str, Any], depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    if properties:
        # Deep in a type that contains itself only what is required.
        names = [name for name in properties if depth <= 8 or name in required]
        return {name: _value(properties[name], definitions, name, depth + 1) for name in names}
    values = schema.get("additionalProperties")
    if values is False:
        return {}
    value = values if isinstance(values, dict) and values else {"type": "string"}
    return {"key": _value(value, definitions, "key", depth + 1)}
