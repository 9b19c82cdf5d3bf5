"""`offline/echo`: an LM for demos, self-tests and CI.

Text fields echo the inputs, others get a value of their type, always the same for the same question.
"""

from __future__ import annotations

from typing import Any

import dspy
import pydantic

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.offline.offline_lm import Asked

NAME = "offline/echo"

_BY_FORMAT = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "https://example.org/",
    "email": "echo@example.org",
}


def answer(texts: list[str], asked: Asked | None) -> str:
    return _echo(texts[-1]) if asked is None else _answer(*asked)


def _answer(adapter: dspy.Adapter, signature: type[dspy.Signature], inputs: dict[str, Any]) -> str:
    names = [name for name in signature.input_fields if name in inputs and name not in ("trajectory", "tools")]
    said = _echo(" | ".join(str(inputs[name]) for name in names))
    outputs = {}
    step = _react_step(signature, inputs, said)
    for name, field in signature.output_fields.items():
        if name in step:
            outputs[name] = step[name]
        elif field.annotation is dspy.ToolCalls:
            tools = inputs.get("tools", ())[:1]
            calls = [{"name": tool.name, "args": _tool_args(tool, inputs, said)} for tool in tools]
            outputs[name] = dspy.ToolCalls.from_dict_list(calls)
        elif field.annotation is str and not field.metadata:
            outputs[name] = said
        else:
            schema = pydantic.TypeAdapter(field.rebuild_annotation()).json_schema()
            outputs[name] = _value(schema, schema.get("$defs", {}), name)
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


def _value(schema: dict[str, Any], definitions: dict[str, Any], name: str, depth: int = 0) -> Any:
    """A simple value that fits a JSON schema as pydantic writes it."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    if "const" in schema:
        return schema["const"]
    for choices in ("examples", "enum"):
        if schema.get(choices):
            return schema[choices][0]
    for choices in ("anyOf", "oneOf", "allOf"):
        if choices in schema:
            chosen = next((one for one in schema[choices] if one.get("type") != "null"), schema[choices][0])
            return _value(chosen, definitions, name, depth)
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
        low, high = (schema.get(f"{end}imum", schema.get(f"exclusive{end.title()}imum")) for end in ("min", "max"))
        low = low if low is not None else 0 if high is None else min(0, high - 1)
        middle = low + 1 if high is None else (low + high) / 2
        return int(middle) if kind == "integer" else float(middle)
    if kind in ("boolean", "null"):
        return True if kind == "boolean" else None
    text = _BY_FORMAT.get(schema.get("format", ""), _echo(name))
    return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]


def _object(schema: dict[str, Any], definitions: dict[str, Any], depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    if properties:
        # Deep in a type that contains itself only what is required.
        names = [name for name in properties if depth <= 8 or name in schema.get("required", ())]
        return {name: _value(properties[name], definitions, name, depth + 1) for name in names}
    values = schema.get("additionalProperties")
    if values is False:
        return {}
    # A name that is a number, too: a schema does not tell the type of the keys.
    key = "1" if "propertyNames" not in schema else _value(schema["propertyNames"], definitions, "key", depth + 1)
    return {key: _value(values if isinstance(values, dict) else {}, definitions, "key", depth + 1)}
