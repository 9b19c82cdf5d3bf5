"""built_once: types and signatures are built once, found by identity, bounded, and given up when they change."""

from __future__ import annotations

import gc
from typing import Any

import dspy
import pydantic
import pytest

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.adapters import built_once


def test_a_type_is_built_once_and_by_its_identity() -> None:
    """`int | str` equals `str | int`, but an LM is shown another schema."""
    made: list[Any] = []
    built = built_once._Built(lambda kind: made.append(kind) or pydantic.TypeAdapter(kind))
    one, other = int | str, str | int
    assert one == other
    schemas = [built.get(kind).json_schema()["anyOf"][0]["type"] for kind in (one, other, one, other)]
    assert schemas == ["integer", "string", "integer", "string"]
    assert len(made) == 2


def test_what_is_made_of_a_signature_follows_its_changes_and_ends_with_it() -> None:
    per_signature = built_once.PerSignature()
    signature: Any = dspy.Signature("question -> answer", "Answer.")
    texts = iter("abcdef")

    def get(key: str = "system") -> str:
        return str(per_signature.get(signature, key, lambda: next(texts)))

    assert [get(), get(), get(key="schema"), get()] == ["a", "a", "b", "a"]
    signature.instructions = "Answer in one word."
    assert [get(), get()] == ["c", "c"]
    signature.fields["answer"].json_schema_extra["desc"] = "a city"
    assert [get(), get()] == ["d", "d"]
    signature = signature.with_instructions("Answer in one word.")
    assert get() == "e"
    gc.collect()
    assert len(per_signature._made) == 1
    signature = None
    gc.collect()
    assert len(per_signature._made) == 0


def test_a_schema_that_was_changed_is_read_again() -> None:
    import jsonschema

    validate = built_once._validating(jsonschema.validate)
    schema: dict[str, Any] = {"type": "integer"}
    validate(instance=3, schema=schema)
    with pytest.raises(jsonschema.ValidationError, match="'x' is not of type 'integer'"):
        validate(instance="x", schema=schema)
    schema["type"] = "string"
    validate(instance="x", schema=schema)
    with pytest.raises(jsonschema.SchemaError):
        validate(instance="x", schema={"type": "no such type"})
    # No JSON, which the library itself accepts.
    validate(instance="x", schema={"enum": ["x", {1}]})


def test_only_trajectories_share_a_signature() -> None:
    """Others may be changed by who has made them."""
    make = built_once._signature_once(dspy_internals.MAKE_SIGNATURE.value)
    assert make("a -> b") is not make("a -> b")
    shared: list[Any] = []
    formatted = built_once._of_a_trajectory(lambda _self, keys: shared.append(make(keys)))
    formatted(None, "a, b -> x")
    formatted(None, "a, b -> x")
    assert shared[0] is shared[1]
    assert make("a, b -> x") is not shared[0]
