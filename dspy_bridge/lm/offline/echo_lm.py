"""`offline/echo`: an LM for demos, self-tests and CI.

Text fields echo the inputs, others get a value of their type, always the same for the same question.
"""

from __future__ import annotations

from typing import Any

import dspy
import pydantic

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.offline.offline_lm import Asked, written

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
    history, tools = inputs.get("history"), inputs.get("tools", ())
    if isinstance(history, dspy.History) and (ending := _ending(history, tools)):
        # A step of a ReAct after the first one: the question is in its history.
        asked = (message for message in history.messages[::-1] if not message.keys().isdisjoint(signature.input_fields))
        inputs, tools = next(asked, {}), (ending,)
    own = {"trajectory", "tools", *(name for name, value in inputs.items() if isinstance(value, dspy.History))}
    names = [name for name in signature.input_fields if name in inputs and name not in own]
    said = _echo(" | ".join(str(inputs[name]) for name in names))
    outputs = {}
    step = _react_step(signature, inputs, said)
    for name, field in signature.output_fields.items():
        if name in step:
            outputs[name] = step[name]
        elif field.annotation is dspy.ToolCalls:
            calls = [{"name": tool.name, "args": _tool_args(tool, inputs, said)} for tool in tools[:1]]
            outputs[name] = dspy.ToolCalls.from_dict_list(calls)
        elif field.annotation in (str, dspy.Reasoning) and not field.metadata:
            outputs[name] = said
        else:
            schema = pydantic.TypeAdapter(field.rebuild_annotation()).json_schema()
            outputs[name] = _value(schema, schema.get("$defs", {}), name)
    return written(adapter, signature, outputs)


def _ending(history: dspy.History, tools: Any) -> dspy.Tool | None:
    """The tool that ends a ReAct by history, if one has been called since the question."""
    called = history.messages[-1].get("tool_calls") if history.messages else None
    if called is None or any(call.name == "submit" for call in called.tool_calls):
        return None
    return next((tool for tool in tools if tool.name == "submit"), None)


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
    kinds, submit = tool.args, tool.name == "submit"
    if submit:
        kinds = {arg: validator.json_schema() for arg, validator in getattr(tool.func, "declared", {}).items()}
    return {
        arg: (said if submit else asked)
        if schema.get("type") == "string" and not (submit and len(schema) > 1)
        else _value(schema, schema.get("$defs", {}), arg)
        for arg, schema in kinds.items()
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
