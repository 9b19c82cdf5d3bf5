"""What DSPy builds anew for each value or call, built once for each type or signature.

DSPy makes a pydantic model for each step of a ReAct (a signature of the trajectory's keys), a `TypeAdapter` for each
value in a prompt, a JSON Schema validator for each argument of a tool, and the same system message and response schema
for each call. That was two thirds of the time that an agent takes beside its LM. What is sent stays the same to the
byte. A type is found by its identity: equal ones, such as `int | str` and `str | int`, have different schemas.
"""

from __future__ import annotations

import functools
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pydantic

from dspy_bridge.lm import dspy_internals

# Types of all programs together, some KB each. Past it the first ones go, and are built again.
_MOST = 1_000
# Words of JSON Schema whose values are no schemas.
_DATA = ("enum", "const", "default", "examples")
# Signatures of trajectories, one for each number of steps: of 60 steps they take some 25 MB.
_MOST_STEPS = 64


class _Built:
    """Values made of a type, each once while it is among the latest `_MOST`."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        # With the type, as its id belongs to another one after its end.
        self._made: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, kind: Any) -> Any:
        found = self._made.get(id(kind))
        if found is not None:
            return found[1]
        made = self._make(kind)
        with self._lock:
            self._made[id(kind)] = kind, made
            if len(self._made) > _MOST:
                self._made.popitem(last=False)
        return made


_adapters = _Built(pydantic.TypeAdapter)


class PerSignature:
    """Values made of a signature, while that is there and says the same."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def get(self, signature: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The value of this signature and `key`."""
        says = _says(signature)
        made = self._made.get(signature)
        if made is not None and key in made:
            before, value = made[key]
            if before == says:
                return value
        value = make()
        self._made.setdefault(signature, {})[key] = says, value
        return value


def _says(signature: Any) -> Any:
    """All that a prompt has of a signature. It can be changed in place, though DSPy makes a new one."""
    return signature.instructions, [
        (name, id(info.annotation), info.default, dict(info.json_schema_extra or ()))
        for name, info in signature.fields.items()
    ]


def install() -> None:
    """Put these in DSPy's place, once in a process."""
    for name in dspy_internals.TYPE_ADAPTERS:
        name.wrap(lambda _type_adapter: _adapters.get)
    dspy_internals.TOOL_VALIDATE.wrap(_validating)
    dspy_internals.TOOL_ARGUMENT.wrap(_argument_model)
    dspy_internals.RESPONSE_MODEL.wrap(_response_model)
    if dspy_internals.MAKE_SIGNATURE.there:
        dspy_internals.FORMAT_TRAJECTORY.wrap(_of_a_trajectory)
        dspy_internals.MAKE_SIGNATURE.wrap(_signature_once)


# Of the arguments of tools: `jsonschema.validate`, whose check of the schema itself takes most of the time.


def _validating(validate: Callable[..., Any]) -> Callable[..., Any]:
    import jsonschema

    @functools.wraps(validate)
    def validated(instance: Any, schema: Any) -> None:
        try:
            # Its text is the key, as a tool's schemas can be changed.
            validator = _validator(json.dumps(schema))
        except (TypeError, ValueError):
            validate(instance=instance, schema=schema)
            return
        error = jsonschema.exceptions.best_match(validator.iter_errors(instance))
        if error is not None:
            raise error

    return validated


@functools.lru_cache(_MOST)
def _validator(schema: str) -> Any:
    import jsonschema

    # The argument's type, which DSPy asks next, matches patterns in linear time; this library backtracks, for hours.
    parsed = without_patterns(json.loads(schema))
    kind = jsonschema.validators.validator_for(parsed)
    kind.check_schema(parsed)
    return kind(parsed)


def without_patterns(schema: Any) -> Any:
    """A JSON Schema without its patterns."""
    if isinstance(schema, list):
        return [without_patterns(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        word: part if word in _DATA else without_patterns(part)
        for word, part in schema.items()
        if not (word == "pattern" and isinstance(part, str))
    }


def _argument_model(create_model: Callable[..., Any]) -> Callable[..., Any]:
    models = _Built(lambda kind: create_model("Wrapper", value=(kind, ...)))

    @functools.wraps(create_model)
    def created(name: str, /, **fields: Any) -> Any:
        value = fields.get("value")
        if name == "Wrapper" and len(fields) == 1 and type(value) is tuple and value[1:] == (...,):
            return models.get(value[0])
        return create_model(name, **fields)

    return created


def _response_model(make: Callable[..., Any]) -> Callable[..., Any]:
    models = PerSignature()

    @functools.wraps(make)
    def made(signature: Any, use_native_function_calling: bool = True) -> Any:
        key = bool(use_native_function_calling)
        return models.get(signature, key, lambda: make(signature, use_native_function_calling))

    return made


# Of a ReAct's trajectory: its signature only says in which order the fields are written.

_here = threading.local()


def _of_a_trajectory(format_trajectory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(format_trajectory)
    def formatted(self: Any, trajectory: Any) -> Any:
        _here.trajectory = True
        try:
            return format_trajectory(self, trajectory)
        finally:
            _here.trajectory = False

    return formatted


def _signature_once(make_signature: Callable[..., Any]) -> Callable[..., Any]:
    once = functools.lru_cache(_MOST_STEPS)(make_signature)

    @functools.wraps(make_signature)
    def made(signature: Any, *args: Any, **options: Any) -> Any:
        plain = not args and not any(value is not None for value in options.values())
        if plain and isinstance(signature, str) and getattr(_here, "trajectory", False):
            return once(signature)
        return make_signature(signature, *args, **options)

    return made
