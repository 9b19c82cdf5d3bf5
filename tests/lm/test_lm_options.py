"""What an LM is asked with and where: options completed from the peer's, and refused by name. No peer, no server."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm import lm_options
from dspy_bridge.lm.transport import routes

PEERS = {
    "model": "openai/big",
    "api_base": "http://here/v1",
    "api_key": "sk-peer-key",
    "headers": {"X-Team": "blue", "Authorization": "Bearer sk-peer-header"},
    "timeout": 7,
    "connect_timeout": 1,
    "temperature": 0.2,
    "extra": {"vendor_mode": "fast"},
}


def complete(given: object) -> dict[str, Any]:
    return lm_options.complete(given, "lm", PEERS)


@pytest.mark.parametrize(
    "given", ["openai/small", {"model": "openai/small"}, {"model": "openai/small", "inherit": True}]
)
def test_a_model_of_the_same_provider_is_asked_at_the_peers_server(given: object) -> None:
    """With what belongs to the server, and no setting of the peer's model."""
    expected = {name: value for name, value in PEERS.items() if name not in ("model", "temperature")}
    assert complete(given) == {"model": "openai/small", **expected}


@pytest.mark.parametrize(
    "given",
    [
        {"model": "anthropic/small"},
        {"model": "openai/small", "inherit": False},
        {"model": "openai/small", "api_base": "http://there/v1", "api_key": "sk-own"},
        {"model": "openai/small", "custom_llm_provider": "other", "api_key": "sk-own"},
        {"model": "openai/small", "extra": {"vendor_api_base": "http://there"}, "api_key": "sk-own"},
    ],
)
def test_another_server_gets_only_what_is_named_for_it(given: dict[str, Any]) -> None:
    options = complete(given)
    assert options == {name: value for name, value in given.items() if name != "inherit"}


@pytest.mark.parametrize(
    "place",
    [
        {"api_base": "http://there/v1"},
        {"base_url": "http://there/v1"},
        {"api_base": "http://here/v1"},
        {"api_base": "http://there/v1", "inherit": False},
        {"extra": {"azure_endpoint": "http://there"}},
    ],
)
def test_an_address_without_a_key_gets_neither_the_peers_nor_the_environments(place: dict[str, Any]) -> None:
    assert complete({"model": "openai/small", **place})["api_key"] == lm_options.NO_KEY


@pytest.mark.parametrize("peers", [PEERS, None])
@pytest.mark.parametrize(
    "given",
    [
        {"model": "mistral/small", "base_url": "http://there/v1"},
        {"model": "text-completion-openai/small", "api_base": "http://there/v1"},
        {"model": "vendor/small", "custom_llm_provider": "openai", "api_base": "http://there/v1"},
    ],
)
def test_nor_does_one_of_another_provider(given: dict[str, Any], peers: dict[str, Any] | None) -> None:
    assert lm_options.complete(given, "lm", peers)["api_key"] == lm_options.NO_KEY
    assert "api_key" not in lm_options.complete(given, "lm_options", of_settings=True)


def test_what_a_model_supports_is_inherited_by_the_same_model_alone() -> None:
    """Another model of the server may not support it; nor may the same model of another server."""
    peers = {**PEERS, "supports": ["response_schema"]}

    def supports(given: object) -> object:
        return lm_options.split(lm_options.complete(given, "lm", peers)).supports

    assert supports("openai/big") == supports({"model": "openai/big", "temperature": 1}) == {"response_schema"}
    assert supports({"model": "openai/big", "supports": "none"}) == frozenset()
    assert supports("openai/small") is None
    assert supports({"model": "openai/big", "inherit": False}) is None
    assert supports({"model": "openai/big", "api_base": "http://there/v1"}) is None
    assert lm_options.changed(peers, {"timeout": 2})["supports"] == ["response_schema"]


def test_a_config_changes_the_key_but_does_not_take_it_elsewhere() -> None:
    assert lm_options.changed(PEERS, {"api_key": "sk-own"})["api_base"] == "http://here/v1"
    elsewhere = lm_options.changed(PEERS, {"api_base": "http://there"})
    assert elsewhere == {"model": "openai/big", "temperature": 0.2, "api_base": "http://there", "api_key": "none"}
    assert lm_options.changed(PEERS, {"cache": {"scope": "a"}}) == {**PEERS, "cache": {"scope": "a"}}


