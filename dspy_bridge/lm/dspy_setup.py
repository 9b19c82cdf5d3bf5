"""Sets up DSPy and its cache, and makes LMs and adapters from settings and arguments. Imports DSPy."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

# The first LM call would fetch a price list of up to 32 MB from the network; the packaged one will do.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
# Optimizers would draw progress bars on standard error. tqdm reads it when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

import dspy

from dspy_bridge.errors import InvalidArgs, LMNotConfigured, SetupFailed, refuse_unknown

if not hasattr(dspy, "lm15"):
    raise SetupFailed(f"DSPy {dspy.__version__} is too old; expected 3.4.1 or newer")

from dspy_bridge.lm import dspy_internals, lm_call, lm_options, rate_limits
from dspy_bridge.lm.adapters import choice, guarded_adapters
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.lm.metering import endings  # noqa: F401  # see `dspy_internals.Name.replace`
from dspy_bridge.lm.offline import echo_lm, offline_lm
from dspy_bridge.lm.transport import litellm_route, outgoing, routes
from dspy_bridge.logs import peer_log, redaction
from dspy_bridge.runtime import event_loop, large_inputs
from dspy_bridge.settings import Settings

# Equal options share LMs and so their connections; the least recently used options go first.
MAX_LMS = 64


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
        event_loop.allow(step.value for step in steps if step.there)
        redaction.learn(dict(os.environ), for_good=True)
        redaction.learn(settings.lm_options, for_good=True)
        self.settings = settings
        self._configure(settings)
        if settings.init is not None:
            _call_init(settings.init)
        self.default_adapter = choice.name_of(choice.default())

    def _configure(self, settings: Settings) -> None:
        dspy.cache = _Cache(
            enable_disk_cache=settings.disk_cache is not None,
            enable_memory_cache=settings.cache_entries > 0,
            disk_cache_dir=settings.disk_cache,
            disk_size_limit_bytes=dspy.clients.DISK_CACHE_LIMIT,
            memory_max_entries=max(1, settings.cache_entries),
            # Files in the folder are data: DSPy's default would run any pickle found there.
            restrict_pickle=True,
        )
        # The trace keeps thousands of prompts; the type warnings quote inputs in the log. For history see `endings`.
        dspy.configure(disable_history=False, trace=None, warn_on_type_mismatch=False)
        if settings.adapter is not None:
            dspy.configure(adapter=choice.make(settings.adapter))
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
        if isinstance(lm, LoopLM) and not isinstance(lm, offline_lm.OfflineLM):
            routes.refuse_litellm(lm, settings, "config")

    def _lm(self, options: dict[str, Any]) -> dspy.BaseLM:
        if options["model"] == offline_lm.SCRIPT:
            return make_lm(options)  # each begins with its first answer
        return self._kept_lm(json.dumps(options, sort_keys=True))

    def _new_lm(self, options: str) -> dspy.BaseLM:
        lm = make_lm(json.loads(options))
        if self.settings.warm and dspy_internals.SELECT_BACKEND.there and not isinstance(lm, offline_lm.OfflineLM):
            with suppress(Exception):  # of wrong options, which the call reports
                if not dspy_internals.SELECT_BACKEND.value(lm).native:
                    litellm_route.start()
        return lm

    def adapter(self, given: object, native_tools: bool | None) -> dspy.Adapter:
        """A new adapter, as `choice.make`, or `{"name": "two_step", "extraction_model": {"model": …}}`."""
        if not isinstance(given, dict) or given.get("name") != "two_step":
            return choice.make(given, native_tools)
        refuse_unknown(given, ("name", "extraction_model"), "adapter")
        return dspy.TwoStepAdapter(self.lm(given.get("extraction_model"), "adapter.extraction_model"))

    @contextmanager
    def context(
        self, lm: dspy.BaseLM | None, adapter: dspy.Adapter | None, run: lm_call.RunContext | None = None
    ) -> Iterator[None]:
        """DSPy's settings for one call, or one attempt of `run`; without an LM it is the default one.

        Raises `LMNotConfigured`.
        """
        lm_call.begin_on_main_loop()
        lm = lm or dspy.settings.lm
        if lm is None:
            raise LMNotConfigured(self._lacking or "no LM: set DSPY_BRIDGE_LM, or give lm with the program or the call")
        redaction.remember(getattr(lm, "secrets", ()))
        run = run or lm_call.RunContext(None)
        run.meter = None if run.call is None else run.call.meter
        watching = [offline_lm.WatchFormat()] if isinstance(lm, offline_lm.OfflineLM) else []
        watching += [] if run.meter is None else [run.meter]
        settings = {
            "lm": lm,
            "adapter": guarded_adapters.guarded(adapter or choice.default(), strict=self.settings.strict_fields),
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


class _Cache(dspy.clients.Cache):  # type: ignore[misc]  # DSPy ships no types
    """DSPy leaves the server and the key of an LM out of the cache's key: another account, or another server's model of
    the same name, would get the answer."""

    def cache_key(self, request: dict[str, Any], ignored_args_for_cache_key: list[str] | None = None) -> str:
        target = lm_call.target()
        # An LM of your application's is known by what is in the request alone.
        account = routes.account(request) if target is None else repr((target.account, target.scope))
        return sha256(f"{super().cache_key(request, ignored_args_for_cache_key)} {account}".encode()).hexdigest()

    def get(self, *args: Any, **options: Any) -> Any:
        found, call = super().get(*args, **options), lm_call.current.get()
        if call is not None:
            call.cached = found is not None
        return found


class _Connections:
    """Those of an LM and of its copies. They are closed when nothing refers to it any more: else they stay open for as
    long as the provider likes, even those of an LM that is garbage."""


def make_lm(options: dict[str, Any]) -> dspy.BaseLM:
    """`options`: complete, as of `lm_options`. Raises `InvalidArgs` or `LMNotConfigured`."""
    model, of_dspy, scope, connect_timeout, limits, supports, key_of = lm_options.split(options)
    if "answers" in of_dspy and model != offline_lm.SCRIPT:
        raise InvalidArgs(f"lm.answers: only for {offline_lm.SCRIPT}")
    try:
        if model == echo_lm.NAME:
            lm = offline_lm.OfflineLM(model, echo_lm.answer, **of_dspy)
        elif model == offline_lm.SCRIPT:
            lm = offline_lm.OfflineLM(model, offline_lm.Script(of_dspy.pop("answers", None)).answer, **of_dspy)
        else:
            lm = LoopLM(model, **of_dspy)
            routes.refuse_litellm(lm, {}, "lm")
    except (TypeError, ValueError, dspy.LMError) as error:
        raise InvalidArgs(f"lm: {error}") from None
    lm.supports = supports
    lane = rate_limits.lane(routes.limited_account(options), limits)
    lm.target = lm_call.Target(routes.account(options), scope, connect_timeout, lm.num_retries > 0, key_of, lane)
    lm.secrets = list(redaction.secrets(options))
    redaction.remember(lm.secrets)
    # A copy shares the connections; it must not keep what its end depends on.
    closing = copy.copy(lm)
    lm.connections = _Connections()
    weakref.finalize(lm.connections, _close, closing).atexit = False
    return lm


def _close(lm: Any) -> None:
    """Called on any thread."""
    for loop in (lm_call.main_loop(), *large_inputs.loops()):
        if loop is not None and not loop.is_closed():
            asyncio.run_coroutine_threadsafe(lm.aclose(), loop)
