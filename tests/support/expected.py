"""The expected reply of a frame: for `fuzz`, from the page of the protocol, not the peer's code.

Exact if the frame alone decides it; for a run or a creation, the set of possible `error_type`s.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any

# The peer's `--max-frame-bytes`: small, so that frames past it can be sent often.
LIMIT = 1 << 16
MAX_ERROR_CHARS = 2000
# A name of 4096 characters, each of them escaped.
MAX_EXACT_CHARS = 6 * 4096 + 30
MAX_DIGITS = 4300
# Nesting up to the first is read, past the second refused; what is between is the parser's business.
DEPTH_READ, DEPTH_REFUSED = 200, 250
STRING = r'"(?:[^"\\]|\\.)*"'


class Failure(Exception):
    """The peer broke the protocol. `suspects`: the frame that led to it, or those that may have."""

    def __init__(self, why: str, *suspects: bytes) -> None:
        super().__init__(why)
        self.suspects = suspects


class Undecided(Exception):
    """Whether a frame is JSON is up to the parser: nested deeper than must be read, not so deep that it must not.

    Or it answers a tool call that the peer may have made by now, or has another trace than `TRACEPARENT`.
    """


# The outcomes of each command, in addition to those of every task: timeout with a deadline, cancelled after a cancel.
CREATE_ENDS = frozenset(("success", "invalid_args", "not_allowed"))
EXECUTE_ENDS = CREATE_ENDS | {"program_not_found", "lm_not_configured", "lm_error", "output_invalid", "tool_error"}
CREATE_ARGS = (
    *("id", "signature", "program_type", "options", "lm", "adapter", "config", "tools", "demos", "state", "state_path"),
    "lazy",
)
EXECUTE_ARGS = (
    *("program_id", "inputs", "config", "lm", "options"),
    *("attempts", "max_concurrency", "item_timeout_ms"),
)

# The only trace that is judged here: `tests/vectors/traceparents.json` has the others.
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
# No peer makes so many in a run.
MOST_TOOL_CALLS = 10**9

# An id with its type: in Python 1 and True are one key, and so are ids that are not.
Key = tuple[type, Any]
NULL: Key = (type(None), None)


@dataclass(slots=True)
class Owed:
    """The one reply that a frame must get: under one of `keys`, with one of `ends` ("success" or an error's type)."""

    payload: bytes
    keys: tuple[Key, ...]
    ends: frozenset[str]
    command: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    meta: bool = False
    stream: bool = False
    # Answered before whatever comes after it is looked at.
    at_once: bool = True
    paid: bool = False

    def wrong(self, reply: dict[str, Any]) -> str | None:
        """What is wrong with `reply` as this one's."""
        end = "success" if reply["success"] else reply["error_type"]
        if end not in self.ends:
            return f"expected {' or '.join(sorted(self.ends))}, got {end}"
        if ("meta" in reply) != self.meta:
            return f"meta: {'missing' if self.meta else 'not asked for'}"
        if end == "unknown_command" and reply["error"] != f"Unknown command: {_named(self.command)}":
            return "the message of an unknown command"
        if end == "program_not_found" and reply["error"] != f"Program not found: {_named(self.args['program_id'])}":
            return "the message of an unknown program"
        if end == "success" and not _fits(self.command, self.args, reply["result"]):
            return "the result is not one of this command"
        return None


_UNREADABLE_TOOL_RESULT = re.compile(rb'\s*\{\s*"tool_result"\s*:\s*\{\s*"call_id"\s*:\s*([0-9]{1,18})\s*[,}]')


def owed(payload: bytes) -> Owed | None:
    """What a frame must get; None for a cancel, which has no reply. Raises `Undecided`."""
    if len(payload) > LIMIT:
        return Owed(payload, (NULL,), frozenset(("frame_too_large",)))
    try:
        message = read_json(payload)
    except ValueError:
        answered = _UNREADABLE_TOOL_RESULT.match(payload)
        if answered and 0 < int(answered[1]) < MOST_TOOL_CALLS:
            raise Undecided from None  # the program that waits for it, if any, gets the error
        return Owed(payload, leading_ids(payload), frozenset(("invalid_json",)))
    return _owed_for(payload, message)


def _owed_for(payload: bytes, message: Any) -> Owed | None:
    def refused(*keys: Key) -> Owed:
        return Owed(payload, keys, frozenset(("invalid_request",)))

    if not isinstance(message, dict):
        return refused(NULL)
    key = _key(message.get("id"))
    if "cancel" in message and "command" not in message:
        return refused(key or NULL) if _key(message["cancel"]) is None else None
    if "tool_result" in message and "command" not in message:
        result = message["tool_result"]
        call_id = result.get("call_id") if isinstance(result, dict) else None
        if isinstance(call_id, int) and not isinstance(call_id, bool) and 0 < call_id < MOST_TOOL_CALLS:
            raise Undecided
        return refused(NULL)
    if key is None:
        return refused(NULL)
    command, args, timeout = message.get("command"), message.get("args"), message.get("timeout_ms")
    args = {} if args is None else args
    flags = [message.get(name, False) for name in ("meta", "stream", "history", "lm_events")]
    if not isinstance(command, str) or not isinstance(args, dict) or not all(isinstance(flag, bool) for flag in flags):
        return refused(key)
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0):
        return refused(key)
    if message.get("traceparent") not in (None, TRACEPARENT):
        raise Undecided
    ends, at_once = _ends(command, args, timeout is not None)
    certain = ends & {"success", "unknown_command", "program_not_found"}
    if certain and (len(payload) > 2000 or command == "list_programs"):
        # Its reply may be longer than it is, and past the limit.
        ends |= {"frame_too_large"}
    meta, stream, history, lm_events = flags
    return Owed(payload, (key,), ends, command, args, meta or history or lm_events, stream, at_once)


