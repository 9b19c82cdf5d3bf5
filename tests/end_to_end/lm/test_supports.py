"""The LM option `supports`: what is asked of a server that DSPy does not know, and how it falls back."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import LMServer
from peer import Peer
from shared_peers import shared_peer

SORT = {"id": "sort", "signature": "text -> label: Literal['spam', 'ham'], score: int", "adapter": "json"}
ASK = {"program_id": "sort", "inputs": {"text": "Buy!"}}
ANSWER = '{"label": "spam", "score": 9}'
RESULT = {"label": "spam", "score": 9}
SCHEMA = {"supports": ["response_schema"]}


def formats(server: LMServer) -> list[str | None]:
    """The types of the response formats that it was asked for."""
    return [request.get("response_format", {}).get("type") for request in server.requests]


def execute(peer: Peer, program: dict[str, Any] = SORT, *, fallbacks: int = 0, **given: Any) -> Any:
    peer.call("create_program", program)
    reply = peer.call("execute_program", {**ASK, **given}, meta=True)
    assert reply["success"], reply
    assert reply["meta"]["fallbacks"] == fallbacks
    return reply["result"]


@pytest.mark.parametrize("route", [{}, pytest.param(BY_LITELLM, id="litellm")])
def test_the_signatures_schema_goes_to_a_server_that_dspy_does_not_know(start_lm: Any, route: dict[str, Any]) -> None:
    server = start_lm(ANSWER)
    # LiteLLM, whose import takes seconds, is in the peer that the tests share.
    with shared_peer(env=lm_env(server, **({} if route else SCHEMA))) as peer:
        own = {"model": "openai/stub-model", **server.options(**route, **SCHEMA)}
        assert execute(peer, {**SORT, "lm": own} if route else SORT) == RESULT
    (request,) = server.requests
    asked = request["response_format"]["json_schema"]["schema"]
    assert asked["properties"]["label"]["enum"] == ["spam", "ham"]
    assert asked["properties"]["score"]["type"] == "integer"
    assert asked["required"] == ["label", "score"] and asked["additionalProperties"] is False
    assert "supports" not in request


def test_it_belongs_to_the_model_and_overrules_dspys_table(start_lm: Any) -> None:
    """Another model of the server has what DSPy knows of it by its name: of the stub nothing, of GPT-4o mini all."""
    known, unknown = "openai/gpt-4o-mini", "openai/another"
    cases = [
        ({"model": "openai/stub-model"}, "json_schema"),
        ({"model": unknown}, None),
        ({"model": unknown, "supports": "none"}, None),
        ({"model": known}, "json_schema"),
        ({"model": known, "supports": ["function_calling"]}, "json_object"),
        ({"model": known, "supports": ["none"]}, None),
    ]
    server = start_lm(ANSWER)
    with shared_peer(env=lm_env(server, **SCHEMA)) as peer:
        for lm, _ in cases:
            execute(peer, lm={**lm, "cache": False})
    assert formats(server) == [wanted for _, wanted in cases]


def test_a_server_that_refuses_the_schema_is_an_error_with_its_words(start_lm: Any) -> None:
    """DSPy does not ask again without it: the option says that the server can do it."""
    server = start_lm((400, {"error": {"message": "no json_schema here", "type": "invalid_request_error"}}))
    with shared_peer(env=lm_env(server, **SCHEMA)) as peer:
        peer.call("create_program", SORT)
        reply = peer.call("execute_program", ASK)
        assert reply["error_type"] == "lm_error" and "no json_schema here" in reply["error"]
        assert len(server.requests) == 1
        server.serve(lambda _request: ANSWER)
        assert execute(peer, lm={"model": "openai/stub-model", "supports": "none"}) == RESULT
    assert formats(server) == [None]
