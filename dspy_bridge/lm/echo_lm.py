"""`offline/echo`: an LM that needs no network, for demos, self-tests and CI. It knows nothing and answers at once.

It is a real `dspy.LM` on an engine of ours, so a call takes DSPy's whole way: adapter, LM, parser. What the adapter
was asked to format tells the engine which fields to answer; text fields echo the inputs, others get a value of their
type, always the same for the same question.
"""

from __future__ import annotations

import re
import types
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any, Literal, Union, get_args, get_origin

import dspy
import pydantic
from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    TextPart,
    Usage,
)
from dspy.utils.callback import BaseCallback

from dspy_bridge.lm.event_loop_lm import LoopLM

NAME = "offline/echo"

# Of the LM call that is about to be made in this context: its adapter, signature and inputs.
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
    """A DSPy callback that must be active where `EchoLM` answers: it notes what the adapter formats."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Called by DSPy in the context of the LM call that follows."""
        # An adapter's `format` that calls its parent's shows here twice, the second time without names.
        if "signature" in inputs and "inputs" in inputs:
            _asked.set((instance, inputs["signature"], inputs["inputs"]))


class EchoLM(LoopLM):
    """For demos, self-tests and CI: no network, no model, the same answer to the same question."""

    def __init__(self, **options: Any) -> None:
        """`options`: those of `dspy.LM`; what configures a connection has nothing to configure here."""
        engine = _Engine()
        options = {name: value for name, value in options.items() if name not in _CONNECTION}
        options.setdefault("cache", False)
        super().__init__(NAME, engine=engine, async_engine=_AsyncEngine(engine), **options)


_CONNECTION = frozenset(
    ("api_key", "api_base", "base_url", "headers", "extra_headers", "timeout", "api_version", "organization", "project")
)


class _Engine:
    def complete(self, request: Request) -> Response:
        asked = _asked.get()
        text = _echo(request.messages[-1].text or "") if asked is None else _answer(*asked)
        words = sum(len((message.text or "").split()) for message in request.messages)
        usage = Usage(input_tokens=words, output_tokens=len(text.split()), total_tokens=words + len(text.split()))
        return Response(
            id=None, model=NAME, message=Message.assistant([TextPart(text)]), finish_reason="stop", usage=usage
        )


class _AsyncEngine:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    async def complete(self, request: Request) -> Response:
        return self._engine.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        response = self._engine.complete(request)
        yield StreamStartEvent(model=NAME)
        for word in re.findall(r"\s*\S+|\s+", response.message.text or ""):
            yield StreamDeltaEvent(TextDelta(word))
        yield StreamEndEvent(finish_reason="stop", usage=response.usage)


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
    """Of a ReAct: its first tool is called once, text arguments echo the first input, then it is finished."""
    if "next_tool_name" not in signature.output_fields:
        return {}
    tools: dict[str, dspy.Tool] = next(
        (module.tools for module in dspy.settings.caller_modules or () if hasattr(module, "tools")), {}
    )
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
    """The plainest value of a type: containers by their arguments, all else by its JSON schema."""
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
    """The plainest value that fits a JSON schema as pydantic writes it."""
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
        # Of a type that contains itself only what must be there.
        names = [name for name in properties if depth <= 8 or name in required]
        return {name: _value(properties[name], definitions, name, depth + 1) for name in names}
    values = schema.get("additionalProperties")
    if values is False:
        return {}
    value = values if isinstance(values, dict) and values else {"type": "string"}
    return {"key": _value(value, definitions, "key", depth + 1)}
