"""Decodes payloads to `Request`, `Cancel` or `ToolResult`, and encodes replies. Strict JSON; pure; no I/O.

jiter decodes: it keeps integers exact (orjson turns those past 64 bits into floats), reads a string of a megabyte in a
sixth of orjson's time, and takes a millisecond or two to import. orjson encodes; its import takes 10 ms. The first ping
waits for neither, if it has no arguments (`frames.answer_pings`).
"""

from __future__ import annotations

import re

from dspy_bridge.wire.json_values import MAX_INT_DIGITS, encode_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeGuard

_EXTERNAL_TERM_FORMAT = 131
# The expressions of this module are compiled when they are used, for the first ping does not use them.
_FIRST_KEY_ID = rb'\s*\{\s*"id"\s*:\s*(-?[0-9]{1,4300}|"[^"\\\x00-\x1f]*")\s*[,}]'
_FIRST_KEY_TOOL_RESULT = rb'\s*\{\s*"tool_result"\s*:\s*\{\s*"call_id"\s*:\s*([0-9]{1,18})\s*[,}]'

# https://www.w3.org/TR/trace-context/: in version 00 nothing may follow, in later ones anything.
_TRACE_IDS = "(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = f"00-{_TRACE_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_TRACE_IDS}(?:-[!-~]{{0,199}})?"

Id = int | str


class MessageError(Exception):
    """A payload that is not a message. `id`: its id, if that could be read."""

    error_type = "invalid_request"

    def __init__(self, text: str, id: Id | None = None) -> None:
        super().__init__(text)
        self.id = id


class NotJSON(MessageError):
    """The payload is not JSON in UTF-8."""

    error_type = "invalid_json"


class Request:
    """A request; its keys are those of the protocol. With `history` or `lm_events` there is `meta`, too."""

    stream: bool
    history: bool
    lm_events: bool
    journal: list[Any] | None

    def __init__(self, id: Id, message: dict[str, Any]) -> None:
        """Of an envelope. Raises `MessageError`."""
        self.id = id
        self.command: str = message.get("command")  # type: ignore[assignment]  # checked here
        if type(self.command) is not str:
            raise MessageError(f"command: expected text, got {_got(message, 'command')}", id)
        args = message.get("args")
        self.args: dict[str, Any] = {} if args is None else args
        if type(self.args) is not dict:
            raise MessageError(f"args: expected an object, got {_json_name(args)}", id)
        self.timeout_ms: float | None = message.get("timeout_ms")
        if self.timeout_ms is not None and not (type(self.timeout_ms) in (int, float) and self.timeout_ms > 0):
            raise MessageError("timeout_ms: expected a number of milliseconds greater than 0", id)
        for name in ("stream", "meta", "history", "lm_events"):
            flag = message.get(name, False)
            if type(flag) is not bool:
                raise MessageError(f"{name}: expected true or false, got {_json_name(flag)}", id)
            setattr(self, name, flag)
        self.meta: bool = self.meta or self.history or self.lm_events
        journal = self.journal = message.get("journal")
        if journal is not None and not (type(journal) is list and self.command == "execute_program"):
            raise MessageError("journal: expected a list of entries, with an execute_program", id)
        trace = self.traceparent = message.get("traceparent")
        if trace is not None and not (type(trace) is str and re.fullmatch(_TRACEPARENT, trace)):
            text = "expected a W3C trace context, 00-<32 hex>-<16 hex>-<2 hex> in lower case, no id of zeros alone"
            raise MessageError(f"traceparent: {text}", id)


class Cancel:
    """Cancels the request `id`; has no reply of its own."""

    def __init__(self, id: Id) -> None:
        self.id = id


class ToolResult:
    """The result of a tool call: `value`, or `error`, a string for the LM, if that is not None."""

    def __init__(self, call_id: int, value: Any, error: str | None) -> None:
        self.call_id = call_id
        self.value = value
        self.error = error


def decode(payload: bytes) -> Request | Cancel | ToolResult:
    """Decode a payload. Raises `MessageError`."""
    message = _loads(payload)
    if type(message) is not dict:
        raise MessageError(f"expected a JSON object, got {_json_name(message)}")
    if "command" not in message:
        if "cancel" in message:
            if _is_id(message["cancel"]):
                return Cancel(message["cancel"])
            id = message.get("id")
            text = "cancel: expected the id of a request, an integer or text"
            raise MessageError(text, id if _is_id(id) else None)
        if "tool_result" in message:
            return _tool_result(message["tool_result"])
    id = message.get("id")
    if not _is_id(id):
        raise MessageError(f"id: expected an integer or text, got {_got(message, 'id')}")
    return Request(id, message)