def _named(name: str | None) -> str:
    """A name as an error's one line has it."""
    name = name or ""
    shown = name if len(name) <= 4096 else name[:4095] + "…"
    return "".join(repr(sign)[1:-1] if unicodedata.category(sign) in ("Cc", "Zl", "Zp") else sign for sign in shown)


def _ends(command: str, args: dict[str, Any], deadline: bool) -> tuple[frozenset[str], bool]:
    """What a request may end in, and whether at once."""
    refused = frozenset(("invalid_args",)), True
    done = frozenset(("success",)), True
    ids, details = args.get("program_ids"), [args.get(name, False) for name in ("details", "state")]
    good_ids = ids is None or (isinstance(ids, list) and all(isinstance(id, str) for id in ids))
    config, lm = args.get("config"), args.get("lm")
    objects = (config is None or isinstance(config, dict)) and (lm is None or isinstance(lm, (dict, str)))
    late = {"timeout", "cancelled"} if deadline else {"cancelled"}
    if command in ("ping", "get_stats"):
        return done
    if command == "cleanup":
        return done if good_ids and not set(args) - {"program_ids"} else refused
    if command == "list_programs":
        if not good_ids or not all(isinstance(flag, bool) for flag in details):
            return refused
        return (frozenset(("success",)) | late, False) if details[1] else done
    if command == "create_program":
        id, signature = args.get("id"), args.get("signature")
        lazy = args.get("lazy", False)
        if not isinstance(lazy, bool) or not isinstance(id, str) or not id or signature is None:
            return refused
        if lazy:
            return done
        if not objects or set(args) - set(CREATE_ARGS):
            return refused
        return CREATE_ENDS | late, False
    if command == "execute_program":
        id, inputs = args.get("program_id"), args.get("inputs")
        if not isinstance(id, str) or not id or not isinstance(inputs, (dict, list)) or not objects:
            return refused
        if set(args) - set(EXECUTE_ARGS) or not _may_be_counts(args, isinstance(inputs, list)):
            return refused
        return EXECUTE_ENDS | late, False
    return frozenset(("unknown_command",)), True


def _may_be_counts(args: dict[str, Any], batch: bool) -> bool:
    """Whether the numbers among the arguments of a run are right."""
    attempts, most, each = (args.get(name) for name in ("attempts", "max_concurrency", "item_timeout_ms"))
    return (
        (attempts is None or (type(attempts) is int and 1 <= attempts <= 10))
        and (most is None or (batch and type(most) is int and most >= 1))
        and (each is None or (batch and type(each) in (int, float) and each > 0))
    )


