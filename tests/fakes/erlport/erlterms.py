"""ErlPort's types, and both ways through them.

Of what Erlang has, here and in the tests, a binary is written as bytes, an atom as str, and what arrives opaque as
`Opaque`.
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


class MutationError(Exception):
    """What arrives cannot be changed."""


def _immutable(self: object, *_: object, **__: object) -> None:
    raise MutationError(f"mutation disallowed on {type(self).__name__}")


class List(list[Any]):
    """Lists, charlists too."""

    __slots__ = ()

    append = extend = insert = pop = remove = sort = reverse = __setitem__ = _immutable  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


class ImproperList(list[Any]):
    """`[1 | 2]`."""

    def __init__(self, items: list[Any], tail: Any) -> None:
        super().__init__(items)
        self.tail = tail


class Map(dict[Any, Any]):
    """Maps."""

    __slots__ = ()

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = _immutable  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


class OpaqueObject:
    """What stays Erlang's: pids, references, ports, funs. They go back as they came."""

    def __init__(self, data: bytes, language: Atom) -> None:
        self.data = data
        self.language = language

    def __eq__(self, other: object) -> bool:
        return type(other) is OpaqueObject and (self.data, self.language) == (other.data, other.language)

    def __hash__(self) -> int:
        return hash((self.data, self.language))


class Opaque:
    """A pid, reference, port or fun of Erlang's, by what its encoding begins with."""

    PID, OLD_PID, REFERENCE, OLD_REFERENCE, PORT, FUN = b"X", b"g", b"Z", b"r", b"x", b"p"

    def __init__(self, kind: bytes, number: int = 0) -> None:
        self.encoding = kind + b"d\x00\x0dnonode@nohost" + number.to_bytes(12, "big")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.encoding == other.encoding

    def __hash__(self) -> int:
        return hash(self.encoding)

    def __repr__(self) -> str:
        return f"Opaque({self.encoding!r})"


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
    """From Erlang to Python, whose end is whatever goes wrong."""
    try:
        return _decode(term)
    except (ValueError, TypeError, RecursionError) as error:
        raise Killed(f"unsupported data: {error}") from error


def _decode(term: Any) -> Any:
    if isinstance(term, str):
        return _SPECIAL[term] if term in _SPECIAL else Atom(term.encode("latin-1"))
    if type(term) is list:
        return List(_decode(item) for item in term)
    if type(term) is dict:
        return Map({_decode(key): _decode(item) for key, item in term.items()})
    if type(term) is tuple:
        return tuple(_decode(item) for item in term)
    if type(term) is ImproperList:
        return ImproperList([_decode(item) for item in term], _decode(term.tail))
    if type(term) is Opaque:
        return OpaqueObject(term.encoding, Atom(b"erlang"))
    assert type(term) in (bytes, int, float), f"not how a term is written here: {term!r}"
    return term


def encode(value: Any) -> Any:
    """From Python to Erlang. ValueError for what has no pickle."""
    kind = type(value)
    if kind is str:
        return [ord(letter) for letter in value]
    if value is None:
        return "undefined"
    if kind is bool:
        return str(value).lower()
    if kind is Atom:
        return value.decode("latin-1")
    if kind is float:
        if value - value != 0.0:
            raise Killed("Erlang has no such float")
        return value
    if kind in (bytes, int):
        return value
    if kind is OpaqueObject:
        opaque = Opaque(b"")
        opaque.encoding = value.data
        return opaque
    if kind in (list, List):
        if len(value) <= 65535 and all(isinstance(item, int) and 0 <= item <= 255 for item in value):
            return [int(item) for item in value]
        return [encode(item) for item in value]
    if kind is tuple:
        return tuple(encode(item) for item in value)
    if kind is ImproperList:
        return ImproperList([encode(item) for item in value], encode(value.tail))
    if kind in (dict, Map):
        return {encode(key): encode(item) for key, item in value.items()}
    import pickle

    try:
        pickle.dumps(value, 2)
    except Exception:
        raise ValueError(f"unsupported data type: {kind}") from None
    return Pickle(value)
