"""Which server the options of an LM lead to, and with which key: for what it inherits, for the limits and the cache."""

from __future__ import annotations

import os
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm.transport import routes
from dspy_bridge.logs import redaction

# Both mean the same.
ADDRESSES = ("api_base", "base_url")
# Options by which LiteLLM asks another server than the model's name says, at an address that may be the environment's.
_ROUTES = ("custom_llm_provider", "azure", "deployment_id", "use_litellm_proxy")
# The last words of providers' own names for an address.
_OF_ADDRESSES = ("base", "url", "uri", "endpoint", "host")


def provider(options: dict[str, Any]) -> str | None:
    """Which provider DSPy or LiteLLM asks; None if that cannot be known."""
    return routes.provider(options["model"], text=options.get("model_type") == "text")


def have_one_provider(options: dict[str, Any], default: dict[str, Any]) -> bool:
    """Whether both LMs are asked at one provider, apart from what `places` finds."""
    own = provider(options)
    if own is None:
        return options["model"] == default["model"] or "custom_llm_provider" in default
    return own == provider(default)


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
    if ADDRESSES[0] not in given:
        return
    name = str(given.get("custom_llm_provider") or provider(options))
    if name in routes.WITHOUT_ADDRESS:
        text = f"LiteLLM asks other servers for {name}/ models; name a model of a server with OpenAI's API openai/…"
        raise InvalidArgs(f"{where}.api_base: {text}")


# Where the environment's address is the server's and not that of its API, as `api_base` is.
_OF_API = dict.fromkeys(("ANTHROPIC", "OLLAMA", "OLLAMA_CHAT"), "/v1")


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
        served = routes.needs_litellm(dspy.LM(model, **{**options, **chosen}), {}) is None
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
    name = options.get("custom_llm_provider") or provider(options) or options["model"]
    prefix, given = str(name).upper(), places(options)
    if (address := _address(prefix)) and ADDRESSES[0] not in given:
        given[ADDRESSES[0]] = address
    keys = [options.get("api_key") or os.environ.get(f"{prefix}_API_KEY"), options.get("azure_ad_token")]
    for headers in (options.get("headers"), options.get("extra_headers")):
        if isinstance(headers, dict):
            keys += [headers[name] for name in sorted(headers) if redaction.names_secret(name)]
    return repr([sorted(given.items()) or prefix, keys])
