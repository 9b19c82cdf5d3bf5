"""guarded_adapters: types are built once, found by identity; system messages follow their signatures."""

from __future__ import annotations

from typing import Any

import dspy
import pydantic

from dspy_bridge.lm.adapters import guarded_adapters
from dspy_bridge.lm.adapters.guarded_adapters import guarded


def test_a_type_is_built_once_and_by_its_identity() -> None:
    """`int | str` equals `str | int`, but an LM is shown another schema."""
    made: list[Any] = []
    get = guarded_adapters.per_type(lambda kind: made.append(kind) or pydantic.TypeAdapter(kind))
    one, other = int | str, str | int
    assert one == other
    schemas = [get(kind).json_schema()["anyOf"][0]["type"] for kind in (one, other, one, other)]
    assert schemas == ["integer", "string", "integer", "string"]
    assert len(made) == 2


def test_a_system_message_follows_the_instructions_of_its_signature() -> None:
    adapter, signature = guarded(dspy.ChatAdapter(), strict=True), dspy.Signature("question -> answer", "Answer.")
    before = adapter.format_system_message(signature)
    assert adapter.format_system_message(signature) is before
    signature.instructions = "Answer in one word."
    assert "in one word" in adapter.format_system_message(signature)