@pytest.mark.parametrize(
    "extra",
    [
        {"aws_bedrock_runtime_endpoint": "http://there"},
        {"gigachat_auth_url": "http://there"},
        {"sagemaker_base_url": "http://there"},
        {"url": "http://there"},
        {"azure": True},
        {"deployment_id": "d"},
        {"use_litellm_proxy": True},
    ],
)
def test_extra_options_that_name_another_server_take_nothing_there(extra: dict[str, Any]) -> None:
    settings, of_lm = lm_options.read_config({"extra": extra, "temperature": 0.5})
    assert (settings, of_lm) == ({"temperature": 0.5}, {"extra": extra})
    for made in (lm_options.changed(PEERS, of_lm), complete({"model": "openai/small", "extra": extra})):
        assert made["api_key"] == lm_options.NO_KEY and "headers" not in made and "api_base" not in made


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"api_bas": "x"}, "lm.api_bas: unknown option; did you mean api_base?"),
        ({"max_token": 5}, "lm.max_token: unknown option; did you mean max_tokens?"),
        ({"foo": 5}, "lm.foo: unknown option; what only your provider takes goes under extra"),
        ({"temperature": "hot"}, "lm.temperature: expected a number"),
        ({"max_tokens": 0.5}, "lm.max_tokens: expected a whole number"),
        ({"callbacks": []}, "lm.callbacks: cannot be given as JSON"),
        ({"inherit": 1}, "lm.inherit: expected true or false"),
        ({"connect_timeout": 0}, "lm.connect_timeout: expected a positive number of seconds"),
        ({"connect_timeout": True}, "lm.connect_timeout: expected a positive number of seconds"),
        ({"connect_timeout": 10**400}, "lm.connect_timeout: expected a positive number of seconds"),
        ({"requests_per_minute": 10**400}, "lm.requests_per_minute: expected a positive number"),
        ({"requests_per_minute": 5e-324}, "lm.requests_per_minute: expected a positive number"),
        ({"tokens_per_minute": 10**400}, "lm.tokens_per_minute: expected a positive number"),
        ({"cache": "yes"}, 'lm.cache: expected true, false or {"scope": text}'),
        ({"cache": {"scope": ""}}, 'lm.cache: expected true, false or {"scope": text}'),
        ({"cache": {"scope": "a", "ttl": 1}}, 'lm.cache: expected true, false or {"scope": text}'),
        ({"extra": []}, "lm.extra: expected an object"),
        ({"extra": {"api_key": "k"}}, "lm.extra.api_key: not one of the provider's own options"),
        *(
            ({"extra": {name: []}}, f"lm.extra.{name}: not one of the provider's own options")
            for name in ("fallbacks", "context_window_fallback_dict", "model_list", "litellm_params")
        ),
        ({"extra": {"messages": []}}, "lm.extra.messages: not one of the provider's own options"),
        *(
            ({"supports": wrong}, 'lm.supports: expected ["none"], or a list of response_schema, function_calling, rea')
            for wrong in ("response_schema", [], ["json"], ["none", "reasoning"], [["reasoning"]], {}, 1, True)
        ),
        ({"suports": "none"}, "lm.suports: unknown option; did you mean supports?"),
        ({"model": ""}, "lm.model: expected text"),
        ({"model": "openai/" + "x" * 1_000_000}, "lm.model: expected text"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgs) as refused:
        complete({"model": "openai/small", **given})
    assert str(refused.value).startswith(text)


def test_a_config_has_no_option_of_an_lm() -> None:
    for name in ("model", "num_retries", "engine", "supports"):
        with pytest.raises(InvalidArgs, match=f"config.{name}: unknown option"):
            lm_options.read_config({name: "x"})


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"model": "hosted_vllm/other", "base_url": "http://here/v1/", "api_key": "sk-1"}, True),
        ({"model": "openai/small", "api_key": "sk-1", "headers": {"X-Team": "blue"}}, True),
        ({"model": "openai/small"}, True),
        ({"model": "openai/m", "api_key": "sk-2"}, False),
        ({"model": "openai/m", "api_base": "http://there/v1"}, False),
        ({"model": "anthropic/m", "api_key": "sk-1"}, False),
        ({"model": "openai/m", "headers": {"Authorization": "Bearer sk-3"}}, False),
    ],
)
def test_limits_are_of_a_server_and_a_key_however_they_are_named(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], same: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("OPENAI_API_BASE", "http://here/v1/")
    wanted = routes.limited_account({"model": "openai/m", "api_base": "http://here/v1", "api_key": "sk-1"})
    assert (routes.limited_account(options) == wanted) == same


@pytest.mark.parametrize(
    ("peers", "name", "inherits"),
    [
        ("openai/big", "gpt-4.1", True),
        ("openai/big", "openai:gpt-4.1", True),
        ("gpt-4o", "openai/small", True),
        ("openai/big", "claude-sonnet-4-5", False),
        ("openai/big", "grok-4", False),
        ("openai/big", "gemini-2.5-flash", False),
        ("openai/big", "anthropic:claude-3", False),
        ("openai/big", "OpenAI/small", False),
        ("openai/big", "my-model", False),
        ("claude-sonnet-4-5", "anthropic/small", True),
        ("claude-sonnet-4-5", "gpt-4o", False),
        ("claude-sonnet-4-5", "openai/small", False),
        ("my-model", "my-model", True),
        ("my-model", "other-model", False),
    ],
)
def test_a_name_is_of_the_provider_that_dspys_router_says(peers: str, name: str, inherits: bool) -> None:
    """One that it does not know is nobody's; the peer's own name is the peer's."""
    options = lm_options.complete(name, "lm", {"model": peers, "api_key": "sk-peer-key"})
    assert (options.get("api_key") == "sk-peer-key") == inherits