def _fits(command: str | None, args: dict[str, Any], result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    if command == "ping":
        return result.keys() == {"status", "timestamp"} and isinstance(result["timestamp"], float)
    if command == "create_program":
        return result == {"program_id": args["id"], "status": "created"}
    if command == "cleanup":
        return result.keys() == {"status", "programs_removed"} and isinstance(result["programs_removed"], int)
    if command == "list_programs":
        listed, asked = result.get("programs"), args.get("program_ids")
        if not isinstance(listed, list) or (asked is not None and not set(listed) <= set(asked)):
            return False
        detailed = args.get("details") or args.get("state")
        details = result.get("details") if detailed else [{"id": id} for id in listed]
        return isinstance(details, list) and [detail["id"] for detail in details] == listed
    if command == "get_stats":
        return {"programs_count", "memory_usage", "uptime", "in_flight", "queued", "pid"} <= result.keys()
    if command == "execute_program" and isinstance(args["inputs"], list):
        return result.keys() == {"results"} and len(result["results"]) == len(args["inputs"])
    return True


def read_json(payload: bytes) -> Any:
    """The value of strict JSON. Raises `ValueError` or `Undecided`."""
    text = payload.decode()

    def constant(name: str) -> Any:
        raise ValueError(name)

    def whole(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise ValueError("too many digits")
        return int(digits)

    def real(digits: str) -> float:
        # The digits before the point are limited as those of a whole number are.
        whole(re.split("[.eE]", digits)[0])
        return float(digits)

    try:
        value = json.loads(text, parse_constant=constant, parse_int=whole, parse_float=real)
    except RecursionError:
        raise ValueError("too deep") from None
    if "\\u" in text:
        # Half a pair of surrogates is not a character. Searched in the payload, as a repeated key hides values.
        for token in re.findall(STRING, text, re.DOTALL):
            json.loads(token).encode()
    depth = deepest(text)
    if depth > DEPTH_REFUSED:
        raise ValueError("too deep")
    if depth > DEPTH_READ:
        raise Undecided
    return value


def deepest(text: str) -> int:
    """How deep the lists and objects of JSON are nested."""
    depth = most = 0
    for sign in re.findall(rf"{STRING}|[\[\]{{}}]", text, re.DOTALL):
        if sign in "[{":
            depth += 1
            most = max(most, depth)
        elif sign in "]}":
            depth -= 1
    return most


def leading_ids(payload: bytes) -> tuple[Key, ...]:
    """Under what ids broken JSON may be answered: a plain id that it starts with must be taken, an odd one may."""
    start = re.match(rb'\s*\{\s*"id"\s*:\s*', payload)
    if start is None:
        return (NULL,)
    rest = payload[start.end() :]
    plain = re.match(rb'(-?(?:0|[1-9][0-9]{0,4299})|"[^"\\\x00-\x1f]*")\s*[,}]', rest)
    text = rest.decode("utf-8", "surrogateescape")
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        return (NULL,)
    key = _key(value)
    if key is None:
        return (NULL,)
    return (key,) if plain and b"\x0b" not in plain[0] and b"\x0c" not in start[0] + plain[0] else (NULL, key)


def _key(id: Any) -> Key | None:
    return (type(id), id) if type(id) in (int, str) else None


# What may come before a reply.
INTERIM = [
    *(["field", "chunk"], ["status"], ["call_id", "name", "args"]),
    *(
        ["index", "success", *rest]
        for rest in (["result"], ["error", "error_type"], ["error", "error_type", "retryable"])
    ),
]


def read_reply(payload: bytes) -> dict[str, Any]:
    """A reply, or a frame that comes before one, whose form is right. Raises `Failure`."""

    def constant(name: str) -> Any:
        raise ValueError(name)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) != len(items):
            raise ValueError("a key twice")
        return dict(items)

    try:
        reply = json.loads(payload.decode(), parse_constant=constant, object_pairs_hook=pairs)
    except ValueError as error:
        raise Failure(f"a reply is not JSON ({error}): {payload[:500]!r}") from None
    keys = list(reply) if isinstance(reply, dict) else []
    if keys in (["id", "stream"], ["id", "tool_call"]):
        body = reply[keys[1]]
        if not isinstance(body, dict) or list(body) not in INTERIM:
            raise Failure(f"a frame of another form: {payload[:500]!r}")
        return reply
    extra = [key for key in keys[3:] if key in ("meta", "error_type", "retryable")]
    if keys[:2] != ["id", "success"] or keys[3:] != extra or keys[2:3] != ["result" if reply["success"] else "error"]:
        raise Failure(f"a reply of another form: {payload[:500]!r}")
    if reply["success"] is not True:
        _check_error(reply, payload)
    elif not {"error_type", "retryable"}.isdisjoint(reply):
        raise Failure(f"a success with an error's keys: {payload[:500]!r}")
    return reply


def _check_error(reply: dict[str, Any], payload: bytes) -> None:
    text, kind = reply["error"], reply.get("error_type")
    if reply["success"] is not False or not isinstance(text, str) or not isinstance(kind, str):
        raise Failure(f"an error of another form: {payload[:500]!r}")
    # These repeat what they were sent as it was, bar control characters.
    most = MAX_EXACT_CHARS if kind in ("unknown_command", "program_not_found") else MAX_ERROR_CHARS
    if not text or text.splitlines() != [text] or len(text) > most:
        raise Failure(f"an error's text is not one line of at most {most} characters: {payload[:3000]!r}")
    if ("retryable" in reply) != (kind == "lm_error"):
        raise Failure(f"retryable belongs to lm_error alone: {payload[:500]!r}")
