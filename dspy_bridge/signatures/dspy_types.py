"""DSPy's types of text: code that is read in time, and what replies have of them. Imports DSPy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import dspy
import pydantic
from dspy.experimental import Citations, Document

# DSPy's pattern for code in a Markdown block takes the square of a line's backticks: 64 KB would take a minute. This is
# the length of a line times its fences, and takes some 50 ms.
_MOST_FENCES = 50_000_000


class Code(dspy.Code):  # type: ignore[misc]  # DSPy ships no types
    """DSPy's, for code that its pattern reads in time."""

    # XMLAdapter would show fields of models that are not of DSPy.
    __module__ = dspy.Code.__module__

    @pydantic.model_validator(mode="before")
    @classmethod
    def validate_input(cls, data: Any) -> Any:
        text = data.get("code") if isinstance(data, dict) else data
        if isinstance(text, str) and any(len(line) * line.count("```") > _MOST_FENCES for line in text.split("\n")):
            raise ValueError("expected code, got a line with too many backticks")
        return super().validate_input(data)


@functools.lru_cache(256)
def code_in(language: str) -> Any:
    kind: Any = Code
    return kind[language]


def for_replies(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs without DSPy's own objects, whose JSON is DSPy's notation for prompts."""
    return {name: _for_reply(value) for name, value in outputs.items()}


def _for_reply(value: Any) -> Any:
    if isinstance(value, (dspy.Reasoning, dspy.Code)):
        return value.format()
    if isinstance(value, Citations):
        return [dict(citation) for citation in value.citations]
    if isinstance(value, list) and value and isinstance(value[0], dspy.Type):
        return [_for_reply(one) for one in value]
    return dict(value) if isinstance(value, Document) else value
