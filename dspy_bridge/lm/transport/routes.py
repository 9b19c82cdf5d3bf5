"""Which provider an LM's name leads to, so that a key goes only to the server that it was given for. Imports DSPy.

DSPy's router is asked: it is a table, which is read without a network. LiteLLM is not asked before it sends: it takes
seconds to import, and for some names it logs in somewhere to find its answer. It is asked when it is about to send.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.lm15 import RouterConfig

from dspy_bridge.errors import LMNotConfigured
from dspy_bridge.lm import dspy_internals, lm_call

# With which an engine only routes.
_NO_ENVIRONMENT = RouterConfig(env={})
# Names that LiteLLM has for parts of a provider.
_PARTS = {"cohere_chat": "cohere", "anthropic_text": "anthropic", "text-completion-openai": "openai"}
# Providers that LiteLLM asks at servers of their own, whatever address is given; of huggingface/ for some of the time.
WITHOUT_ADDRESS = frozenset(
    (
        *("bytez", "chatgpt", "huggingface", "microsoft_365_copilot", "replicate", "sagemaker", "sagemaker_chat"),
        *("sagemaker_nova", "sap", "gigachat", "watsonx", "watsonx_text"),
    )
)
# With USE_LITELLM_PROXY all LMs are asked there, the peer's own, too.
_PROXY = "litellm_proxy"
# LiteLLM asks it with a client of its own, past `litellm_route`.
_UNGUARDED = "aiohttp_openai"


class LMElsewhere(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """LiteLLM would send the key of one provider to another. Not worth a retry."""


@functools.lru_cache(256)
def route(model: str, model_type: str) -> Any:
    """DSPy's routing of a model, of which it makes an engine for each call; the same without a network or a key."""
    return dspy_internals.OFFLINE_ENGINE.value(_NO_ENVIRONMENT, model_type=model_type).resolve(model)


# What DSPy looks up for each LM call is kept: providers take 22 µs of 980, proxies 33.


@dspy_internals.RESOLVE.replace
def _resolve(lm: Any) -> Any:
    anew = getattr(lm, "_providers", ()) or not dspy_internals.OFFLINE_ENGINE.there
    return dspy_internals.RESOLVE.value(lm) if anew else route(lm.model, lm.model_type)


@dspy_internals.OFFLINE_ENGINE.replace
def _engine(config: Any = None, *, model_type: str = "chat") -> Any:
    if config != _NO_ENVIRONMENT:
        return dspy_internals.OFFLINE_ENGINE.value(config, model_type=model_type)
    return SimpleNamespace(resolve=lambda model: route(model, model_type))


@dspy_internals.PROXIES.replace
def _proxies() -> Any:
    return _proxies_at(int(time.monotonic()))


@functools.lru_cache(1)
def _proxies_at(_second: int) -> Any:
    return dspy_internals.PROXIES.value()


@functools.lru_cache(256)
def provider(model: str, *, text: bool = False) -> str | None:
    """Of a model's name, with or without its provider in it; None if DSPy does not know. `text`: for completions."""
    if text:
        return "openai"  # where DSPy asks for text completions, whatever the name is
    if dspy_internals.OFFLINE_ENGINE.there:
        try:
            found: str = route(model, "chat").provider
            # OpenAI's two APIs, for one, are two providers of DSPy's.
            return found.removesuffix("-chat")
        except dspy.lm15.LM15Error:
            pass
    # LiteLLM alone serves it: it takes what precedes the slash.
    head, slash, _ = model.partition("/")
    return _PARTS.get(head, head) if slash else None


@functools.cache
def has_litellm() -> bool:
    """Whether the extra `litellm` is installed."""
    return importlib.util.find_spec("litellm") is not None


def refuse_litellm(lm: Any, settings: dict[str, Any], where: str) -> None:
    """Raise `LMNotConfigured` if a `dspy.LM` needs LiteLLM for these settings of calls, and it is not installed."""
    known = not has_litellm() and dspy_internals.SELECT_BACKEND.there
    why = needs_litellm(lm, settings) if known else None
    if why is not None:
        raise LMNotConfigured(f"{where}: DSPy's own engine does not serve {lm.model}: {why}; {LITELLM}")


# What serves the others.
LITELLM = "LiteLLM is not installed: `mix dspex.setup --with litellm`, or pip install 'dspy-bridge[litellm]'"


def needs_litellm(lm: Any, settings: dict[str, Any]) -> str | None:
    """Why DSPy asks LiteLLM for such calls; None if its own engine serves them."""
    try:
        chosen = dspy_internals.SELECT_BACKEND.value(lm, settings)
        if not chosen.native:
            options = chosen.clients.keys() - {"api_key", "api_base", "base_url", "timeout"}
            return ", ".join(sorted(options)) or "its provider, or an option"
        of_calls = {**lm.kwargs, **settings, "model": lm.model, "messages": [{"role": "user", "content": "?"}]}
        left_out = {*chosen.clients, "cache", "n", "rollout_id"}
        body = {name: value for name, value in of_calls.items() if name not in left_out and value is not None}
        dspy.lm15.request_from_openai_chat(body, compat=chosen.resolution.compat)
    except (dspy.lm15.LM15Error, TypeError, ValueError) as error:
        return str(error)
    return None


def refuse_elsewhere(model: str, custom_provider: str | None = None) -> None:
    """Raise `LMElsewhere` if LiteLLM would take the model to another provider than that of the peer's key."""
    if _UNGUARDED in (model.partition("/")[0], custom_provider):
        raise LMElsewhere(f"LiteLLM follows redirects for {_UNGUARDED}/; name the model openai/…")
    target = lm_call.target()
    if target is None or target.key_of is None:
        return
    ask = importlib.import_module("litellm").get_llm_provider
    try:
        found = str(ask(model)[1])
    except Exception:  # a name that it does not know, and so does not serve
        return
    if found != _PROXY and provider(f"{found}/{model}") != target.key_of:
        raise LMElsewhere(
            f"the peer's key is for {target.key_of}, but LiteLLM asks {found} for {model}; name its provider, as in"
            f' "{target.key_of}/…", or give the LM an api_key'
        )
