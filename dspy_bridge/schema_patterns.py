r"""The `pattern` of JSON Schemas. Matched by Rust's library, which takes linear time whatever a pattern is; pure.

Compiled, one could take 16 MB, and pydantic keeps the last 50 that anybody compiled: no cleanup gives them back. So
each is bounded, and types know their patterns as text, lest every program keeps its own.
As JSON Schema says, \w and \d are ASCII's, as in JavaScript and Elixir. Unicode's \w is 60 KB wherever it stands.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from pydantic_core import SchemaError, SchemaValidator, core_schema

from dspy_bridge.errors import InvalidArgs

# Distinct patterns in one schema, and those that are at hand at once. At worst ten take 12 MB, and 30 MB when they have
# matched texts that were made for it; pydantic's 50 then are 80 MB. Those that people write take 0.1 MB each.
MOST = 10
MAX_CHARS = 1000
# The size of a pattern with its repetitions written out, in ASCII characters: 0.15 KB each.
MAX_SIZE = 6000
_WIDE = 6  # any character, or any but some
_UNICODE = 400  # a set of Unicode's: hundreds of ranges

_ASCII = {"w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]", "d": "[0-9]", "D": "[^0-9]"}
_TOKEN = re.compile(
    r"""
    (?P<class> \[ (?P<not> \^? ) \]? ) | (?P<end> \] )
    | (?P<open> \( (?: \? (?: P?< \w+ > | (?P<flags> [A-Za-z-]* ) :? ) )? ) | (?P<close> \) )
    | \{ \s* (?P<least> \d* ) \s* ,? \s* (?P<most> \d* ) \s* \}
    | (?P<unicode> \\ [pP] (?: \{ [^}]* \} | . ) ) | (?P<wide> \\ [sS] | [^\0-\x7f] ) | (?P<any> \. )
    | (?P<free> [*+?|^$] )
    | \\ . | .
    """,
    re.VERBOSE | re.DOTALL,
)


def read(pattern: object, where: str) -> Callable[[str], Any]:
    """What checks a text against a pattern: gives the text, or raises a `ValidationError`. Raises `InvalidArgs`."""
    unknown = f"{where}: cannot be read; expected a regular expression, without look-around and back references"
    if not isinstance(pattern, str):
        raise InvalidArgs(unknown)
    if len(pattern) > MAX_CHARS:
        raise InvalidArgs(f"{where}: expected at most {MAX_CHARS} characters")
    rust = re.sub(r"\\(.)", lambda found: _ASCII.get(found[1], found[0]), pattern, flags=re.DOTALL)
    if _size(rust) > MAX_SIZE:
        raise InvalidArgs(f"{where}: too large, its repetitions written out; bound a text with maxLength")
    try:
        _compiled(rust)
    except SchemaError:
        raise InvalidArgs(unknown) from None
    return lambda text: _compiled(rust)(text)


@functools.lru_cache(maxsize=MOST)
def _compiled(pattern: str) -> Callable[[str], Any]:
    return SchemaValidator(core_schema.str_schema(pattern=pattern)).validate_python


def _size(pattern: str) -> float:
    """How large it is with `{…}` written out. Of what cannot be read it may be anything."""
    groups = [0.0]
    last = 0.0
    in_class = 0
    cases = 1
    for token in _TOKEN.finditer(pattern):
        if token["class"]:
            in_class += 1
            groups.append(_WIDE if token["not"] else 1)
        elif token["open"] and not in_class:
            if "x" in (token["flags"] or ""):
                return MAX_SIZE + 1  # comments may hold anything
            cases += "i" in (token["flags"] or "") and cases == 1
            groups.append(1)
        elif (token["end"] and in_class) or (token["close"] and not in_class):
            in_class -= 1 if in_class else 0
            last = groups.pop()
            groups = groups or [0.0]
            groups[-1] += last
        elif token["least"] is not None and not in_class:
            times = max(int(token["least"] or 0), int(token["most"] or 0), 1)
            groups[-1] += last * (times - 1)
            last *= times
        elif not (token["free"] and not in_class):
            # In a class, ASCII's are ranges of one step.
            last = (
                _UNICODE
                if token["unicode"]
                else _WIDE
                if token["wide"]
                else 0.25
                if in_class
                else _WIDE
                if token["any"]
                else 1
            )
            last *= 2 if token[0] == r"\S" else 1
            groups[-1] += last
    return sum(groups) * cases
