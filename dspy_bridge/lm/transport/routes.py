"""Where an LM's options lead: to which provider, server and account, and whether by LiteLLM. Imports DSPy.

A key goes only to the server that it was given for.

DSPy's router is asked: it is a table, which is read without a network. LiteLLM is not asked before it sends: it takes
seconds to import, and for some names it logs in somewhere to find its answer. It is asked when it is about to send.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dspy
from dspy.lm15 import LM15Error, RouterConfig

from dspy_bridge.errors import InvalidArgs, LMNotConfigured, nearest
from dspy_bridge.lm import dspy_internals, lm_call
from dspy_bridge.logs import redaction

# Both mean the same.
ADDRESSES = ("api_base", "base_url")
# Options by which LiteLLM asks another server than the model's name says, at an address that may be the environment's.
_ROUTES = ("custom_llm_provider", "azure", "deployment_id", "use_litellm_proxy")
# The last words of providers' own names for an address.
_OF_ADDRESSES = ("base", "url", "uri", "endpoint", "host")
# Where the environment's address is the server's and not that of its API, as `api_base` is.
_OF_API = dict.fromkeys(("ANTHROPIC", "OLLAMA", "OLLAMA_CHAT"), "/v1")
# With which an engine only routes.
_NO_ENVIRONMENT = RouterConfig(env={})
# The providers of DSPy's own engine, for a name that is misspelt.
OWN = (
    *("openai", "anthropic", "gemini", "groq", "deepseek", "openrouter", "xai", "moonshot", "ollama", "ollama_chat"),
    *("hosted_vllm", "azure"),
)
# Names that LiteLLM has for parts of a provider.
_PARTS = {"cohere_chat": "cohere", "anthropic_text": "anthropic", "text-completion-openai": "openai"}
# Providers that LiteLLM asks at servers of their own, whatever address is given; of huggingface/ for some of the time.
_WITHOUT_ADDRESS = frozenset(
    (
        *("bytez", "chatgpt", "huggingface", "microsoft_365_copilot", "replicate", "sagemaker", "sagemaker_chat"),
        *("sagemaker_nova", "sap", "gigachat", "watsonx", "watsonx_text"),
    )
)
# With USE_LITELLM_PROXY all LMs are asked there, the peer's own, too.
_PROXY = "litellm_proxy"
# LiteLLM asks it with a client of its own, past `litellm_route`.
_UNGUARDED = "aiohttp_openai"
# What serves what DSPy's own engine does not.
LITELLM = "LiteLLM is not installed: `mix dspex.setup --with litellm`, or pip install 'dspy-bridge[litellm]'"


class LMElsewhere(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """LiteLLM would send the key of one provider to another. Not worth a retry."""


@functools.lru_cache(256)
def route(model: str, model_type: str) -> Any:
    """DSPy's routing of a model, of which it makes an engine for each call; the same without a network or a key."""
    return dspy_internals.OFFLINE_ENGINE.value(_NO_ENVIRONMENT, model_type=model_type).resolve(model)


# What DSPy looks up for each LM call is kept. For a model that is not in its list it reads the whole list, three times:
# 560 of the 1,390 µs of a run. Providers take some 60 of the rest.


@dspy_internals.RESOLVE.replace
def _resolve(lm: Any) -> Any:
    anew = getattr(lm, "_providers", ()) or not dspy_internals.OFFLINE_ENGINE.there
    return dspy_internals.RESOLVE.value(lm) if anew else route(lm.model, lm.model_type)


@dspy_internals.OFFLINE_ENGINE.replace
def _engine(config: Any = None, *, model_type: str = "chat") -> Any:
    if config != _NO_ENVIRONMENT:
        return dspy_internals.OFFLINE_ENGINE.value(config, model_type=model_type)
    return SimpleNamespace(resolve=lambda model: route(model, model_type))


def _kept(look_up: dspy_internals.Name) -> Callable[..., Any]:
    @functools.lru_cache(256)
    def kept(provider: Any, model: Any, namespaces: tuple[Any, ...] | None) -> Any:
        return look_up.value(provider, model, namespaces=namespaces)

    def info(provider: Any, model: Any, *, namespaces: Any = None) -> Any:
        return kept(provider, model, None if namespaces is None else tuple(namespaces))

    return info


for _name in dspy_internals.MODEL_INFO:
    _name.replace(_kept(_name))


@functools.lru_cache(256)
def provider(model: str, *, text: bool = False) -> str | None:
    """Which provider DSPy or LiteLLM asks; None if that cannot be known. `text`: for completions."""
    if text:
        return "openai"  # where DSPy asks for text completions, whatever the name is
    if dspy_internals.OFFLINE_ENGINE.there:
        try:
            found: str = route(model, "chat").provider
            # OpenAI's two APIs, for one, are two providers of DSPy's.
            return found.removesuffix("-chat")
        except LM15Error:
            pass
    # LiteLLM alone serves it: it takes what precedes the slash.
    head, slash, _ = model.partition("/")
    return _PARTS.get(head, head) if slash else None


def provider_of(options: dict[str, Any]) -> str | None:
    return provider(options["model"], text=options.get("model_type") == "text")


def have_one_provider(options: dict[str, Any], default: dict[str, Any]) -> bool:
    """Whether both LMs are asked at one provider, apart from what `places` finds."""
    own = provider_of(options)
    if own is None:
        return options["model"] == default["model"] or "custom_llm_provider" in default
    return own == provider_of(default)


