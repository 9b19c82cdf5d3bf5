"""How an LM call ended, as its provider tells it; and what is read where DSPy or a provider tells nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dspy_bridge.lm.metering import endings


def choices(*reasons: object) -> dict[str, Any]:
    return {"choices": [{"finish_reason": reason} for reason in reasons]}


@pytest.mark.parametrize(
    ("raw", "reasons"),
    [
        (choices("stop"), ["stop"]),
        (choices("stop", "length"), ["stop", "length"]),
        (choices("max_tokens"), ["length"]),
        (choices("function_call"), ["tool_calls"]),
        (choices(None), [None]),
        (choices(["stop"]), [None]),
        (SimpleNamespace(choices=[SimpleNamespace(finish_reason="length")]), ["length"]),
        # OpenAI's Responses API.
        ({"status": "completed", "output": [{"type": "message"}]}, ["stop"]),
        ({"status": "completed", "output": [{"type": "function_call"}]}, ["tool_calls"]),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, ["length"]),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, ["content_filter"]),
        ({"status": "incomplete"}, [None]),
        (None, [None]),
        ("text", [None]),
        ({"choices": 5}, [None]),
    ],
)
def test_reasons_have_openais_names(raw: object, reasons: list[str | None]) -> None:
    assert endings.reasons(raw) == reasons


@pytest.mark.parametrize(
    "given",
    [
        choices("length"),
        {"stop_reason": "max_tokens"},
        {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
    ],
)
def test_a_tool_call_that_a_provider_cut_off_is_known_by_the_providers_reason(given: dict[str, Any]) -> None:
    """For DSPy any answer with a tool call ended with it."""
    response = SimpleNamespace(finish_reason="tool_call", provider_data=given)
    assert endings.reasons((response,)) == ["length"]
    response = SimpleNamespace(finish_reason="tool_call", provider_data=choices("tool_calls"))
    assert endings.reasons((response,)) == ["tool_calls"]
    assert endings.reasons(SimpleNamespace(finish_reason="tool_call", provider_data=None)) == ["tool_calls"]
