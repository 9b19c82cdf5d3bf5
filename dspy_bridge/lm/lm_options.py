"""The options of an LM, from settings, from a request's `lm` or `config`, or from a saved state: checked and completed.

What a request leaves out comes from the peer's own LM, if it names a model of the same provider: the address, and what
belongs to it (key, headers, timeouts). A request that names an address itself gets none of it. Imports DSPy.
"""

from __future__ import annotations

from collections.abc import Iterable
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
_OF_SERVER = (
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
# Those that are numbers, and whole ones. A wrong type reaches the provider, if LiteLLM is there.
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_WHOLE = ("max_tokens", "max_completion_tokens", "top_k", "n", "seed", "top_logprobs")
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
_NAMES = frozenset((*routes.ADDRESSES, *_OF_SERVER, *_OF_CALLS, *_OF_LMS))
# `metering/endings` takes the last one before a `config` comes here.
_CONFIG_NAMES = frozenset((*routes.ADDRESSES, *_OF_SERVER, *_OF_CALLS, "allow_truncated"))


# The plausible range of numbers; anything else is a mistake.
_LEAST, _MOST = 1e-6, 1e15


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
    refuse_unknown(options, _NAMES, where)
    model = options.get("model")
    # LiteLLM searches in longer ones for seconds.
    if not isinstance(model, str) or not 0 < len(model) <= 1000:
        raise InvalidArgs(f'{where}.model: expected text such as "openai/gpt-4o-mini", of at most 1000 characters')
    inherit = options.get("inherit", True)
    if not isinstance(inherit, bool):
        raise InvalidArgs(f"{where}.inherit: expected true or false")
    options = {name: value for name, value in options.items() if name != "inherit" and value is not None}
    split(options, where)
    routes.refuse_ignored_address(options, where)
    if of_settings:
        return options
    places = routes.places(options)
    if places:
        if places.keys() != {"custom_llm_provider"}:
            options.setdefault("api_key", NO_KEY)
        return options
    if default is None or not inherit or not routes.have_one_provider(options, default):
        return options
    return {**_inherited(options, default), **options}


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Complete options with what a `config` says of the connection or the cache. Raises `InvalidArgs`."""
    own = (*routes.ADDRESSES, *_OF_SERVER, _KEY_OF)
    kept = {name: value for name, value in options.items() if name not in own}
    return complete({**kept, **changes}, "config", options)


def split(options: dict[str, Any], where: str) -> LMOptions:
    """Complete options as `LMOptions`. Raises `InvalidArgs`."""
    of_dspy = dict(options)
    _refuse_wrong_numbers(of_dspy, where)
    timeout = of_dspy.pop("connect_timeout", CONNECT_TIMEOUT)
    if not _is_positive(timeout):
        raise InvalidArgs(f"{where}.connect_timeout: expected a positive number of seconds")
    if "cache" in of_dspy:
        of_dspy["cache"], scope = _cache(of_dspy["cache"], where)
    else:
        scope = None
    supports = _supports(of_dspy.pop("supports"), where) if "supports" in of_dspy else None
    of_dspy.update(_extra(of_dspy.pop("extra", None), where))
    limits = _limits({name: of_dspy.pop(name, None) for name in Limits._fields}, where)
    key_of = of_dspy.pop(_KEY_OF, None)
    model = of_dspy.pop("model")
    of_dspy.update(routes.of_environment(model, of_dspy))
    return LMOptions(model, of_dspy, scope, float(timeout), limits, supports, key_of)


def read_config(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A `config` as settings of a call for DSPy, and options that only an LM of its own can have. Raises `InvalidArgs`.

    Those are of the connection, and of the cache.
    """
    refuse_unknown(given, _CONFIG_NAMES, "config")
    _refuse_wrong_numbers(given, "config")
    elsewhere = isinstance(given.get("extra"), dict) and routes.places({"extra": given["extra"]})
    of_lm = {
        name: given[name]
        for name in given
        if name in routes.ADDRESSES or (name in _OF_SERVER and (name != "extra" or elsewhere))
    }
    settings = {name: value for name, value in given.items() if name not in of_lm}
    if isinstance(settings.get("cache"), dict):
        of_lm["cache"] = settings.pop("cache")
    settings.update(_extra(settings.pop("extra", None), "config"))
    return settings, of_lm


def refuse_unknown(given: Iterable[str], known: frozenset[str], where: str) -> None:
    """Raises `InvalidArgs` for a name that is not an option of an LM, with the nearest one."""
    for name in given:
        if name in _OBJECTS:
            raise InvalidArgs(f"{where}.{name}: cannot be given as JSON")
        if name not in known:
            near = nearest(name, sorted(known))
            hint = f"did you mean {near}?" if near else "what only your provider takes goes under extra"
            raise InvalidArgs(f"{where}.{name}: unknown option; {hint}")


def _refuse_wrong_numbers(options: dict[str, Any], where: str) -> None:
    for names, kinds, expected in ((_NUMBERS, (int, float), "a number"), (_WHOLE, (int,), "a whole number")):
        for name in names:
            if options.get(name) is not None and type(options[name]) not in kinds:
                raise InvalidArgs(f"{where}.{name}: expected {expected}")


def _inherited(options: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    names = [*routes.ADDRESSES, *_OF_SERVER]
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


def _cache(given: object, where: str) -> tuple[bool, str | None]:
    if isinstance(given, bool):
        return given, None
    if isinstance(given, dict) and given.keys() == {"scope"} and isinstance(given["scope"], str) and given["scope"]:
        return True, given["scope"]
    raise InvalidArgs(f'{where}.cache: expected true, false or {{"scope": text}}')


def _is_positive(value: Any) -> bool:
    """Whether it is a number to reckon with: JSON also has ones that no float can hold, or no quotient of it."""
    return type(value) in (int, float) and _LEAST <= value <= _MOST


def _limits(given: dict[str, Any], where: str) -> Limits:
    for name, value in given.items():
        if value is None:
            continue
        if name == "max_in_flight":
            if type(value) is not int or value < 1:
                raise InvalidArgs(f"{where}.{name}: expected a whole number, at least 1")
        elif not _is_positive(value):
            raise InvalidArgs(f"{where}.{name}: expected a positive number")
    return Limits(**given)


def _supports(given: object, where: str) -> frozenset[str]:
    if given in ("none", ["none"]):
        return frozenset()
    if not isinstance(given, list) or not given or any(name not in CAPABILITIES for name in given):
        raise InvalidArgs(f'{where}.supports: expected ["none"], or a list of {", ".join(CAPABILITIES)}')
    return frozenset(given)


def _extra(given: object, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidArgs(f"{where}.extra: expected an object of what the provider takes beyond DSPy's own settings")
    for name in given:
        if name in _NAMES or name in _OBJECTS or name in _OWN or name in _OTHER_LMS:
            raise InvalidArgs(f"{where}.extra.{name}: not one of the provider's own options")
    return given
