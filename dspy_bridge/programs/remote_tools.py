"""Tools that the caller runs: `dspy.Tool`s made of their definitions. Imports DSPy."""

from __future__ import annotations

import asyncio
import inspect
import keyword
import re
from collections.abc import Callable
from typing import Any

import dspy
import orjson
import pydantic

from dspy_bridge.errors import InvalidArgs, ToolFailed, refuse_unknown
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.lm.adapters import corrections, field_markers
from dspy_bridge.programs import tool_args
from dspy_bridge.runtime import large_inputs, worker_threads
from dspy_bridge.signatures import media
from dspy_bridge.signatures.builder import description
from dspy_bridge.wire.json_values import encode_value

# What providers with native function calling accept.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
MAX_TOOLS = 128
# In base64, of all images and files of one result: each step of a ReAct writes them into a prompt, on the event loop.
MAX_CONTENT = 2 << 20
_MEDIA = {"image": media.image, "file": media.file}


class RemoteTool(dspy.Tool):  # type: ignore[misc]  # DSPy ships no types
    """A tool that the caller runs; `func.declared` has its arguments, which are checked before."""

    async def acall(self, /, **arguments: Any) -> Any:
        """LMs write null for an argument that they leave out, and the sandbox of an RLM sends it."""
        left_out = {arg for arg, read in self.func.declared.items() if read.null_is_left_out}
        given = {arg: value for arg, value in arguments.items() if value is not None or arg not in left_out}
        return await super().acall(**given)

    def format_as_litellm_function_call(self) -> dict[str, Any]:
        """DSPy's own takes every argument without a default to be required."""
        call: dict[str, Any] = super().format_as_litellm_function_call()
        call["function"]["parameters"]["required"] = [arg for arg, read in self.func.declared.items() if read.required]
        return call

    def __call__(self, /, **arguments: Any) -> Any:
        """Called by a sync module, in its worker thread."""
        job = worker_threads.current.get()
        if job is None:
            raise ToolFailed(f"{self.name}: expected to be called in the thread of its run, or awaited with acall")
        return job.on_loop(self.acall(**arguments))


def _read_arguments(tool: RemoteTool, **given: Any) -> dict[str, Any]:
    """The arguments as values of their types.

    In the place of DSPy's, which builds two validators for each argument of each call; the one of its schema matches
    patterns by backtracking, for hours.
    """
    read = {}
    for arg, value in given.items():
        if arg not in tool.func.declared:
            raise ValueError(f"Arg {arg} is not in the tool's args.")
        read[arg] = read_argument(arg, tool.func.declared[arg].validator, value)
    return read


def read_argument(arg: str, validator: pydantic.TypeAdapter[Any], value: Any) -> Any:
    """An LM's value for an argument as one of its type. Raises `ValueError` with a text for the LM."""
    try:
        return validator.validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(f"Arg {arg} is invalid: {corrections.first_of(error)}") from None


if dspy_internals.TOOL_ARGUMENTS.there:
    setattr(RemoteTool, dspy_internals.TOOL_ARGUMENTS.attribute, _read_arguments)


class Failure(str):
    """The text for the LM of a tool that failed."""

    __slots__ = ()


def failure(name: str, error: Exception) -> Failure:
    # A `ToolFailed` begins with the name, too.
    return Failure(f"Execution error in {name}: {str(error).removeprefix(f'{name}: ')}")


class AgentTool(RemoteTool):
    """The same for ReAct, which shows tracebacks with local paths to the LM, and by trajectory takes any list for one
    of strings."""

    _files_dir: str | None = pydantic.PrivateAttr()
    _takes_content: bool = pydantic.PrivateAttr()

    def __init__(self, tool: RemoteTool, files_dir: str | None, *, takes_content: bool) -> None:
        """`takes_content`: whether DSPy makes images and files of an observation parts of a message."""
        super().__init__(tool.func, name=tool.name, desc=tool.desc, args=tool.args, arg_types=tool.arg_types)
        self._files_dir, self._takes_content = files_dir, takes_content

    async def acall(self, /, **arguments: Any) -> Any:
        """As `RemoteTool`'s; an error becomes the observation."""
        try:
            result = await super().acall(**arguments)
            if not _is_content(result):
                return await _with_json(_observation, result) if isinstance(result, (list, dict)) else result
            if not self._takes_content:
                raise ToolFailed("content: DSPy's ReAct by history takes no images and files; return text")
            return await _with_json(lambda content, _json: _content(content, self._files_dir), result)
        except Exception as error:
            return failure(self.name, error)


class _Large(pydantic.RootModel[str]):
    """A large observation: its JSON, which each step of a ReAct puts into a prompt; the value itself for the reply."""

    _value: Any = pydantic.PrivateAttr()

    def model_dump(self, **_: Any) -> Any:
        return self._value


class _Content(dspy.Type):  # type: ignore[misc]
    """Texts, images and files, which DSPy makes parts of a message; the value as it was given for the reply."""

    given: Any
    parts: list[dict[str, Any]]

    def format(self) -> list[dict[str, Any]]:
        return self.parts

    def model_dump(self, **_: Any) -> Any:
        return self.given


