"""Converts Erlang terms, as ErlPort represents them, to JSON values and back. Pure."""

from __future__ import annotations

from dspy_bridge.wire.json_values import MAX_INT_DIGITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_INT_LIMIT = 10**MAX_INT_DIGITS
# jiter reads 200 levels, and the request is one; deeper terms are refused here, with their path.
MAX_LEVELS = 199
# First bytes of pids and references (an alias is one) in the external term format, in which ErlPort passes them; the
# second of each is that of OTP 22 and older.
_PIDS_AND_REFERENCES = (b"X", b"g", b"Z", b"r")
# The most steps of a path that an error shows.
_MOST_STEPS = 20


class Unfit(Exception):
    """A term without a JSON form. The text has its path."""

    def __init__(self, why: str, error_type: str = "invalid_args") -> None:
        super().__init__(why)
        self.error_type = error_type
        # Innermost first.
        self.steps: list[str] = []

    def __str__(self) -> str:
        steps = self.steps[::-1]
        more = "…" if len(steps) > _MOST_STEPS else ""
        return f"args{''.join(steps[:_MOST_STEPS])}{more}: {super().__str__()}"


def from_term(term: Any, depth: int = 1) -> Any:
    """The JSON value of a term. Raises `Unfit`.

    Binaries are strings; a charlist is a list of integers and stays one. The atoms nil, undefined, true and false
    become null and booleans, other atoms strings.
    """
    # In addition to ErlPort's own types: str, as a decoder of the program may return it.
    if isinstance(term, bytes):
        # ErlPort converts true, false and undefined itself.
        return None if _is_atom(term) and term in (b"nil", b"undefined") else _text(term)
    if term is None or isinstance(term, (bool, str)):
        return term
    if isinstance(term, int):
        return _checked(term)
    if isinstance(term, float):
        return term
    if depth > MAX_LEVELS:
        raise Unfit(f"nested deeper than {MAX_LEVELS} levels", "invalid_json")
    if isinstance(term, dict):
        return _object(term, depth)
    if isinstance(term, list) and not hasattr(term, "tail"):
        items: list[Any] = []
        try:
            for item in term:
                items.append(from_term(item, depth + 1))
        except Unfit as unfit:
            unfit.steps.append(f"[{len(items)}]")
            raise
        return items
    raise Unfit(f"expected a map, a list, a binary, an atom or a number, got {_name(term)}")


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


class WrongCall(Exception):
    """An invalid command or receiver."""


def to_command(term: Any) -> str:
    """The command, from a binary, an atom or a charlist. Raises `WrongCall`."""
    try:
        if isinstance(term, bytes):
            return _text(term)
        if isinstance(term, str):
            return term
        if isinstance(term, list):
            return "".join(map(chr, term))
    except (Unfit, TypeError, ValueError, OverflowError):
        pass
    name = "a binary that is not UTF-8" if isinstance(term, bytes) else _name(term)
    raise WrongCall(f"command: expected text, a binary, an atom or a charlist, got {name}")


def check_receiver(term: Any) -> None:
    """Raises `WrongCall` for a receiver for which `!` may fail in Erlang, as that ends the whole ErlPort instance.

    It fails for what is not an address, and for a registered name that is gone when the reply comes; for `{name, node}`
    never.
    """
    # "erlang" marks pids, references, ports and funs.
    if getattr(term, "language", None) == b"erlang" and term.data[:1] in _PIDS_AND_REFERENCES:
        return
    if isinstance(term, tuple) and len(term) == 2 and all(map(_is_atom, term)) and b"@" in term[1]:
        return
    why = ": that name may be gone when the reply comes" if _is_atom(term) else ""
    raise WrongCall(f"pid: expected a pid, an alias or {{name, node}}, got {_name(term)}{why}")


def _object(term: dict[Any, Any], depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in term.items():
        name = _key(key)
        if name in value:
            raise Unfit(f"two of its keys are the text {name!r}")
        try:
            value[name] = from_term(item, depth + 1)
        except Unfit as unfit:
            unfit.steps.append(f".{name}")
            raise
    return value


def _key(key: Any) -> str:
    if isinstance(key, bytes):
        return _text(key)
    if isinstance(key, str):
        return key
    if key is None:
        return "undefined"
    if isinstance(key, bool):
        return "true" if key else "false"
    if isinstance(key, int):
        return str(_checked(key))
    raise Unfit(f"expected keys that are binaries, atoms or integers, got {_name(key)}")


def _is_atom(term: Any) -> bool:
    """Atom is the only subclass of bytes that ErlPort passes."""
    return isinstance(term, bytes) and type(term) is not bytes


def _text(term: bytes) -> str:
    if _is_atom(term):
        # As ErlPort lets Erlang send them. An atom without a Latin-1 form ends Python while ErlPort reads it.
        return term.decode("latin-1")
    try:
        return term.decode()
    except UnicodeDecodeError as bad:
        why = f"expected text in UTF-8: invalid byte at {bad.start}; other data goes as base64"
        raise Unfit(why, "invalid_json") from None


def _checked(term: int) -> int:
    if not -_INT_LIMIT < term < _INT_LIMIT:
        raise Unfit(f"expected integers of at most {MAX_INT_DIGITS} digits", "invalid_json")
    return term


def _name(term: Any) -> str:
    if _is_atom(term):
        return "an atom"
    if isinstance(term, tuple):
        return "a tuple"
    if isinstance(term, list):
        return "an improper list" if hasattr(term, "tail") else "a list"
    names = {type(None): "undefined", bool: "a boolean", int: "a number", float: "a number", dict: "a map"}
    names[bytes] = names[str] = "text"
    for kind, name in names.items():
        if isinstance(term, kind):
            return name
    # Pids, references, ports and funs, and Python objects that have been to Erlang and back.
    return f"what ErlPort does not convert ({type(term).__name__})"
