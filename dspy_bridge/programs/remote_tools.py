"""Tools that the caller runs: `dspy.Tool`s made of their definitions. Imports DSPy."""

from __future__ import annotations

import asyncio
import inspect
import keyword
import re
from contextvars import ContextVar
from typing import Any

import dspy
import pydantic

from dspy_bridge.caller import Caller
from dspy_bridge.errors import InvalidArgs, ToolFailed, refuse_unknown
from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.adapters import field_markers
from dspy_bridge.lm.transport import admission
from dspy_bridge.runtime import worker_threads
from dspy_bridge.signatures.builder import description
from dspy_bridge.signatures.type_parser import read_type

# Parameters of `dspy.Tool` and its callbacks.
_NOT_AS_ARGUMENT = ("self", "instance")
# What providers with native function calling accept.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
MAX_TOOLS = 128
# Per tool. A call of it holds the event loop for 0.4 ms for each.
MAX_ARGS = 100

# The call that this context belongs to; all runs of a program share its tools.
current_call: ContextVar[Caller] = ContextVar("current_call")


class RemoteTool(dspy.Tool):  # type: ignore[misc]  # DSPy ships no types
    """A tool that the caller runs. DSPy checks the arguments before."""

    def __call__(self, **arguments: Any) -> Any:
        """Called by a sync module, in its worker thread."""
        job = worker_threads.current.get()
        if job is None:
            raise ToolFailed(f"{self.name}: expected to be called in the thread of its run, or awaited with acall")
        return job.on_loop(self.acall(**arguments))


class AgentTool(RemoteTool):
    """The same for ReAct, which accepts only lists of strings, and shows tracebacks with local paths to the LM."""

    def __init__(self, tool: RemoteTool) -> None:
        super().__init__(tool.func, name=tool.name, desc=tool.desc, args=tool.args, arg_types=tool.arg_types)

    async def acall(self, /, **arguments: Any) -> Any:
        """As `RemoteTool`'s; an error becomes the observation."""
        try:
            result = await super().acall(**arguments)
        except Exception as error:
            # A `ToolFailed` begins with the name, too.
            return f"Execution error in {self.name}: {str(error).removeprefix(f'{self.name}: ')}"
        if isinstance(result, list) and not all(isinstance(item, str) for item in result):
            # DSPy writes a tuple as JSON; a reply has a list again.
            return tuple(result)
        return result


def read(definitions: object, taken: set[str]) -> list[RemoteTool]:
    """The tools of a `create_program`. `taken`: names not allowed. Raises `InvalidArgs`, naming the field."""
    if definitions is None:
        return []
    if not isinstance(definitions, list):
        raise InvalidArgs('tools: expected a list of objects such as {"name": "search", "args": {}}')
    if len(definitions) > MAX_TOOLS:
        raise InvalidArgs(f"tools: expected at most {MAX_TOOLS}")
    tools: dict[str, RemoteTool] = {}
    for index, definition in enumerate(definitions):
        where = f"tools[{index}]"
        name = _name(definition, where)
        if name in taken:
            raise InvalidArgs(f"{where}.name: {name!r} is taken, by a field or by DSPy; choose another")
        if name in tools:
            raise InvalidArgs(f"{where}.name: {name!r} is used twice; expected distinct names")
        tools[name] = _tool(name, definition, where)
    return list(tools.values())


def _name(definition: object, where: str) -> str:
    if not isinstance(definition, dict):
        raise InvalidArgs(f"{where}: expected an object with name, description and args")
    refuse_unknown(definition, ("name", "description", "desc", "args"), where)
    name = definition.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidArgs(f"{where}.name: expected text")
    if not _NAME.fullmatch(name):
        raise InvalidArgs(f"{where}.name: {name[:80]!r} is not a tool name; expected up to 64 letters, digits, _, -")
    return name


def _tool(name: str, definition: dict[str, Any], where: str) -> RemoteTool:
    described = description(definition, where) or ""
    args = definition.get("args", {})
    if not isinstance(args, dict):
        raise InvalidArgs(f'{where}.args: expected an object such as {{"query": {{"type": "str"}}}}')
    if len(args) > MAX_ARGS:
        raise InvalidArgs(f"{where}.args: expected at most {MAX_ARGS}")
    types: dict[str, Any] = {}
    schemas = {}
    for arg, given in args.items():
        here = f"{where}.args.{arg}"
        if not arg.isidentifier() or keyword.iskeyword(arg):
            raise InvalidArgs(f"{here}: not an argument name; expected letters, digits and _, not a keyword")
        if arg in _NOT_AS_ARGUMENT:
            raise InvalidArgs(f"{here}: {arg!r} is an argument of DSPy's own; choose another name")
        # Short form: only the type.
        given = given if isinstance(given, dict) else {"type": given}
        refuse_unknown(given, ("type", "description", "desc"), here)
        types[arg] = read_type(given.get("type"), f"{here}.type")
        schemas[arg] = _schema(types[arg], description(given, here), f"{here}.type")

    async def ask(**arguments: Any) -> Any:
        missing = [arg for arg in args if arg not in arguments]
        if missing:
            raise ToolFailed(f"{name}: missing {', '.join(missing)}; expected {', '.join(args)}")
        return await _ask(name, arguments)

    # What DSPy reads from a function.
    ask.__name__ = name
    ask.__doc__ = described
    ask.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # inspect's own protocol
        [inspect.Parameter(arg, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for arg, kind in types.items()]
    )
    # DSPy itself would drop the constraints of the types.
    return RemoteTool(ask, name=name, desc=described or None, args=schemas, arg_types=types)


def _schema(annotation: Any, described: str | None, where: str) -> dict[str, Any]:
    try:
        schema = pydantic.TypeAdapter(annotation).json_schema()
        if dspy_internals.TOOL_SCHEMAS.there:
            # References are replaced: DSPy and providers want each argument by itself.
            whole = {"properties": {"it": schema}, "$defs": schema.get("$defs", {})}
            schema = dspy_internals.TOOL_SCHEMAS.value(whole)[0]["it"]
    except (pydantic.PydanticUserError, RecursionError):
        raise InvalidArgs(f"{where}: not an argument type; expected one with a JSON Schema, not recursive") from None
    return {**schema, "description": described} if described else schema


async def _ask(name: str, arguments: dict[str, Any]) -> Any:
    """The tool's result, for a prompt: strings that look like DSPy's custom types stay strings."""
    try:
        return field_markers.changed(await _answer(name, arguments), field_markers.without_types)
    except ToolFailed as error:
        raise ToolFailed(field_markers.without_types(str(error))) from None


async def _answer(name: str, arguments: dict[str, Any]) -> Any:
    admission.step()
    question = current_call.get().call_tool(name, arguments)
    job = worker_threads.current.get()
    if job is None or job.loop is asyncio.get_running_loop():
        return await question
    # RLM starts an event loop in its worker thread; the reply comes to the peer's.
    return await asyncio.to_thread(job.on_loop, question)
