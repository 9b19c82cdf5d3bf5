"""Sets up DSPy, and makes LMs and adapters from settings and arguments. Imports DSPy."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The first LM call would fetch a price list of up to 32 MB from the network; the packaged one will do.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
# Optimizers would draw progress bars on standard error. tqdm reads it when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

import dspy

from dspy_bridge.errors import InvalidArgs, LMNotConfigured, SetupFailed, refuse_unknown

if not hasattr(dspy, "lm15"):
    raise SetupFailed(f"DSPy {dspy.__version__} is too old; expected 3.4.1 or newer")

from dspy_bridge.lm import answer_cache, dspy_internals, event_loop_lm, lm_call, lm_factory, lm_options, main_loop
from dspy_bridge.lm.adapters import built_once, guarded_adapters  # noqa: F401  # see `dspy_internals.Name.replace`
from dspy_bridge.lm.metering import endings  # noqa: F401
from dspy_bridge.lm.offline import offline_lm, script_lm
from dspy_bridge.lm.transport import outgoing, routes
from dspy_bridge.logs import peer_log, redaction
from dspy_bridge.runtime import inline_executor
from dspy_bridge.settings import ADAPTERS, Settings

# Equal options share LMs and so their connections; the least recently used options go first.
MAX_LMS = 64
_ADAPTERS = dict(zip(ADAPTERS, (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter), strict=True))


class LMs:
    """The LMs and adapters of this peer. Created once, on the only thread that may configure DSPy from then on."""

    def __init__(self, settings: Settings) -> None:
        """Configure DSPy and call your application's `init`. Raises `SetupFailed`."""
        self._kept_lm = functools.lru_cache(MAX_LMS)(self._new_lm)
        self._default: dspy.BaseLM | None = None
        # Why there is none.
        self._lacking: str | None = None
        # Those of the default LM, complete.
        self._options: dict[str, Any] | None = None
        peer_log.adopt("dspy")
        outgoing.most = settings.max_lm_bytes
        dspy_internals.check()
        # A cache on disk is waited for.
        steps = dspy_internals.STEPS + (dspy_internals.CACHE_STEPS if settings.disk_cache is None else [])
        inline_executor.allow(step.value for step in steps if step.there)
        redaction.learn(dict(os.environ), for_good=True)
        redaction.learn(settings.lm_options, for_good=True)
        self.settings = settings
        self._configure(settings)
        if settings.init is not None:
            _call_init(settings.init)

    def _configure(self, settings: Settings) -> None:
        answer_cache.configure(disk_cache=settings.disk_cache, entries=settings.cache_entries)
        # The trace keeps thousands of prompts; the type warnings quote inputs in the log. For history see `endings`.
        dspy.configure(disable_history=False, trace=None, warn_on_type_mismatch=False)
        if settings.adapter is not None:
            dspy.configure(adapter=_ADAPTERS[settings.adapter]())
        if settings.lm is not None:
            try:
                options = {**settings.lm_options, "model": settings.lm}
                self._options = lm_options.complete(options, "lm_options", of_settings=True)
                self._default = self._lm(self._options)
                dspy.configure(lm=self._default)
            except LMNotConfigured as error:
                self._lacking = str(error)
            except InvalidArgs as error:
                raise SetupFailed(f"DSPY_BRIDGE_LM, DSPY_BRIDGE_LM_OPTIONS: {error}") from None

    def lm(self, given: object, where: str = "lm") -> dspy.BaseLM:
        """The LM for a model's name, or an object of it and options; `where` is its name in errors.

        Raises `InvalidArgs`.
        """
        return self._lm(lm_options.complete(given, where, self._options))

    def changed_lm(self, given: object, changes: dict[str, Any]) -> dspy.BaseLM | None:
        """The LM for `given`, an `lm` (None: the default LM), with other options of the connection or the cache.

        None if the default LM is your application's own. Raises `InvalidArgs`.
        """
        if given is not None:
            options = lm_options.complete(given, "lm", self._options)
        elif self._options is None or self._default is None or dspy.settings.lm is not self._default:
            return None
        else:
            options = self._options
        return self._lm(lm_options.changed(options, changes))

    def refuse_litellm(self, lm: dspy.BaseLM | None, settings: dict[str, Any]) -> None:
        """Raises `LMNotConfigured` if runs with the LM, or the default one, and these settings need LiteLLM, which is
        not installed."""
        lm = lm or dspy.settings.lm
        if lm is None and self._lacking is not None:
            raise LMNotConfigured(self._lacking)
        if isinstance(lm, event_loop_lm.LoopLM) and not isinstance(lm, offline_lm.OfflineLM):
            routes.refuse_litellm(lm, settings, "config")

    def _lm(self, options: dict[str, Any]) -> dspy.BaseLM:
        if options["model"] == script_lm.NAME:
            return lm_factory.make(options)  # each begins with its first answer
        return self._kept_lm(json.dumps(options, sort_keys=True))

    def _new_lm(self, options: str) -> dspy.BaseLM:
        lm = lm_factory.make(json.loads(options))
        if self.settings.warm:
            lm_factory.warm_up(lm)
        return lm

    def adapter(self, given: object) -> dspy.Adapter:
        """A new adapter: by name, or `{"name": "two_step", "extraction_model": {"model": …}}`. Raises `InvalidArgs`."""
        if isinstance(given, str) and given in _ADAPTERS:
            return _ADAPTERS[given]()
        if not isinstance(given, dict) or given.get("name") != "two_step":
            two_step = '{"name": "two_step", "extraction_model": {"model": …}}'
            raise InvalidArgs(f"adapter: expected one of {', '.join(ADAPTERS)}, or {two_step}")
        refuse_unknown(given, ("name", "extraction_model"), "adapter")
        return dspy.TwoStepAdapter(self.lm(given.get("extraction_model"), "adapter.extraction_model"))

    @contextmanager
    def context(
        self, lm: dspy.BaseLM | None, adapter: dspy.Adapter | None, run: lm_call.RunContext | None = None
    ) -> Iterator[None]:
        """DSPy's settings for one call, or one attempt of `run`; without an LM it is the default one.

        Raises `LMNotConfigured`.
        """
        main_loop.begin()
        lm = lm or dspy.settings.lm
        if lm is None:
            raise LMNotConfigured(self._lacking or "no LM: set DSPY_BRIDGE_LM, or give lm with the program or the call")
        redaction.remember(getattr(lm, "secrets", ()))
        chosen = adapter or dspy.settings.adapter or dspy.ChatAdapter()
        run = run or lm_call.RunContext(None)
        run.meter = None if run.call is None else run.call.meter
        watching = [offline_lm.WatchFormat()] if isinstance(lm, offline_lm.OfflineLM) else []
        watching += [] if run.meter is None else [run.meter]
        settings = {
            "lm": lm,
            "adapter": guarded_adapters.guarded(chosen, strict=self.settings.strict_fields),
            "callbacks": [*dspy.settings.callbacks, *watching],
            lm_call.RUN: run,
        }
        try:
            with dspy.context(**settings):
                yield
        finally:
            run.meter = None  # it has the run's LM calls, and they the run: a cycle would keep its inputs for long


def _call_init(path: str) -> None:
    module, _, name = path.partition(":")
    try:
        getattr(importlib.import_module(module), name)()
    except BaseException as error:  # user code, whose SystemExit must not end the peer either
        raise SetupFailed(f"DSPY_BRIDGE_INIT {path}: {type(error).__name__}: {error}") from error
