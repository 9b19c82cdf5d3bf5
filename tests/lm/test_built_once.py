"""built_once: types and signatures are built once, found by identity, bounded, and given up when they change."""

from __future__ import annotations

import gc
from typing import Any

import dspy
import pydantic

from dspy_bridge.lm.adapters import built_once


def test_a_type_is_built_once_and_by_its_identity() -> None:
    """`int | str` equals `str | int`, but an LM is shown another schema."""
    made: list[Any] = []
    get = built_once.per_type(lambda kind: made.append(kind) or pydantic.TypeAdapter(kind))
    one, other = int | str, str | int
    assert one == other
    schemas = [get(kind).json_schema()["anyOf"][0]["type"] for kind in (one, other, one, other)]
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
