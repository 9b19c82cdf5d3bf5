"""Which provider a name leads to: by DSPy's router, and what LiteLLM says of all the names that it knows."""

from __future__ import annotations

import importlib
import os

import pytest
from dspy.clients.engines import LM15Engine
from dspy.lm15 import RouterConfig, UnknownModelError

from dspy_bridge.lm import dspy_internals, lm_call, rate_limits
from dspy_bridge.lm.rate_limits import Limits
from dspy_bridge.lm.transport import routes


def refused(model: str, key_of: str) -> bool:
    target = lm_call.Target("", None, 2.0, False, key_of, rate_limits.lane("", Limits()))
    with lm_call.of(target):
        try:
            routes.refuse_elsewhere(model)
        except routes.LMElsewhere as error:
            assert key_of in str(error) and model in str(error)
            return True
    return False


def test_what_dspy_knows_of_a_model_is_what_it_says_itself() -> None:
    for name in dspy_internals.MODEL_INFO:
        kept = getattr(importlib.import_module(name.module), name.attribute)
        assert kept is not name.value
        for args in (("openai", "gpt-4o-mini"), ("openai", "unheard-of"), ("anthropic", "claude-3-5-haiku-20241022")):
            for namespaces in (None, [], ("azure",), ["openai"]):
                assert kept(*args, namespaces=namespaces) == name.value(*args, namespaces=namespaces)
        assert kept("openai", "unheard-of") is kept("openai", "unheard-of")
        assert kept("openai", "gpt-4o-mini")["max_tokens"] > 0


@pytest.mark.slow
def test_litellm_is_asked_whether_it_would_take_a_key_elsewhere() -> None:
    """Some names mean another server to it than to DSPy; it is asked for them, and for parts of a provider."""
    assert refused("gemini-2.5-flash", "gemini") and refused("azure/mistral-large-latest", "azure")
    assert refused("claude-sonnet-4-5-20250929-v1:0", "anthropic") and refused("gpt-4o", "anthropic")
    for model in ("gemini/gemini-2.5-flash", "gpt-4o", "openai/gpt-4o", "anthropic/claude-2", "cohere/command-r"):
        provider = routes.provider(model)
        assert provider is not None and not refused(model, provider)
    assert not refused("unheard-of/model", "unheard-of")


@pytest.mark.slow
def test_no_name_that_litellm_knows_takes_a_key_elsewhere() -> None:
    """Of thousands of names all go where DSPy's router or their prefix says, or are refused."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
    import litellm

    checked = 0
    # LiteLLM logs in to find the provider of these.
    for name in sorted(name for name in litellm.model_cost if not name.startswith(("github_copilot/", "chatgpt/"))):
        provider = routes.provider(name)
        if provider is None:
            continue
        try:
            found = litellm.get_llm_provider(name)[1]
        except litellm.BadRequestError:
            continue
        same = routes.provider(f"{found}/{name}") == provider
        assert refused(name, provider) != same, (name, provider, found)
        # Whatever else precedes a slash is a size of pictures, or an owner at replicate/.
        assert same or found in ("vertex_ai", "bedrock", "openai", "replicate", "petals"), (name, provider, found)
        checked += same
    assert checked > 2000


def test_routes_are_those_of_dspy() -> None:
    """Also of a model that no provider has."""
    for model, model_type in (("openai/gpt-4o-mini", "chat"), ("openai/o3", "responses"), ("anthropic/claude", "chat")):
        dspys = LM15Engine(RouterConfig(env={}), model_type=model_type).resolve(model)
        assert routes.route(model, model_type) == dspys
    with pytest.raises(UnknownModelError):
        routes.route("nobody/model", "chat")
