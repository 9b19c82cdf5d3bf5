"""Converts Erlang terms, as ErlPort represents them, to JSON values and back. Pure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dspy_bridge.wire.json_values import INT_LIMIT, MAX_INT_DIGITS

# jiter reads 200 levels, and the request is one; deeper terms are refused here, with their path.
MAX_LEVELS = 199
# First bytes of pids and references (an alias is one) in the external term format, in which ErlPort passes them; the
# second of each is that of OTP 22 and older.
_PIDS_AND_REFERENCES = (b"X", b"g", b"Z", b"r")


class Unfit(Exception):
    """A term that cannot be taken. The text names it."""

    def __init__(self, where: str, why: str, error_type: str = "invalid_args") -> None:
        super().__init__(f"{where}: {why}")
        self.error_type = error_type


def from_term(term: Any, path: str = "args", depth: int = 1) -> Any:
    """The JSON value of a term. Raises `Unfit`.

    Binaries are strings; a charlist is a list of integers and stays one. The atoms nil, undefined, true and false
    become null and booleans, other atoms strings.
    """
    # In addition to ErlPort's own types: str, as a decoder of the program may return it.
    if isinstance(term, bytes):
        # ErlPort converts true, false and undefined itself.
        return None if _is_atom(term) and term in (b"nil", b"undefined") else _text(term, path)
    if term is None or isinstance(term, (bool, str, float)):
        return term
    if isinstance(term, int):
        return _checked(term, path)
    if depth > MAX_LEVELS:
        raise Unfit(path, f"nested deeper than {MAX_LEVELS} levels", "invalid_json")
    if isinstance(term, dict):
        named = ((_key(key, path), item) for key, item in term.items())
        return {name: from_term(item, f"{path}.{name}", depth + 1) for name, item in named}
    if isinstance(term, list) and not hasattr(term, "tail"):
        return [from_term(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(term)]
    raise Unfit(path, f"expected a map, a list, a binary, an atom or a number, got {type(term).__name__}")


def to_term(value: Any, atom: Callable[[bytes], Any], in_list: bool = False) -> Any:
    """The value to pass to ErlPort so that Erlang receives the JSON value `value`: plain types and atoms only.

    Strings become binaries, as ErlPort turns str into charlists; null the atom nil, as None would be undefined;
    booleans in a list atoms, as ErlPort would make them 1 and 0; NaN and infinities, which would crash ErlPort, nil.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    if isinstance(value, dict):
        return {key.encode("utf-8", "replace"): to_term(item, atom) for key, item in value.items()}
    if isinstance(value, list):
        return [to_term(item, atom, True) for item in value]
    if value is None or (isinstance(value, float) and value - value != 0.0):
        return atom(b"nil")
    if in_list and isinstance(value, bool):
        return atom(b"true" if value else b"false")
    return value


def to_command(term: Any) -> str:
    """The command, from a binary, an atom or a charlist. Raises `Unfit`."""
    if isinstance(term, str):
        return term
    with suppress(Unfit, TypeError, ValueError, OverflowError):
        if isinstance(term, bytes):
            return _text(term, "command")
        if isinstance(term, list):
            return "".join(map(chr, term))
    text = f"expected text, a binary, an atom or a charlist, got {type(term).__name__}"
    raise Unfit("command", text, "invalid_request")


def check_receiver(term: Any) -> None:
    """Raises `Unfit` for a receiver for which `!` may fail in Erlang, as that ends the whole ErlPort instance.

    It fails for what is not an address, and for a registered name that is gone when the reply comes; for `{name, node}`
    never.
    """
    # "erlang" marks pids, references, ports and funs.
    if getattr(term, "language", None) == b"erlang" and term.data[:1] in _PIDS_AND_REFERENCES:
        return
    if isinstance(term, tuple) and len(term) == 2 and all(map(_is_atom, term)) and b"@" in term[1]:
        return
    why = ": that name may be gone when the reply comes" if _is_atom(term) else ""
    raise Unfit("pid", f"expected a pid, an alias or {{name, node}}, got {type(term).__name__}{why}", "invalid_request")


def _key(key: Any, path: str) -> str:
    if key is None:
        return "undefined"
    if isinstance(key, bytes):
        return _text(key, path)
    if isinstance(key, (str, int)):
        return str(key).lower() if isinstance(key, bool) else str(key if isinstance(key, str) else _checked(key, path))
    raise Unfit(path, f"expected keys that are binaries, atoms or integers, got {type(key).__name__}")


def _is_atom(term: Any) -> bool:
    """Atom is the only subclass of bytes that ErlPort passes."""
    return isinstance(term, bytes) and type(term) is not bytes


def _text(term: bytes, path: str) -> str:
    try:
        # Atoms as ErlPort lets Erlang send them. One without a Latin-1 form ends Python while ErlPort reads it.
        return term.decode("latin-1" if _is_atom(term) else "utf-8")
    except UnicodeDecodeError as bad:
        why = f"expected text in UTF-8: invalid byte at {bad.start}; other data goes as base64"
        raise Unfit(path, why, "invalid_json") from None


def _checked(term: int, path: str) -> int:
    if not -INT_LIMIT < term < INT_LIMIT:
        raise Unfit(path, f"expected integers of at most {MAX_INT_DIGITS} digits", "invalid_json")
    return term
