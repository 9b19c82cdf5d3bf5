"""The peer's key goes to the server that it was given for alone, by whatever name an LM is asked for.

The peers send through a proxy that ends TLS itself: it sees what would have come to the providers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from lm_server import chat
from peer import Peer
from tls_proxy import Sent, TLSProxy

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "Why?"}}
EXAMPLES = {
    "inputs": [{"question": "Why?"}] * 2,
    "expected": [{"answer": "So."}] * 2,
    "metric": {"field": "answer", "match": "equals"},
}
SECRETS = {"api_key": "sk-of-the-peer-1", "extra_headers": {"X-Team": "team-of-the-peer"}}
OF_PEER = ("sk-of-the-peer-1", "team-of-the-peer")
# Keys of the environment, so that LMs that inherit nothing send something.
KEYS = ("OPENAI", "ANTHROPIC", "XAI", "GEMINI", "GOOGLE", "MISTRAL", "GROQ")
HOSTS = {
    "openai": "api.openai.com",
    "anthropic": "api.anthropic.com",
    "xai": "api.x.ai",
    "gemini": "generativelanguage.googleapis.com",
    "mistral": "api.mistral.ai",
}
PEERS = {
    "openai/gpt-4o-mini": "openai",
    "gpt-4o-mini": "openai",
    "claude-sonnet-4-5": "anthropic",
    "anthropic/claude-sonnet-4-5": "anthropic",
    "gemini/gemini-2.5-pro": "gemini",
    "gemini-2.5-pro": "gemini",
    "grok-4": "xai",
    "mistral/mistral-small-latest": "mistral",
}
# Of these DSPy's router knows the provider, or LiteLLM has it before the slash.
NAMES = {
    "openai/gpt-4.1": "openai",
    "gpt-4.1": "openai",
    "openai:gpt-4.1": "openai",
    "openai-chat:gpt-4.1": "openai",
    "anthropic/claude-haiku-4-5": "anthropic",
    "claude-haiku-4-5": "anthropic",
    "anthropic:claude-haiku-4-5": "anthropic",
    "gemini/gemini-2.5-flash": "gemini",
    "gemini-2.5-flash": "gemini",
    "xai/grok-3": "xai",
    "grok-3": "xai",
    "mistral/mistral-large-latest": "mistral",
}
# Nobody's, or not the one that they look like.
NOBODYS = [
    "OpenAI/gpt-4.1",
    "OPENAI:gpt-4.1",
    "Claude-haiku-4-5",
    "mistral-large-latest",
    "my-model",
    "openai /gpt-4.1",
]
ALSO_LITELLM = pytest.mark.parametrize(
    "by_litellm", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dspy", "litellm"]
)


@pytest.fixture(scope="module")
def proxy() -> Iterator[TLSProxy]:
    proxy = TLSProxy()
    yield proxy
    proxy.stop()


def peer_env(proxy: TLSProxy, model: str, **options: Any) -> dict[str, str]:
    given = {**options, "cache": False, "num_retries": 0}
    keys = {f"{name}_API_KEY": f"sk-env-{name.lower()}" for name in KEYS}
    return {**proxy.env, **keys, "DSPY_BRIDGE_LM": model, "DSPY_BRIDGE_LM_OPTIONS": json.dumps(given)}


def secrets_of(model: str, by_litellm: bool) -> dict[str, Any]:
    """Own headers make DSPy take LiteLLM."""
    return SECRETS if by_litellm else {"api_key": SECRETS["api_key"]}


def sent(proxy: TLSProxy, peer: Peer, command: str, args: dict[str, Any]) -> list[Sent]:
    """What a call, which fails, sends."""
    proxy.sent.clear()
    reply = peer.call(command, args)
    assert not reply["success"] and reply["error_type"] in ("lm_error", "lm_not_configured"), reply
    return list(proxy.sent)


def assert_to_its_server(requests: list[Sent], provider: str, wanted: tuple[Any, ...]) -> None:
    for request in requests:
        leaked = any(secret in request.text for secret in OF_PEER)
        assert not leaked or request.host == HOSTS[provider], (wanted, request)


@ALSO_LITELLM
@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.slow if PEERS[model] == "mistral" else ()) for model in PEERS]
)
def test_no_name_takes_it_elsewhere(proxy: TLSProxy, model: str, by_litellm: bool) -> None:
    """As an `lm` of a call; a name of the peer's own provider has the key, with either engine."""
    provider = PEERS[model]
    with Peer(env=peer_env(proxy, model, **secrets_of(model, by_litellm))) as peer:
        peer.call("create_program", QA)
        # LiteLLM's import takes seconds.
        names = [*NAMES, *NOBODYS] if by_litellm else [name for name in NAMES if NAMES[name] != "mistral"]
        for name in names:
            for lm in (name, {"model": name, "engine": "litellm"}) if by_litellm else (name,):
                requests = sent(proxy, peer, "execute_program", {**ASK, "lm": lm})
                assert_to_its_server(requests, provider, (model, lm))
                if NAMES.get(name) == provider and (not by_litellm or "/" in name):
                    assert [request.host for request in requests] == [HOSTS[provider]], (model, lm)
                    assert SECRETS["api_key"] in requests[0].text, (model, lm)
        for name in NAMES if by_litellm else ():
            # Where DSPy asks for text completions, whatever the name is.
            requests = sent(proxy, peer, "execute_program", {**ASK, "lm": {"model": name, "model_type": "text"}})
            assert_to_its_server(requests, provider, (model, name, "text"))
            assert all(request.host == HOSTS["openai"] for request in requests)