def test_a_text_completion_is_asked_where_dspy_asks_for_all_of_them() -> None:
    """At OpenAI's, whatever the model's name is."""
    for peers in ("anthropic/big", "openai/big"):
        peer = {"model": peers, "api_key": "sk-peer-key"}
        options = lm_options.complete({"model": "anthropic/small", "model_type": "text"}, "lm", peer)
        assert ("api_key" in options) == (peers == "openai/big")


def test_any_model_of_a_provider_that_is_named_apart_from_it_is_asked_there() -> None:
    peer = {"model": "big", "custom_llm_provider": "openai", "api_key": "sk-peer-key"}
    assert lm_options.complete("small", "lm", peer)["api_key"] == "sk-peer-key"
    assert "api_key" not in lm_options.complete("anthropic/small", "lm", peer)


@pytest.mark.parametrize("name", ["headers", "extra_headers"])
def test_another_key_goes_without_the_secrets_in_either_kind_of_headers(name: str) -> None:
    peer = {**PEERS, name: {"X-Team": "blue", "X-Api-Key": "sk-peer-second", "Authorization": "Bearer sk-peer-third"}}
    options = lm_options.complete({"model": "openai/small", "api_key": "sk-own"}, "lm", peer)
    assert options[name] == {"X-Team": "blue"} and "sk-peer" not in str(options)
    assert lm_options.complete("openai/small", "lm", peer)[name] == peer[name]


@pytest.mark.parametrize(
    "given",
    [
        {"model": "replicate/owner/model"},
        {"model": "huggingface/owner/model"},
        {"model": "owner/model", "custom_llm_provider": "replicate"},
    ],
)
def test_an_address_that_would_be_ignored_is_refused(given: dict[str, Any]) -> None:
    """Of an `lm` and of the settings; not the peer's, which such an `lm` does not inherit."""
    for name in ("api_base", "base_url"):
        for of_settings in (False, True):
            with pytest.raises(InvalidArgs, match=r"^lm\.api_base: "):
                lm_options.complete({**given, name: "http://own/v1"}, "lm", PEERS, of_settings=of_settings)
    assert "http://here/v1" not in str(complete(given))
    with pytest.raises(InvalidArgs, match=r"^config\.api_base: "):
        lm_options.changed(complete(given), {**given, "api_base": "http://own/v1"})


@pytest.mark.parametrize("model", ["oobabooga/http://there", "openai/https://there/v1", "http://there"])
def test_a_models_name_is_no_address(model: str) -> None:
    """With some routes it would lead past the peer's server."""
    for given in (model, {"model": model, "api_base": "http://own/v1"}):
        with pytest.raises(InvalidArgs, match=r"^lm\.model: it has an address"):
            lm_options.complete(given, "lm", PEERS)


@pytest.mark.parametrize("name", ["api_base", "base_url", "custom_llm_provider", "model_type", "api_key"])
@pytest.mark.parametrize("wrong", [5, [], {"a": 1}, True, ""])
def test_an_option_of_the_server_of_a_wrong_type_takes_no_key(name: str, wrong: object) -> None:
    """DSPy refuses it, or the provider."""
    options = complete({"model": "anthropic/small", "api_base": "http://there/v1", name: wrong})
    assert "sk-peer" not in str(options)
    routes.account(options)
    routes.limited_account(options)


@pytest.mark.parametrize(
    ("variable", "options", "wanted"),
    [
        ("OPENAI_BASE_URL", {"model": "openai/m"}, "http://here/v1"),
        ("OPENAI_API_BASE", {"model": "openai/m", "api_base": "http://there/v1"}, "http://there/v1"),
        ("GROQ_API_BASE", {"model": "groq/m"}, "http://here/v1"),
        # There it is the server's, as LiteLLM takes it, without the version of its API.
        ("ANTHROPIC_BASE_URL", {"model": "anthropic/m"}, "http://here/v1"),
        ("OLLAMA_API_BASE", {"model": "ollama/m"}, "http://here/v1"),
        # LiteLLM reads it itself.
        ("MISTRAL_API_BASE", {"model": "mistral/m"}, None),
        ("OPENAI_BASE_URL", {"model": "openai/m", "headers": {"X-Team": "blue"}}, None),
        ("OPENAI_BASE_URL", {"model": "openai/m", "engine": "litellm"}, None),
    ],
)
def test_an_address_in_the_environment_is_the_api_base_of_dspys_own_engine(
    monkeypatch: pytest.MonkeyPatch, variable: str, options: dict[str, Any], wanted: str | None
) -> None:
    address = "http://here" if variable.startswith(("ANTHROPIC", "OLLAMA")) else "http://here/v1/"
    monkeypatch.setenv(variable, address)
    given = lm_options.complete(options, "lm", of_settings=True)
    of_dspy = lm_options.split(given).of_dspy
    assert of_dspy.get("api_base") == wanted
    assert (of_dspy.get("engine") == "lm15") == (wanted is not None)
