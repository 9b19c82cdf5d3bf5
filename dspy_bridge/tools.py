"""Tools that are functions of the caller's: their definitions to `dspy.Tool`s that ask for them. Imports DSPy."""

from __future__ import annotations

import inspect
import keyword
import re
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_bridge import sync_threads
from dspy_bridge.annotations import read_type
from dspy_bridge.calls import Call
from dspy_bridge.errors import InvalidArgs, ToolFailed

# As providers with native function calling want them.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
MAX_TOOLS = 128

# The execute that this context belongs to: a program's tools are the same for all its executes.
asking: ContextVar[Call] = ContextVar("asking")


class HostTool(dspy.Tool):  # type: ignore[misc]  # DSPy ships no types
    """A tool that the caller of the execute runs. DSPy checks the arguments before it is called."""

    def __call__(self, **arguments: Any) -> Any:
        """From a sync module, in its worker thread."""
        job = sync_threads.current.get()
        if job is None:
            raise ToolFailed(f"{self.name}: called outside of an execute")
        return job.on_loop(self.acall(**arguments))


def read(definitions: object, taken: set[str]) -> list[HostTool]:
    """The tools of a `create_program`; `taken`: names that none may have. Raises `InvalidArgs`, naming the field."""
    if definitions is None:
        return []
    if not isinstance(definitions, list):
        raise InvalidArgs('tools: expected a list of objects such as {"name": "search", "description": "…", "args": {}}')
    if len(definitions) > MAX_TOOLS:
        raise InvalidArgs(f"tools: expected at most {MAX_TOOLS}")
    tools: dict[str, HostTool] = {}
    for index, definition in enumerate(definitions):
        where = f"tools[{index}]"
        name = _name(definition, where)
        if name in taken:
            raise InvalidArgs(f"{where}.name: {name!r} is taken, by a field of the signature or by DSPy; choose another")
        if name in tools:
            raise InvalidArgs(f"{where}.name: {name!r} is used twice; expected distinct names")
        tools[name] = _tool(name, definition, where)
    return list(tools.values())


def _name(definition: object, where: str) -> str:
    if not isinstance(definition, dict):
        raise InvalidArgs(f"{where}: expected an object with name, description and args")
    for key in definition:
        if key not in ("name", "description", "desc", "args"):
            raise InvalidArgs(f"{where}: unknown key {key!r}; expected name, description, args")
    name = definition.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidArgs(f"{where}.name: expected text")
    if not _NAME.fullmatch(name):
        raise InvalidArgs(f"{where}.name: {name[:80]!r} is no name for a tool; expected up to 64 letters, digits, _, -")
    return name


def _tool(name: str, definition: dict[str, Any], where: str) -> HostTool:
    described = _description(definition, where)
    args = definition.get("args", {})
    if not isinstance(args, dict):
        raise InvalidArgs(f'{where}.args: expected an object such as {{"query": {{"type": "str"}}}}')
    parameters = []
    descriptions = {}
    for arg, given in args.items():
        here = f"{where}.args.{arg}"
        if not arg.isidentifier() or keyword.iskeyword(arg):
            raise InvalidArgs(f"{here}: no name for an argument; expected letters, digits and _, no keyword")
        # A type alone will do.
        given = given if isinstance(given, dict) else {"type": given}
        for key in given:
            if key not in ("type", "description", "desc"):
                raise InvalidArgs(f"{here}: unknown key {key!r}; expected type, description; a JSON Schema goes into type")
        annotation = read_type(given.get("type"), f"{here}.type")
        parameters.append(inspect.Parameter(arg, inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
        if text := _description(given, here):
            descriptions[arg] = text

    async def ask(**arguments: Any) -> Any:
        missing = [arg for arg in args if arg not in arguments]
        if missing:
            raise ToolFailed(f"{name}: missing {', '.join(missing)}; expected {', '.join(args)}")
        return await asking.get().ask(name, arguments)

    # What DSPy reads of a function.
    ask.__name__ = name
    ask.__doc__ = described
    ask.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect's own protocol
    ask.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return HostTool(ask, name=name, desc=described or None, arg_desc=descriptions)


def _description(given: dict[str, Any], where: str) -> str:
    text = given.get("description", given.get("desc", ""))
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidArgs(f"{where}.description: expected text")
    return text
