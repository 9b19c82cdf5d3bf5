"""Which outputs are asked for in JSON mode since no response schema can describe them."""

from __future__ import annotations

from typing import Any, Literal

import dspy
import pydantic
import pytest

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.adapters import json_answers  # noqa: F401  # its import changes DSPy's JSON adapter


class Item(pydantic.BaseModel):
    name: str
    parts: list[Item] = []


class Holder(pydantic.BaseModel):
    counts: dict[str, int]


def in_json_mode(annotation: Any) -> bool:
    asked: dict[str, Any] = {}
    signature = dspy.Signature({"q": (str, dspy.InputField()), "a": (annotation, dspy.OutputField())})
    getattr(dspy.JSONAdapter(), dspy_internals.RESPONSE_FORMAT.attribute)(dspy.LM("openai/gpt-4o"), asked, signature)
    return asked["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    "annotation", [dict[str, int], dict, list[dict[str, int]], Holder, list[Holder], Holder | None, tuple[int, dict]]
)
def test_a_map_at_any_depth(annotation: Any) -> None:
    assert in_json_mode(annotation)


@pytest.mark.parametrize(
    "annotation", [str, int, Literal["a", "b"], list[str], Item, list[Item], Item | None, dspy.ToolCalls]
)
def test_types_that_a_schema_describes(annotation: Any) -> None:
    assert not in_json_mode(annotation)
