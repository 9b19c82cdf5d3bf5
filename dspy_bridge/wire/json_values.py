"""Encodes any Python value as JSON. Never fails: what has no JSON form becomes a string. Values may run code."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The default limit of Python (sys.set_int_max_str_digits) and jiter for the digits of an int, and the protocol's.
MAX_INT_DIGITS = 4300
# Values that are nested deeper become strings. orjson stops at 254 levels of its `default` hook.
MAX_DEPTH = 200
INT_LIMIT = 10**MAX_INT_DIGITS


def encode_value(value: Any) -> bytes:
    """JSON of any Python value: NaN and infinities null, bytes base64, objects their fields, the rest `str()`."""
    import orjson

    try:
        # With this option numbers, dates and the like may be keys. It costs 10,000 results half a millisecond.
        return orjson.dumps(value, default=_default, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError, RecursionError):
        # Integers past 64 bits, other keys, lone surrogates, cycles, great depth.
        import json

        return json.dumps(_plain(value, ()), ensure_ascii=False, separators=(",", ":")).encode()


def _default(value: Any) -> Any:
    """The `default` hook of orjson: replaces a value of an unknown type."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        import base64

        return base64.b64encode(value).decode()
    if isinstance(value, (set, frozenset)):
        return list(value)
    if not isinstance(value, type):
        for name in ("model_dump", "tolist"):  # pydantic models; arrays and scalars of numpy
            if callable(method := getattr(value, name, None)):
                return method()
        if hasattr(value, "keys") and hasattr(value, "__getitem__"):
            return {key: value[key] for key in value.keys()}  # noqa: SIM118 - only the mapping protocol is known of it
    return _text(value)


def _text(value: object) -> str:
    try:
        text = str(value)
    except BaseException as error:  # a user's __str__ may raise anything
        text = f"<{type(value).__name__}: its str() raised {type(error).__name__}>"
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any, inside: tuple[int, ...]) -> Any:
    """A copy of `value` that the standard json encodes as it is. `inside`: ids of the containers around it."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        # Python does not format a longer one as decimal.
        return int(value) if -INT_LIMIT < value < INT_LIMIT else hex(value)
    if id(value) in inside:
        return f"<{type(value).__name__} that contains itself>"
    if len(inside) > MAX_DEPTH:
        return f"<{type(value).__name__} nested deeper than {MAX_DEPTH} levels>"
    import jiter
    import orjson

    inside = (*inside, id(value))
    if isinstance(value, dict):
        return {_key(key): _plain(item, inside) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, inside) for item in value]
    try:
        # orjson knows more types than the standard json: dates, UUIDs, enums, dataclasses.
        return jiter.from_json(orjson.dumps(value))
    except (TypeError, ValueError, RecursionError):
        pass
    fields = getattr(value, "__dataclass_fields__", None)
    try:
        if fields is not None and not isinstance(value, type):
            return {name: _plain(getattr(value, name), inside) for name in fields}
        return _plain(_default(value), inside)
    except Exception:
        return _text(value)


def _key(key: object) -> str:
    """The text that the key has as a value, where it has one: base64 for bytes, ISO 8601 for a date."""
    import jiter
    import orjson

    try:
        (text,) = jiter.from_json(orjson.dumps({key: None}, option=orjson.OPT_NON_STR_KEYS))
        return str(text)
    except (TypeError, ValueError):
        return _default(key) if isinstance(key, bytes) else _text(key)