def places(options: dict[str, Any]) -> dict[str, Any]:
    """What says where requests go; among `extra`, known by what providers' names for it have in common."""
    found = {}
    for name, value in {**options, **options.get("extra", {})}.items():
        if name in ADDRESSES:
            found[ADDRESSES[0]] = value.rstrip("/") if isinstance(value, str) else value
        elif name in _ROUTES or name.lower().rpartition("_")[2] in _OF_ADDRESSES:
            found[name] = value
    return found


def refuse_ignored_address(options: dict[str, Any], where: str) -> None:
    """Raises `InvalidArgs` if the LM would be asked past its `api_base`, or the peer's by its name."""
    if "http://" in options["model"] or "https://" in options["model"]:
        raise InvalidArgs(f"{where}.model: it has an address; expected the name alone, and the address as api_base")
    given = places(options)
    name = str(given.get("custom_llm_provider") or provider_of(options))
    if ADDRESSES[0] in given and name in _WITHOUT_ADDRESS:
        text = f"LiteLLM asks other servers for {name}/ models; name a model of a server with OpenAI's API openai/…"
        raise InvalidArgs(f"{where}.api_base: {text}")


def of_environment(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `dspy.LM` for an address in the environment, at which DSPy's own engine can ask. DSPy would take
    LiteLLM for it, even with an `api_base`."""
    prefix, given = model.partition("/")[0].upper(), places(options)
    address = _address(prefix)
    if address is None or "engine" in options or not given.keys() <= {ADDRESSES[0]}:
        return {}
    suffix = _OF_API.get(prefix, "")
    chosen = {"engine": "lm15", **({} if given else {"api_base": address.removesuffix(suffix) + suffix})}
    try:
        served = _needs_litellm(dspy.LM(model, **{**options, **chosen}), {}) is None
    except (TypeError, ValueError, dspy.LMError):
        return {}
    return chosen if served else {}


def _address(prefix: str) -> str | None:
    address = os.environ.get(f"{prefix}_BASE_URL") or os.environ.get(f"{prefix}_API_BASE")
    return address.rstrip("/") if address else None


def account(options: dict[str, Any]) -> str:
    """The server and the key as the cache tells them apart: by other headers, too, such as that of a tenant."""
    return repr([limited_account(options), options.get("headers"), options.get("extra_headers")])


def limited_account(options: dict[str, Any]) -> str:
    """The server and the key as limits tell them apart: those of the environment where none are given."""
    options = {**options, "model": str(options.get("model", ""))}
    # That of the model, for an LM of your application's that no provider has.
    name = options.get("custom_llm_provider") or provider_of(options) or options["model"]
    prefix, given = str(name).upper(), places(options)
    if (address := _address(prefix)) and ADDRESSES[0] not in given:
        given[ADDRESSES[0]] = address
    keys = [options.get("api_key") or os.environ.get(f"{prefix}_API_KEY"), options.get("azure_ad_token")]
    for headers in (options.get("headers"), options.get("extra_headers")):
        if isinstance(headers, dict):
            keys += [headers[name] for name in sorted(headers) if redaction.names_secret(name)]
    return repr([sorted(given.items()) or prefix, keys])


@functools.cache
def has_litellm() -> bool:
    """Whether the extra `litellm` is installed."""
    return importlib.util.find_spec("litellm") is not None


def refuse_litellm(lm: Any, settings: dict[str, Any], where: str) -> None:
    """Raise `LMNotConfigured` if a `dspy.LM` needs LiteLLM for these settings of calls, and it is not installed.

    Then DSPy's own engine judges the settings: `InvalidArgs`.
    """
    if has_litellm() or not dspy_internals.SELECT_BACKEND.there:
        return
    try:
        why = _needs_litellm(lm, settings)
    except (TypeError, ValueError) as error:
        raise InvalidArgs(f"{where}: {error}") from None
    if why is not None:
        raise LMNotConfigured(f"{where}: {why}; {LITELLM}")


def _needs_litellm(lm: Any, settings: dict[str, Any]) -> str | None:
    """Why DSPy asks LiteLLM for such calls; None if its own engine serves them."""
    unserved = f"DSPy's own engine does not serve {lm.model}"
    try:
        chosen = dspy_internals.SELECT_BACKEND.value(lm, settings)
        if not chosen.native:
            options = chosen.clients.keys() - {"api_key", "api_base", "base_url", "timeout"}
            head, slash, _ = lm.model.partition("/")
            if not options and slash and head not in OWN:
                near = nearest(head, OWN)
                meant = f" (did you mean {near}?)" if near else ""
                return f"{lm.model}: {head} is not one of DSPy's own providers{meant}"
            return f"{unserved}: {', '.join(sorted(options)) or 'its provider, or an option'}"
        of_calls = {**lm.kwargs, **settings, "model": lm.model, "messages": [{"role": "user", "content": "?"}]}
        left_out = {*chosen.clients, "cache", "n", "rollout_id"}
        body = {name: value for name, value in of_calls.items() if name not in left_out and value is not None}
        dspy.lm15.request_from_openai_chat(body, compat=chosen.resolution.compat)
    except LM15Error as error:
        option = next((name for name in {**lm.kwargs, **settings} if f"'{name}'" in str(error)), str(error))
        return f"{unserved}: {option}"
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
