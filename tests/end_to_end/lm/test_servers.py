"""Which server is sent what: loopback servers keep what they got. And who may have an answer from the cache."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM, lm_env
from lm_server import KEY, LMServer, chat
from peer import Peer
from shared_peers import shared_peer

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "What is the capital of France?"}}
SMALL = "openai/small"


def asked(server: LMServer) -> list[tuple[str, str | None]]:
    """The model and the key of each request."""
    return [(body["model"], key) for body, key in zip(server.requests, server.authorizations, strict=True)]


def execute(peer: Peer, **given: Any) -> dict[str, Any]:
    reply = peer.call("execute_program", {**ASK, **given}, meta=True)
    assert reply["success"], reply
    return reply


def test_a_model_alone_is_asked_at_the_peers_server(start_lm: Any) -> None:
    """As an `lm` of a program, of a call, of a saved state; as text and as a map."""
    server = start_lm()
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "lm": SMALL})
        execute(peer)
        execute(peer, lm={"model": "openai/of-the-call"})
        (detail,) = peer.call("list_programs", {"state": True})["result"]["details"]
        state = {**detail["state"], "lm": {"model": "openai/stub-model", "temperature": 0.5, "cache": False}}
        peer.call("create_program", {**QA, "state": state})
        execute(peer)
    assert asked(server) == [(model, f"Bearer {KEY}") for model in ("small", "of-the-call", "stub-model")]
    assert server.requests[-1]["temperature"] == 0.5


def test_the_cache_knows_who_asked(start_lm: Any, tmp_path: Path) -> None:
    """In memory and on disk: another key, another server and another scope do not get the answer."""
    server, other = start_lm(), start_lm(chat(answer="Rome"))
    for env in ({}, {"DSPY_BRIDGE_DISK_CACHE": str(tmp_path), "DSPY_BRIDGE_CACHE_ENTRIES": "0"}):
        server.serve(lambda _: chat(answer="Paris"))
        with Peer(env={**lm_env(server, cache=True), **env}) as peer:
            peer.call("create_program", QA)
            asked_with: list[tuple[dict[str, Any], int]] = [
                ({}, 0),
                ({}, 1),
                ({"config": {"api_key": "sk-tenant-2"}}, 0),
                ({"config": {"api_key": "sk-tenant-2"}}, 1),
                ({"config": {"cache": {"scope": "tenant-3"}}}, 0),
                ({"lm": {"model": "openai/stub-model", "cache": {"scope": "tenant-3"}}}, 1),
                ({"config": {"cache": False}}, 0),
                ({}, 1),
            ]
            for given, hits in asked_with:
                assert execute(peer, **given)["meta"]["cache_hits"] == hits, given
            elsewhere = {"lm": {"model": "openai/stub-model", "api_base": other.url, "api_key": KEY}}
            assert execute(peer, **elsewhere)["result"] == {"answer": "Rome"}
        assert len(server.requests) == 4


@pytest.mark.parametrize("way", ["dspy", "litellm"])
def test_an_lm_that_cannot_be_reached_is_named_within_its_connect_timeout(start_lm: Any, way: str) -> None:
    with socket.socket() as taken:
        # Bound and not listening: connections are refused, and no other program gets the port.
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        options = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": KEY, "connect_timeout": 0.5}
        if way == "litellm":
            options["extra_headers"] = {"X-Own": "1"}
        with shared_peer(env=lm_env(start_lm())) as peer:
            peer.call("create_program", {**QA, "lm": {"model": "openai/x", **options}})
            # The first call imports LiteLLM.
            for config in ({}, {"temperature": 0.5}):
                began = time.monotonic()
                reply = peer.call("execute_program", {**ASK, "config": config})
            assert reply["error_type"] == "lm_error" and reply["retryable"]
            assert f"127.0.0.1:{port} cannot be reached within 0.5 s" in reply["error"]
            # DSPy alone: 7 s, LiteLLM: 13 s.
            assert time.monotonic() - began < 5


@pytest.mark.slow
def test_ollama_is_asked_at_its_address_by_litellm_as_well(start_lm: Any) -> None:
    """LiteLLM asks it about the model, too, with another client."""
    said = {"role": "assistant", "content": chat(answer="Paris")}
    server = start_lm((200, {"model": "m", "message": said, "done": True, "prompt_eval_count": 3, "eval_count": 4}))
    lm = {"model": "ollama_chat/m", "api_base": server.url.removesuffix("/v1"), **BY_LITELLM, "cache": False}
    with shared_peer(env=lm_env(start_lm())) as peer:
        peer.call("create_program", {**QA, "lm": lm})
        assert execute(peer)["result"] == {"answer": "Paris"}
    assert server.requests[0]["model"] == "m"
