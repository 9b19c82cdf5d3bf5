"""Whether the default LM has its key, and its server can be reached: a script that `mix dspex.doctor` runs.

Prints `DSPEX` and an object with facts, no key among them. Makes no request, but with the argument `--ask`
(`lm/probe`). DSPy's own engine looks up the key of a provider that it serves by rules of its own; LiteLLM serves the
others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    """Look at the LM that the environment names, with an empty variable counting as unset."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
    for name in [name for name, value in os.environ.items() if not value]:
        del os.environ[name]
    options = json.loads(os.environ.get("DSPY_BRIDGE_LM_OPTIONS") or "{}")
    facts = check({**options, "model": os.environ["DSPY_BRIDGE_LM"]}, asking="--ask" in sys.argv)
    print("\nDSPEX " + json.dumps(facts))  # noqa: T201


def check(given: dict[str, Any], *, asking: bool = False) -> dict[str, Any]:
    """The facts.

    Alone: `refused`, why the LM or its options are not taken; `lacking`, that they need LiteLLM, which is not
    installed; `asked`, with `asking`, the answer of `probe.ask`.
    `unreachable`: why its `api_base` cannot be connected to, or None. `engine`: `dspy` or `litellm`. `known`: whether
    it knows the provider. `key`: whether a key is needed. `lacks`: the variables that are missing; `needs` and `set`:
    those that an empty environment lacks, and those of them that are set; `why`: DSPy's reason for `lacks`.
    """
    import dspy
    from dspy.clients.backend_selection import select_backend

    from dspy_bridge.errors import InvalidArgs, LMNotConfigured
    from dspy_bridge.lm import lm_options
    from dspy_bridge.lm.transport import routes

    variables = set(os.environ)
    try:
        split = lm_options.split(lm_options.complete(given, "lm_options", of_settings=True))
        model, options = split.model, split.of_dspy
        if asking:
            from dspy_bridge.lm import probe

            return {"asked": probe.ask(model, options, split.supports)}
        lm = dspy.LM(model, **options)
        routes.refuse_litellm(lm, {}, "lm_options")
        chosen = select_backend(lm)
    except LMNotConfigured as error:
        return {"lacking": str(error)}
    except InvalidArgs as error:
        return {"refused": str(error)}
    except (TypeError, ValueError, dspy.LMError) as error:
        return {"refused": f"{type(error).__name__}: {_first_line(error)}"}
    facts: dict[str, Any] = {"engine": "dspy", "known": True, "key": True, "needs": [], "lacks": [], "why": None}
    facts.update(_native(chosen) if chosen.native else _litellm(model, options))
    facts["unreachable"] = _unreachable(options.get("api_base") or options.get("base_url"), split.connect_timeout)
    return {**facts, "set": [name for name in facts["needs"] if name in variables]}


def _native(chosen: Any) -> dict[str, Any]:
    from dspy import lm15

    provider, clients = chosen.resolution.provider, chosen.clients
    url = clients.get("api_base") or clients.get("base_url")

    def missing(env: dict[str, str] | None, keys: dict[str, str] | None) -> Any:
        config = lm15.RouterConfig(env=env, api_keys=keys, base_urls={provider: url} if url else None)
        try:
            lm15.LMRouter(config).lm(f"{provider}:{chosen.resolution.model}")
        except lm15.NotConfiguredError as error:
            return error
        return None

    alone = missing({}, None)
    error = missing(None, {provider: clients["api_key"]} if "api_key" in clients else None)
    facts = {"key": alone is not None, "needs": list(alone.env_keys) if alone else []}
    return {**facts, "lacks": list(error.env_keys), "why": _first_line(error)} if error else facts


def _litellm(model: str, options: dict[str, Any]) -> dict[str, Any]:
    import litellm

    litellm.suppress_debug_info = True
    address = options.get("api_base") or options.get("base_url")
    try:
        litellm.get_llm_provider(model, custom_llm_provider=options.get("custom_llm_provider"), api_base=address)
    except Exception:
        return {"engine": "litellm", "known": False}
    missing = litellm.validate_environment(model, options.get("api_key"), address)["missing_keys"]
    given = tuple(f"_{name.upper()}" for name, value in options.items() if value)
    os.environ.clear()
    needs = litellm.validate_environment(model)["missing_keys"]
    return {"engine": "litellm", "needs": needs, "lacks": [name for name in missing if not name.endswith(given)]}


def _unreachable(address: object, seconds: float) -> str | None:
    if not isinstance(address, str):
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        return "its api_base is not an address such as http://127.0.0.1:8080/v1"
    if host is None or (parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)):
        return None
    try:
        socket.create_connection((host, port), seconds).close()
    except OSError as error:
        return f"{host}:{port} cannot be reached within {seconds:g} s: {error.strerror or error}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


if __name__ == "__main__":
    # This folder has modules with common names, and the working directory may have anything.
    sys.path[:] = [str(Path(__file__).resolve().parents[1]), *(folder for folder in sys.path[1:] if folder)]
    main()
