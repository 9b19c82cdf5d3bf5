"""DSPy itself, and LMs and adapters from settings or arguments. Imported off the reading path, as it imports DSPy."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections import OrderedDict
from typing import Any

# A price list that the first LM call would fetch from the network (up to 32 MB); the packaged one will do.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy

from dspy_bridge import echo, logs, redaction
from dspy_bridge.errors import BridgeError, InvalidArgs, LMFailed, LMNotConfigured, OutputInvalid, SetupFailed
from dspy_bridge.settings import ADAPTERS, Settings

# Each LM has a pool of connections, so equal options share one LM; the least recently used goes first.
MAX_LMS = 64
# Options of dspy.LM that are Python objects, which JSON cannot give.
_OBJECT_OPTIONS = ("async_engine", "callbacks", "launch_kwargs", "prompt_cache", "provider", "train_kwargs")
_ADAPTERS = dict(zip(ADAPTERS, (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter), strict=True))


class Models:
    """The LMs and adapters of this peer. Made once, on the thread that may configure DSPy from then on."""

    def __init__(self, settings: Settings) -> None:
        """Configure DSPy and call the host's `init`. Raises `SetupFailed`."""
        self._lms: OrderedDict[str, dspy.BaseLM] = OrderedDict()
        self._lock = threading.Lock()
        logs.adopt("dspy")
        redaction.learn_environment()
        self._configure(settings)
        if settings.init is not None:
            _call_init(settings.init)

    def _configure(self, settings: Settings) -> None:
        dspy.configure_cache(
            enable_disk_cache=settings.disk_cache is not None,
            disk_cache_dir=settings.disk_cache,
            enable_memory_cache=settings.cache_entries > 0,
            memory_max_entries=max(1, settings.cache_entries),
            # What lies in a folder is data: DSPy's default would run any pickle found there.
            restrict_pickle=True,
        )
        # History and trace keep thousands of prompts; the type warnings quote inputs in the log.
        dspy.configure(disable_history=True, max_history_size=0, trace=None, warn_on_type_mismatch=False)
        if settings.adapter is not None:
            dspy.configure(adapter=_ADAPTERS[settings.adapter]())
        if settings.lm is not None:
            try:
                dspy.configure(lm=self.lm({**settings.lm_options, "model": settings.lm}))
            except InvalidArgs as error:
                raise SetupFailed(f"DSPY_BRIDGE_LM, DSPY_BRIDGE_LM_OPTIONS: {error}") from None

    def lm(self, options: dict[str, Any]) -> dspy.BaseLM:
        """The LM for `{"model": …, …keyword arguments of dspy.LM}`. Raises `InvalidArgs`."""
        key = json.dumps(options, sort_keys=True)
        with self._lock:
            lm = self._lms.get(key)
            if lm is None:
                redaction.learn(options)
                lm = self._lms[key] = _make_lm(dict(options))
                if len(self._lms) > MAX_LMS:
                    self._lms.popitem(last=False)
            else:
                self._lms.move_to_end(key)
        return lm

    def call_settings(self, lm: dspy.BaseLM | None, adapter: dspy.Adapter | None) -> dict[str, Any]:
        """What to hand to `dspy.context` for a call. Raises `LMNotConfigured`."""
        lm = lm or dspy.settings.lm
        if lm is None:
            raise LMNotConfigured("no LM: set DSPY_BRIDGE_LM, or give lm with the program or the call")
        settings: dict[str, Any] = {"lm": lm}
        if adapter is not None:
            settings["adapter"] = adapter
        if isinstance(lm, echo.EchoLM):
            settings["callbacks"] = [*dspy.settings.callbacks, echo.WatchFormat()]
        return settings


def adapter(name: object) -> dspy.Adapter:
    """A new adapter by its name. Raises `InvalidArgs`."""
    if not isinstance(name, str) or name not in _ADAPTERS:
        raise InvalidArgs(f"adapter: expected one of {', '.join(ADAPTERS)}")
    return _ADAPTERS[name]()


def translate(error: Exception) -> BridgeError | None:
    """The error of ours for one of DSPy's; None for any other."""
    if isinstance(error, BridgeError):
        return error
    if isinstance(error, dspy.AdapterParseError):
        wanted = list(error.signature.output_fields)
        got = list(error.parsed_result or ())
        problem = "a value did not fit its type"
        if missing := [name for name in wanted if name not in got]:
            problem = f"{', '.join(missing)} could not be read"
        began = " ".join(str(error.lm_response).split())[:200]
        text = f"the LM's answer did not fit the signature: {problem}; expected {', '.join(wanted)}; it began {began!r}"
        return OutputInvalid(text)
    if isinstance(error, dspy.LMConfigurationError):
        return LMNotConfigured(str(error))
    if isinstance(error, dspy.LMError):
        return LMFailed(f"{type(error).__name__}: {error}", dspy.is_retryable_lm_error(error))
    return None


def _make_lm(options: dict[str, Any]) -> dspy.BaseLM:
    model = options.pop("model", None)
    if not isinstance(model, str) or not model:
        raise InvalidArgs('lm.model: expected text such as "openai/gpt-4o-mini"')
    for name in _OBJECT_OPTIONS:
        if name in options:
            raise InvalidArgs(f"lm.{name}: cannot be given as JSON")
    try:
        return echo.EchoLM(**options) if model == echo.NAME else dspy.LM(model, **options)
    except (TypeError, ValueError, dspy.LMError) as error:
        raise InvalidArgs(f"lm: {error}") from None


def _call_init(path: str) -> None:
    module, _, name = path.partition(":")
    try:
        getattr(importlib.import_module(module), name)()
    except BaseException as error:  # the host's code; its SystemExit must not end the peer either
        raise SetupFailed(f"DSPY_BRIDGE_INIT {path}: {type(error).__name__}: {error}") from error
