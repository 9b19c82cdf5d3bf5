"""The options of an LM, from settings, from a request's `lm` or `config`, or from a saved state: checked and completed.

What a request leaves out comes from the peer's own LM, if it names a model of the same provider: the address, and what
belongs to it (key, headers, timeouts). A request that names an address itself gets none of it. Imports DSPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dspy_bridge.errors import InvalidArgs, nearest
from dspy_bridge.lm.rate_limits import Limits
from dspy_bridge.lm.transport import routes
from dspy_bridge.logs import redaction

CONNECT_TIMEOUT = 2.0
# The key for another address than the peer's that came without one: DSPy would send it the environment's.
NO_KEY = "none"
# Which provider an inherited key is for, among complete options.
_KEY_OF = "key_of"
# What `supports` may name.
CAPABILITIES = ("response_schema", "function_calling", "reasoning")
# What belongs to a server, and is inherited with its address.
OF_SERVER = (
    *("api_key", "timeout", "connect_timeout", "headers", "extra_headers", "extra_query", "api_version"),
    *("organization", "project", "custom_llm_provider", "azure_ad_token", "extra"),
    *Limits._fields,
)
# Settings of single calls, which `config` may have, too.
_OF_CALLS = (
    *("temperature", "max_tokens", "max_completion_tokens", "top_p", "top_k", "min_p", "n", "stop", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs"),
    *("response_format", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("reasoning_effort", "reasoning", "thinking", "verbosity", "modalities", "audio", "prediction", "user"),
    *("metadata", "store", "service_tier", "web_search_options", "extra_body", "cache", "rollout_id", "extra"),
)
_OF_LMS = (
    *("model", "model_type", "num_retries", "use_developer_role", "finetuning_model", "engine"),
    *("inherit", "answers", "supports"),
)
# Options of `dspy.LM` that are Python objects, which JSON cannot give.
_OBJECTS = frozenset(
    (
        *("async_engine", "callbacks", "launch_kwargs", "prompt_cache", "provider", "train_kwargs"),
        "azure_ad_token_provider",
    )
)
# With these LiteLLM asks other models and servers, with the key of the first one.
_OTHER_LMS = frozenset(("fallbacks", "context_window_fallback_dict", "model_list", "litellm_params"))
# Arguments of a call, which DSPy gives.
_OWN = frozenset(("messages", "prompt", "request"))
_NAMES = frozenset((*routes.ADDRESSES, *OF_SERVER, *_OF_CALLS, *_OF_LMS))
# `metering/endings` takes the last one before a `config` comes here.
_CONFIG_NAMES = frozenset((*routes.ADDRESSES, *OF_SERVER, *_OF_CALLS, "allow_truncated"))
# OpenAI's limit of `n`. Without LiteLLM DSPy sends a request for each.
_MOST_ANSWERS = 128
# The plausible range of numbers; anything else is a mistake. JSON also has ones that no float can hold.
_LEAST, _MOST = 1e-6, 1e15


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and _LEAST <= value <= _MOST


def _is_cache(value: Any) -> bool:
    if isinstance(value, dict) and value.keys() == {"scope"}:
        return isinstance(value["scope"], str) and value["scope"] != ""
    return isinstance(value, bool)


def _is_supports(value: Any) -> bool:
    named = isinstance(value, list) and value != [] and all(name in CAPABILITIES for name in value)
    return named or value in ("none", ["none"])


# Which values an option may have, and how errors say it. Of the others DSPy or the provider judges.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "inherit": (lambda value: isinstance(value, bool), "true or false"),
    "connect_timeout": (_is_positive, "a positive number of seconds"),
    "max_in_flight": (lambda value: type(value) is int and value >= 1, "a whole number, at least 1"),
    "requests_per_minute": (_is_positive, "a positive number"),
    "tokens_per_minute": (_is_positive, "a positive number"),
    "cache": (_is_cache, 'true, false or {"scope": text}'),
    "supports": (_is_supports, f'["none"], or a list of {", ".join(CAPABILITIES)}'),
    "extra": (lambda value: isinstance(value, dict), "an object of what the provider takes beyond DSPy's own settings"),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        (lambda value: type(value) in (int, float), "a number"),
    ),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "top_k", "seed", "top_logprobs"),
        (lambda value: type(value) is int, "a whole number"),
    ),
    "n": (
        lambda value: type(value) is int and 1 <= value <= _MOST_ANSWERS,
        f"a whole number from 1 to {_MOST_ANSWERS}",
    ),
}


class LMOptions(NamedTuple):
    """`of_dspy`: keyword arguments of `dspy.LM`; the others are the bridge's own. Times in seconds.

    `supports`: of `CAPABILITIES`; None: what DSPy knows of the model. `key_of`: as of `lm_call.Target`.
    """

    model: str
    of_dspy: dict[str, Any]
    cache_scope: str | None
    connect_timeout: float
    limits: Limits
    supports: frozenset[str] | None
    key_of: str | None


def complete(
    given: object, where: str, default: dict[str, Any] | None = None, *, of_settings: bool = False
) -> dict[str, Any]:
    """An `lm` of a request or of settings as an object with all options, from those of the peer's LM where it may.

    `given`: a model's name, or an object with `model`; `default`: the complete options of the peer's LM, for a request;
    `of_settings`: the peer's own LM, whose address may have the environment's key. Raises `InvalidArgs`; `where` is
    how its text names `given`.
    """
    options = {"model": given} if isinstance(given, str) else given
    if not isinstance(options, dict):
        raise InvalidArgs(f'{where}: expected text such as "openai/gpt-4o-mini", or an object with model')
    _check(options, _NAMES, where)
    model = options.get("model")
    # LiteLLM searches in longer ones for seconds.
    if not isinstance(model, str) or not 0 < len(model) <= 1000:
        raise InvalidArgs(f'{where}.model: expected text such as "openai/gpt-4o-mini", of at most 1000 characters')
    inherit = options.get("inherit")
    options = {name: value for name, value in options.items() if name != "inherit" and value is not None}
    routes.refuse_ignored_address(options, where)
    if of_settings:
        return options
    places = routes.places(options)
    if places:
        if places.keys() != {"custom_llm_provider"}:
            options.setdefault("api_key", NO_KEY)
        return options
    if default is None or inherit is False or not routes.have_one_provider(options, default):
        return options
    return {**_inherited(options, default), **options}


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Complete options with what a `config` says of the connection or the cache. Raises `InvalidArgs`."""
    own = (*routes.ADDRESSES, *OF_SERVER, _KEY_OF)
    kept = {name: value for name, value in options.items() if name not in own}
    return complete({**kept, **changes}, "config", options)


