"""DSPy itself, and LMs and adapters from settings or arguments. Imported off the reading path, as it imports DSPy."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import importlib
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

# A price list that the first LM call would fetch from the network (up to 32 MB); the packaged one will do.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy

from dspy_bridge import tracing
from dspy_bridge.errors import (
    BridgeError,
    InvalidArgs,
    LMFailed,
    LMNotConfigured,
    OutputInvalid,
    SetupFailed,
)
from dspy_bridge.lm import answer_limit, echo_lm, guarded_adapters, json_repair_limit
from dspy_bridge.lm.event_loop_lm import LoopLM
from dspy_bridge.logs import peer_log, redaction
from dspy_bridge.runtime import large_inputs
from dspy_bridge.settings import ADAPTERS, Settings

# Equal options share LMs and so their connections; the least recently used options go first.
MAX_LMS = 64
# The connections that one dspy.LM opens at most. A call past them would wait for another's end, so it gets another LM
# with the same options: 512 calls of 1 s ran at 85/s with one LM and at 235/s with six.
CALLS_PER_LM = 100
# Options of dspy.LM that are Python objects, which JSON cannot give.
_OBJECT_OPTIONS = ("async_engine", "callbacks", "launch_kwargs", "prompt_cache", "provider", "train_kwargs")
_ADAPTERS = dict(zip(ADAPTERS, (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter), strict=True))


class LMPool:
    """As many LMs with equal options as the calls in flight need. Lent and given back on the event loop only.

    When nobody has it any more its connections are closed: by themselves they stay open for as long as the provider
    likes, also those of an LM that is garbage.
    """

    def __init__(self, options: dict[str, Any], loops: list[asyncio.AbstractEventLoop]) -> None:
        """`loops`: where its LMs are called, known by then at the latest. Raises `InvalidArgs`."""
        self._options = options
        self._lms = [_make_lm(dict(options))]
        self._in_flight = [0]
        weakref.finalize(self, _close, self._lms, loops).atexit = False

    def lasting(self) -> dspy.BaseLM:
        """An LM for who needs one for long: it keeps the pool."""
        # A copy shares the connections. The LMs themselves must not lead to the pool: its finalizer has them.
        lm = copy.copy(self._lms[0])
        lm.pool = self
        return lm

    @contextmanager
    def lend(self) -> Iterator[dspy.BaseLM]:
        """An LM that has a connection to spare."""
        redaction.learn(self._options)  # as long as it is in use it is not forgotten
        place = next((n for n, count in enumerate(self._in_flight) if count < CALLS_PER_LM), len(self._lms))
        if place == len(self._lms):
            self._lms.append(_make_lm(dict(self._options)))
            self._in_flight.append(0)
        self._in_flight[place] += 1
        try:
            yield self._lms[place]
        finally:
            self._in_flight[place] -= 1


# Closings under way: a loop keeps no task by itself.
_closing: set[asyncio.Task[None]] = set()


def _close(lms: list[Any], loops: list[asyncio.AbstractEventLoop]) -> None:
    """On whichever thread the last one let go."""

    async def close() -> None:
        for lm in lms:
            with suppress(Exception):  # connections that were broken already
                await lm.aclose()

    def start() -> None:
        task = asyncio.get_running_loop().create_task(close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    for loop in (*loops, *large_inputs.loops()):
        with suppress(RuntimeError):  # it is closed itself
            loop.call_soon_threadsafe(start, context=contextvars.Context())


class Models:
    """The LMs and adapters of this peer. Made once, on the thread that may configure DSPy from then on."""

    def __init__(self, settings: Settings) -> None:
        """Configure DSPy and call the host's `init`. Raises `SetupFailed`."""
        self._pools: OrderedDict[str, LMPool] = OrderedDict()
        self._default: tuple[LMPool, dspy.BaseLM] | None = None
        # Where calls run: noted by the first.
        self.loops: list[asyncio.AbstractEventLoop] = []
        self._lock = threading.Lock()
        peer_log.adopt("dspy")
        answer_limit.most = settings.max_lm_bytes
        _install("litellm_loading", "the first call by LiteLLM holds up all others")
        _install("json_repair_limit", "an LM's broken JSON can hold up all other calls")
        _install("trace_headers", "no traceparent reaches LMs, and their answers have no limit")
        redaction.learn_environment()
        redaction.learn(settings.lm_options, for_good=True)
        self.settings = settings
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
                pool = self.pool({**settings.lm_options, "model": settings.lm})
                self._default = pool, pool.lasting()
                dspy.configure(lm=self._default[1])
            except InvalidArgs as error:
                raise SetupFailed(f"DSPY_BRIDGE_LM, DSPY_BRIDGE_LM_OPTIONS: {error}") from None

    def pool(self, options: dict[str, Any]) -> LMPool:
        """The LMs for `{"model": …, …keyword arguments of dspy.LM}`. Raises `InvalidArgs`."""
        key = json.dumps(options, sort_keys=True)
        with self._lock:
            pool = self._pools.get(key)
            if pool is None:
                redaction.learn(options)
                pool = self._pools[key] = LMPool(options, self.loops)
                if len(self._pools) > MAX_LMS:
                    self._pools.popitem(last=False)
            else:
                self._pools.move_to_end(key)
        return pool

    def saved_pool(self, state: dict[str, Any]) -> LMPool:
        """The LMs for the state of one that DSPy saved. Raises `InvalidArgs`."""
        try:
            return self.pool(state)
        except InvalidArgs as error:
            raise InvalidArgs(f"state: {error}") from None

    def adapter(self, given: object) -> dspy.Adapter:
        """A new adapter: by name, or `{"name": "two_step", "extraction_model": {"model": …}}`. Raises `InvalidArgs`."""
        if isinstance(given, str) and given in _ADAPTERS:
            return _ADAPTERS[given]()
        two_step = '{"name": "two_step", "extraction_model": {"model": …}}'
        if not isinstance(given, dict) or given.get("name") != "two_step":
            raise InvalidArgs(f"adapter: expected one of {', '.join(ADAPTERS)}, or {two_step}")
        model = given.get("extraction_model")
        if not isinstance(model, dict) or given.keys() != {"name", "extraction_model"}:
            raise InvalidArgs(f"adapter: expected {two_step}")
        return dspy.TwoStepAdapter(self.pool(model).lasting())

    @contextmanager
    def context(self, pool: LMPool | None, adapter: dspy.Adapter | None) -> Iterator[None]:
        """DSPy's settings for one call; without a pool the default LM's. Raises `LMNotConfigured`."""
        if (loop := asyncio.get_running_loop()) not in self.loops:
            self.loops.append(loop)
        with ExitStack() as stack:
            lm = dspy.settings.lm
            if pool is None and self._default is not None and lm is self._default[1]:
                pool = self._default[0]
            if pool is not None:
                lm = stack.enter_context(pool.lend())
            if lm is None:
                raise LMNotConfigured("no LM: set DSPY_BRIDGE_LM, or give lm with the program or the call")
            chosen = adapter or dspy.settings.adapter or dspy.ChatAdapter()
            settings = {"lm": lm, "adapter": guarded_adapters.guarded(chosen, strict=self.settings.strict_fields)}
            if (traceparent := tracing.current()) is not None:
                settings[tracing.TRACEPARENT] = traceparent
            if isinstance(lm, echo_lm.EchoLM):
                settings["callbacks"] = [*dspy.settings.callbacks, echo_lm.WatchFormat()]
            stack.enter_context(dspy.context(**settings))
            yield


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
    if isinstance(error, json_repair_limit.TooMuchToRepair):
        return OutputInvalid(f"the LM's answer did not fit the signature: {error}")
    if isinstance(error, dspy.CodeInterpreterError):
        # Not what the code did: its errors go to the LM. The sandbox is missing, or did not start.
        said = str(error).strip().split("\n", 1)[0]
        return SetupFailed(f"the sandbox for code failed: {said}; DSPy's own needs Deno 2: pip install 'dspy[deno]'")
    if isinstance(error, dspy.LMConfigurationError):
        return LMNotConfigured(str(error))
    if isinstance(error, dspy.LMError):
        return LMFailed(f"{type(error).__name__}: {error}", dspy.is_retryable_lm_error(error))
    return None


def _install(name: str, without: str) -> None:
    try:
        importlib.import_module(f"dspy_bridge.lm.{name}").install()
    except (AttributeError, ImportError):
        # Another DSPy than the tested ones, with other names inside: all else works.
        peer_log.logger.warning("with this DSPy %s", without, exc_info=True)


def _make_lm(options: dict[str, Any]) -> dspy.BaseLM:
    model = options.pop("model", None)
    if not isinstance(model, str) or not model:
        raise InvalidArgs('lm.model: expected text such as "openai/gpt-4o-mini"')
    for name in _OBJECT_OPTIONS:
        if name in options:
            raise InvalidArgs(f"lm.{name}: cannot be given as JSON")
    try:
        return echo_lm.EchoLM(**options) if model == echo_lm.NAME else LoopLM(model, **options)
    except (TypeError, ValueError, dspy.LMError) as error:
        raise InvalidArgs(f"lm: {error}") from None


def _call_init(path: str) -> None:
    module, _, name = path.partition(":")
    try:
        getattr(importlib.import_module(module), name)()
    except BaseException as error:  # the host's code; its SystemExit must not end the peer either
        raise SetupFailed(f"DSPY_BRIDGE_INIT {path}: {type(error).__name__}: {error}") from error