def _content(result: dict[str, Any], files_dir: str | None) -> _Content:
    """Raises `ToolFailed`."""
    parts: list[dict[str, Any]] = []
    for index, given in enumerate(result["content"]):
        kind, fields = given["type"], {name: value for name, value in given.items() if name != "type"}
        try:
            if kind != "text":
                parts += _MEDIA[kind](files_dir, fields).format()
            elif fields.keys() == {"text"} and isinstance(fields["text"], str):
                parts.append(given)
            else:
                raise ValueError("expected text")
        except (TypeError, ValueError) as error:
            raise ToolFailed(f"content[{index}]: {error}") from None
    content = _Content(given=result, parts=parts)
    if len(content.serialize_model()) > MAX_CONTENT:
        raise ToolFailed(f"content: expected at most {MAX_CONTENT} bytes in all, in base64")
    return content


def _is_content(result: Any) -> bool:
    parts = result.get("content") if isinstance(result, dict) and len(result) == 1 else None
    return (
        isinstance(parts, list)
        and parts != []
        and all(isinstance(part, dict) and part.get("type") in ("text", *_MEDIA) for part in parts)
    )


def _observation(result: Any, json: bytes) -> Any:
    if len(json) >= large_inputs.LARGE:
        large = _Large(json.decode())
        large._value = result
        return large
    if isinstance(result, list) and not all(isinstance(item, str) for item in result):
        # DSPy writes a tuple as JSON; a reply has a list again.
        return tuple(result)
    return result


def observed(result: Any) -> Any:
    """What an agent was shown of an earlier result."""
    return _observation(result, encode_value(result)) if isinstance(result, (list, dict)) else result


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
        if not isinstance(definition, dict):
            raise InvalidArgs(f"{where}: expected an object with name, description and args")
        refuse_unknown(definition, ("name", "description", "desc", "args", "parameters"), where)
        name = definition.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidArgs(f"{where}.name: expected text")
        if not _NAME.fullmatch(name):
            text = f"{name[:80]!r} is not a tool name; expected up to 64 letters, digits, _, -"
            raise InvalidArgs(f"{where}.name: {text}")
        if name in taken:
            raise InvalidArgs(f"{where}.name: {name!r} is taken, by a field or by DSPy; choose another")
        if name in tools:
            raise InvalidArgs(f"{where}.name: {name!r} is used twice; expected distinct names")
        tools[name] = _tool(name, description(definition, where) or "", tool_args.read(definition, where))
    return list(tools.values())


def _tool(name: str, described: str, args: dict[str, tool_args.Arg]) -> RemoteTool:
    required = [arg for arg, read in args.items() if read.required]
    defaults = {arg: read.default for arg, read in args.items() if read.default is not ...}

    async def ask(**arguments: Any) -> Any:
        missing = [arg for arg in required if arg not in arguments]
        if missing:
            raise ToolFailed(f"{name}: missing {', '.join(missing)}; expected {', '.join(required)}")
        run = lm_call.step()
        question = run.call.call_tool(name, {**defaults, **arguments})
        job = worker_threads.current.get()
        try:
            if job is not None and job.loop is not asyncio.get_running_loop():
                # RLM starts an event loop in its worker thread; the reply comes to the peer's.
                question = asyncio.to_thread(job.on_loop, question)
            with run.working():
                result = await question
            return await _with_json(_without_types, result)
        except ToolFailed as error:
            raise ToolFailed(field_markers.without_types(str(error))) from None

    # What DSPy reads from a function, and RLM's sandbox: it sends the default of an argument that is left out. Names
    # that no parameter can have (`from`, `x-y`) are in `args` alone, which is enough for DSPy.
    ask.__name__ = name
    ask.__doc__ = described
    parameters = [
        inspect.Parameter(
            arg,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if read.required else defaults.get(arg),
            annotation=read.type,
        )
        for arg, read in args.items()
        if is_parameter(arg)
    ]
    ask.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect's own protocol
    ask.declared = args  # type: ignore[attr-defined]
    # DSPy itself would drop the constraints of the types.
    schemas = {arg: read.schema for arg, read in args.items()}
    types = {arg: read.type for arg, read in args.items()}
    return RemoteTool(ask, name=name, desc=described or None, args=schemas, arg_types=types)


def is_parameter(arg: str) -> bool:
    return arg.isidentifier() and not keyword.iskeyword(arg)


def _without_types(result: Any, json: bytes) -> Any:
    """The result for a prompt: strings that look like DSPy's custom types stay strings."""
    text = json.decode()  # millions of values take 20 ms so, and seconds one by one
    if field_markers.without_types(text) == text:
        return result
    return field_markers.changed(result, field_markers.without_types)


async def _with_json(work: Callable[[Any, bytes], Any], result: Any) -> Any:
    """`work` of a tool's result and its JSON; in a thread if that is large."""
    try:
        json = orjson.dumps(result)
    except TypeError:
        # It has an integer past 64 bits, and may be large.
        return await large_inputs.in_thread(lambda: work(result, encode_value(result)))
    if isinstance(result, (list, dict)) and len(json) >= large_inputs.LARGE:
        return await large_inputs.in_thread(lambda: work(result, json))
    return work(result, json)