def _tool_result(result: Any) -> ToolResult:
    if type(result) is not dict:
        raise MessageError(f"tool_result: expected an object, got {_json_name(result)}")
    call_id = result.get("call_id")
    if type(call_id) is not int:
        raise MessageError("tool_result.call_id: expected the number of a tool call")
    success = result.get("success")
    if success is True:
        return ToolResult(call_id, result.get("result"), None)
    error = result.get("error")
    # A program waits for this result, so it gets the error.
    if success is not False:
        error = "tool_result.success: expected true or false"
    elif type(error) is not str:
        error = "tool_result.error: expected text"
    return ToolResult(call_id, None, error)


def encode_result(id: Id, result: Any, meta: dict[str, Any] | None = None) -> bytes:
    """The payload of a successful reply. Values in `result` without a JSON form become strings."""
    return b'{"id":' + _encode_id(id) + b',"success":true,"result":' + encode_value(result) + _encode_meta(meta) + b"}"


def failure(error_type: str, text: str, retryable: bool | None = None) -> dict[str, Any]:
    """The error fields of a reply, or of an item in a list of results."""
    body: dict[str, Any] = {"success": False, "error": text, "error_type": error_type}
    if retryable is not None:
        body["retryable"] = retryable
    return body


def encode_failure(id: Id | None, failure: dict[str, Any], meta: dict[str, Any] | None = None) -> bytes:
    """The payload of an error reply. `id` is None if that of the request could not be read."""
    return b'{"id":' + _encode_id(id) + b"," + encode_value(failure)[1:-1] + _encode_meta(meta) + b"}"


def _encode_meta(meta: dict[str, Any] | None) -> bytes:
    return b"" if meta is None else b',"meta":' + encode_value(meta)


def encode_stream(id: Id, item: dict[str, Any]) -> bytes:
    return b'{"id":' + _encode_id(id) + b',"stream":' + encode_value(item) + b"}"


def encode_journal(id: Id, entry: dict[str, Any]) -> bytes:
    return b'{"id":' + _encode_id(id) + b',"journal":' + encode_value(entry) + b"}"


def encode_tool_call(id: Id, call_id: int, name: str, args: dict[str, Any]) -> bytes:
    """The payload of a call of a client's tool; `id` is that of the run's request."""
    call = {"call_id": call_id, "name": name, "args": args}
    return b'{"id":' + _encode_id(id) + b',"tool_call":' + encode_value(call) + b"}"


def encode_log(level: str, logger: str, message: str, traceparent: str | None) -> bytes:
    """The payload of a log record (`DSPY_BRIDGE_LOG_FRAMES`)."""
    trace = {} if traceparent is None else {"traceparent": traceparent}
    return encode_value({"log": {"level": level, "logger": logger, "message": message, **trace}})


def _loads(payload: bytes) -> Any:
    import jiter

    try:
        return jiter.from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise NotJSON(_why_not_json(payload, error), readable_id(payload)) from None


def _why_not_json(payload: bytes, error: Exception) -> str:
    if not payload:
        return "empty frame: expected a JSON object"
    if payload[0] == _EXTERNAL_TERM_FORMAT:
        return "expected JSON, got Erlang's external term format: encode requests as JSON, not with term_to_binary"
    if "number out of range" in str(error):
        # Only the parser knows which digits form a number; finding them again is not worth its cost.
        return f"expected JSON with integers of at most {MAX_INT_DIGITS} digits"
    try:
        payload.decode()
    except UnicodeDecodeError as bad:
        return f"expected JSON in UTF-8: invalid byte at {bad.start}"
    return f"expected JSON: {error}"


def readable_id(payload: bytes) -> Id | None:
    """The id at the start of an unreadable payload, so that its caller gets the error instead of waiting."""
    match = re.match(_FIRST_KEY_ID, payload)
    if match is None:
        return None
    import jiter

    try:
        id: Id = jiter.from_json(match[1])
    except ValueError:
        return None
    return id


def readable_call_id(payload: bytes) -> int | None:
    """The tool call at the start of an unreadable payload, for the same reason."""
    match = re.match(_FIRST_KEY_TOOL_RESULT, payload)
    return None if match is None else int(match[1])


def _is_id(value: object) -> TypeGuard[Id]:
    return type(value) is int or type(value) is str


def _got(message: dict[str, Any], key: str) -> str:
    return _json_name(message[key]) if key in message else "nothing"


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "text", bool: "a boolean"}.get(type(value), "a number")


def _encode_id(id: Id | None) -> bytes:
    return b"%d" % id if type(id) is int else encode_value(id)