def split(options: dict[str, Any]) -> LMOptions:
    """Complete options as `LMOptions`."""
    of_dspy = dict(options)
    timeout = float(of_dspy.pop("connect_timeout", CONNECT_TIMEOUT))
    scope = None
    if isinstance(of_dspy.get("cache"), dict):
        of_dspy["cache"], scope = True, of_dspy["cache"]["scope"]
    supports = None
    if "supports" in of_dspy:
        supports = frozenset(CAPABILITIES).intersection(of_dspy.pop("supports"))
    of_dspy.update(of_dspy.pop("extra", {}))
    limits = Limits(*(of_dspy.pop(name, None) for name in Limits._fields))
    key_of = of_dspy.pop(_KEY_OF, None)
    model = of_dspy.pop("model")
    of_dspy.update(routes.of_environment(model, of_dspy))
    return LMOptions(model, of_dspy, scope, timeout, limits, supports, key_of)


def read_config(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A `config` as settings of a call for DSPy, and options that only an LM of its own can have. Raises `InvalidArgs`.

    Those are of the connection, and of the cache.
    """
    _check(given, _CONFIG_NAMES, "config")
    elsewhere = given.get("extra") and routes.places({"extra": given["extra"]})
    of_lm = {
        name: given[name]
        for name in given
        if name in routes.ADDRESSES or (name in OF_SERVER and (name != "extra" or elsewhere))
    }
    settings = {name: value for name, value in given.items() if name not in of_lm}
    if isinstance(settings.get("cache"), dict):
        of_lm["cache"] = settings.pop("cache")
    settings.update(settings.pop("extra", None) or {})
    return settings, of_lm


def _check(given: dict[str, Any], known: frozenset[str], where: str) -> None:
    """Raises `InvalidArgs` for a name that is not an option of an LM, with the nearest one, and for a wrong value."""
    for name, value in given.items():
        if name in _OBJECTS:
            raise InvalidArgs(f"{where}.{name}: cannot be given as JSON")
        if name not in known:
            near = nearest(name, sorted(known))
            hint = f"did you mean {near}?" if near else "what only your provider takes goes under extra"
            raise InvalidArgs(f"{where}.{name}: unknown option; {hint}")
        if value is not None and name in _EXPECTED:
            fits, expected = _EXPECTED[name]
            if not fits(value):
                raise InvalidArgs(f"{where}.{name}: expected {expected}")
    for name in given.get("extra") or {}:
        if name in _NAMES or name in _OBJECTS or name in _OWN or name in _OTHER_LMS:
            raise InvalidArgs(f"{where}.extra.{name}: not one of the provider's own options")


def _inherited(options: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    names = [*routes.ADDRESSES, *OF_SERVER]
    if options["model"] == default["model"]:
        # Another model of the server may do other things, and LiteLLM may ask another provider for it.
        names += ["supports", _KEY_OF]
    inherited = {name: default[name] for name in names if name in default}
    if options["model"] != default["model"] and not routes.places(default) and options.get("model_type") != "text":
        inherited[_KEY_OF] = routes.provider_of(options)
    if "api_key" in options:
        # Headers may hold a key, too, of another account then.
        for name in ("headers", "extra_headers"):
            if isinstance(given := inherited.get(name), dict):
                inherited[name] = {key: value for key, value in given.items() if not redaction.names_secret(key)}
    if "extra" in inherited and "extra" in options:
        options["extra"] = {**inherited["extra"], **options["extra"]}
    return inherited