@ALSO_LITELLM
def test_nor_does_the_lm_of_a_program_a_state_or_an_optimizer(proxy: TLSProxy, by_litellm: bool) -> None:
    model = "openai/gpt-4o-mini"
    with Peer(env=peer_env(proxy, model, **secrets_of(model, by_litellm))) as peer:
        peer.call("create_program", QA)
        (detail,) = peer.call("list_programs", {"state": True})["result"]["details"]
        for name in (
            "claude-sonnet-4-5",
            "grok-4",
            "gemini-2.5-flash",
            "anthropic:claude-3",
            "gpt-4.1",
            "openai/gpt-4.1",
        ):
            ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
                ({"lm": name}, {}),
                ({"lm": {"model": name, "temperature": 0.5}}, {}),
                ({"state": {**detail["state"], "lm": {"model": name}}}, {}),
                ({}, {**EXAMPLES, "optimize": {"optimizer": "copro", "prompt_lm": name}}),
                ({}, {**EXAMPLES, "optimize": {"optimizer": "bootstrap_few_shot", "teacher_lm": name}}),
            ]
            for program, call in ways:
                reply = peer.call("create_program", {**QA, "id": "other", **program})
                assert reply["success"], reply
                args = {**ASK, **call, "program_id": "other"}
                requests = sent(proxy, peer, "execute_program", args)
                assert_to_its_server(requests, "openai", (name, program, call))
                assert requests, (name, program, call)
                if NAMES.get(name) == "openai":
                    assert SECRETS["api_key"] in requests[0].text, (name, program, call)


@pytest.mark.slow
def test_nor_do_a_providers_own_options(start_lm: Any) -> None:
    """In `extra` of an `lm`, and of a `config`: with these LiteLLM asks Azure at the environment's address."""
    server = start_lm(chat(answer="So."))
    azure = {"AZURE_API_BASE": server.url, "AZURE_API_VERSION": "2024-02-01"}
    options = json.dumps({**SECRETS, "cache": False, "num_retries": 0})
    with Peer(env={**azure, "DSPY_BRIDGE_LM": "openai/gpt-4o-mini", "DSPY_BRIDGE_LM_OPTIONS": options}) as peer:
        peer.call("create_program", QA)
        for extra in ({"azure": True}, {"deployment_id": "d"}):
            for given in ({"config": {"extra": extra}}, {"lm": {"model": "openai/gpt-4.1", "extra": extra}}):
                peer.call("execute_program", {**ASK, **given})
    assert server.authorizations and not any(SECRETS["api_key"] in str(key) for key in server.authorizations)
