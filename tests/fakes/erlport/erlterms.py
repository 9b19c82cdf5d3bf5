"""ErlPort's types, and both ways through them.

Of what Erlang has, here and in the tests, a binary is written as bytes and an atom as str.
"""

from __future__ import annotations

from typing import Any


class Atom(bytes):
    """Atoms, nil included; true, false and undefined arrive as Python's own."""

    __slots__ = ()

    def __new__(cls, name: bytes) -> Atom:
        if not isinstance(name, bytes):
            raise TypeError("bytes object expected")
        if len(name) > 255:
            raise ValueError("invalid atom length")
        return super().__new__(cls, name)

    def __repr__(self) -> str:
        return f"Atom({super().__repr__()})"


def _immutable(self: object, *_: object, **__: object) -> None:
    raise TypeError(f"mutation disallowed on {type(self).__name__}")


class List(list[Any]):
    """Lists, charlists too."""

    __slots__ = ()

    append = extend = insert = pop = remove = sort = __setitem__ = __delitem__ = _immutable  # type: ignore[assignment]

    def to_string(self) -> str:
        """The text, if this is a charlist; TypeError if it is none."""
        return "".join(map(chr, self))


class ImproperList(list[Any]):
    """`[1 | 2]`."""

    def __init__(self, items: list[Any], tail: Any) -> None:
        super().__init__(items)
        self.tail = tail


class Map(dict[Any, Any]):
    """Maps."""

    __slots__ = ()

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = _immutable  # type: ignore[assignment]


class OpaqueObject:
    """What stays Erlang's: pids, references, funs. They go back as they came."""

    def __init__(self, data: bytes, language: Atom) -> None:
        self.data = data
        self.language = language


class Killed(BaseException):
    """ErlPort ends where this is raised."""


class Pickle:
    """What Erlang receives of a Python object: an opaque tuple that it can do nothing with."""

    def __init__(self, of: object) -> None:
        self.of = of

    def __repr__(self) -> str:
        return f"Pickle({self.of!r})"


_SPECIAL: dict[str, Any] = {"true": True, "false": False, "undefined": None}


def decode(term: Any) -> Any:
    """From Erlang to Python."""
    if isinstance(term, str):
        return _SPECIAL[term] if term in _SPECIAL else Atom(term.encode())
    if type(term) is list:
        return List(decode(item) for item in term)
    if type(term) is dict:
        return Map({decode(key): decode(item) for key, item in term.items()})
    if type(term) is tuple:
        return tuple(decode(item) for item in term)
    assert type(term) in (bytes, int, float, OpaqueObject), f"not how a term is written here: {term!r}"
    return term


def encode(value: Any, in_list: bool = False) -> Any:
    """From Python to Erlang."""
    kind = type(value)
    if kind is str:
        return [ord(letter) for letter in value]
    if value is None:
        return "undefined"
    if kind is bool:
        return int(value) if in_list else str(value).lower()
    if kind is Atom:
        return value.decode()
    if kind is float:
        if value - value != 0.0:
            raise Killed("Erlang has no such float")
        return value
    if kind in (bytes, int, OpaqueObject):
        return value
    if kind in (list, List):
        return [encode(item, in_list=True) for item in value]
    if kind is tuple:
        return tuple(encode(item) for item in value)
    if kind in (dict, Map):
        return {encode(key): encode(item) for key, item in value.items()}
    return Pickle(value)
