"""What `mix dspex.doctor --ask` finds out of an LM: a loopback server that honours schemas and functions, or not."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import SLOW_BY_LITELLM
from lm_server import Answer, completion

from dspy_bridge.lm import probe

CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def honours(*capabilities: str) -> Any:
    """An LM that honours these, and answers all else with a greeting."""

    def answer(request: dict[str, Any]) -> Answer:
        if "response_format" in request and "response_schema" in capabilities:
            return '{"mood": "calm", "certain": true}'
        if "tools" in request and "function_calling" in capabilities:
            body = completion("x", "")
            message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
            body["choices"][0] |= {"finish_reason": "tool_calls", "message": message}
            return 200, body
        return "Hello! {}"

    return answer


def ask(server: Any, supports: frozenset[str] | None = None, model: str = "openai/x", **more: Any) -> dict[str, Any]:
    return probe.ask(model, {**server.options(), **more}, supports)


BOTH = ("response_schema", "function_calling")


@pytest.mark.parametrize(
    ("honoured", "configured", "supports"),
    [
        (BOTH, None, [*BOTH]),
        (BOTH, BOTH, None),
        (["response_schema"], None, ["response_schema"]),
        (["function_calling"], ["response_schema"], ["function_calling"]),
        ([], None, None),
        ([], [], None),
        ([], BOTH, ["none"]),
        # Whether it reasons is not asked.
        (["response_schema"], ["reasoning"], ["response_schema", "reasoning"]),
    ],
)
def test_the_option_to_set_if_it_is_not_what_is_known(
    start_lm: Any, honoured: Any, configured: Any, supports: Any
) -> None:
    found = ask(start_lm(honours(*honoured)), None if configured is None else frozenset(configured))
    assert found.pop("ms") >= 0
    assert found == {**{name: name in honoured for name in BOTH}, "supports": supports}


@pytest.mark.parametrize(
    ("status", "kind", "requests"),
    [
        (401, "LMAuthError", 1),
        (404, "LMUnsupportedModelError", 2),
        (429, "LMRateLimitError", 1),
        (500, "LMServerError", 2),
    ],
)
def test_an_error_is_one_line_and_is_not_tried_for_long(start_lm: Any, status: int, kind: str, requests: int) -> None:
    server = start_lm((status, {"error": {"message": "model x not found"}}))
    found = ask(server)
    assert found["kind"] == kind and "model x not found" in found["error"] and "\n" not in found["error"]
    assert len(server.requests) == requests


def test_an_lm_that_never_answers(start_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_lm()
    server.gate.clear()
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    assert ask(server) == {"kind": "LMTimeoutError", "error": "no answer within 0.2 s"}


@pytest.mark.parametrize("way", [pytest.param({}, id="dspy"), SLOW_BY_LITELLM])
def test_no_redirect_is_followed(start_lm: Any, way: dict[str, Any]) -> None:
    other = start_lm()
    server = start_lm((307, {}, {"Location": f"{other.url}/chat/completions"}))
    found = ask(server, **way)
    assert found["kind"] == "LMAnswerRefused" and "a redirect (307)" in found["error"] and other.requests == []
