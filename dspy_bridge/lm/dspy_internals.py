"""Every name of DSPy, LiteLLM and other libraries that they do not document: the one place that touches them.

Each is looked up once. Where a release has renamed or changed one, a feature is off or slower, as the name's `without`
says: the log has one warning, `get_stats` lists the name under `degraded`, and everything else works. Imports DSPy.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from typing import Any, TypeVar

import dspy

from dspy_bridge.logs import peer_log

T = TypeVar("T")


class Name:
    """A name that may be gone: `module:attribute.attribute`."""

    def __init__(self, path: str, without: str, *takes: str) -> None:
        """`takes`: the first parameters of a function."""
        self.module, _, self.path = path.partition(":")
        self.dotted = path.replace(":", ".")
        self.without = without
        self.takes = takes
        names.append(self)

    @functools.cached_property
    def value(self) -> Any:
        """What has this name; None if nothing has, or something that is called in another way."""
        try:
            found = self._find(self.path)
            if not self.takes or tuple(inspect.signature(found).parameters)[: len(self.takes)] == self.takes:
                return found
        except (AttributeError, ImportError, TypeError, ValueError):
            pass
        degraded.append(self.dotted)
        return None

    @property
    def there(self) -> bool:
        return self.value is not None or self.dotted not in degraded

    @property
    def attribute(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    def replace(self, ours: T) -> T:
        """Put `ours` in its place, if it is there; `value` stays what it was. Modules do so when they are imported."""
        if self.there:
            setattr(self._find(self.path.rpartition(".")[0]), self.attribute, ours)
        return ours

    def _find(self, path: str) -> Any:
        found = importlib.import_module(self.module)
        for attribute in path.split(".") if path else ():
            found = getattr(found, attribute)
        return found


names: list[Name] = []
# Those that cannot be used, by dotted path.
degraded: list[str] = []


def check() -> None:
    """Look up all names; one warning says which are gone, and what is off without them."""
    losses: dict[str, list[str]] = {}
    for name in names:
        if not name.there:
            losses.setdefault(name.without, []).append(name.dotted)
    if not losses:
        return
    lost = "; ".join(f"{without} ({', '.join(found)})" for without, found in losses.items())
    peer_log.logger.warning("names inside DSPy %s are not as expected: %s", dspy.__version__, lost)


def silence_litellm() -> None:
    """Keep LiteLLM from reporting, at the end of the process, errors that are only of this end.

    Its exit handler runs what its logging has queued, which the event loop may be running: that is logged as an error.
    A finalizer raises once the interpreter has cleared the names it uses; the connections it would close end anyway.
    """
    logging.getLogger("LiteLLM").disabled = True
    transport = getattr(sys.modules.get("litellm.llms.custom_httpx.aiohttp_transport"), "LiteLLMAiohttpTransport", None)
    if transport is not None and "__del__" in vars(transport):
        del transport.__del__


def silence_attempts() -> None:
    """Keep BestOfN and Refine from printing the errors of their attempts, which may quote requests."""
    for name in ("best_of_n", "refine"):
        module: Any = sys.modules.get(f"dspy.predict.{name}")
        if module is not None:
            module.print = lambda *_: None


# What LMs are sent: by DSPy's own transports, and by LiteLLM.
_OUTGOING = "LM requests carry no traceparent and their answers have no limit"
TRANSPORT = Name("dspy._vendor.lm15.transports:StdlibAsyncTransport.stream", _OUTGOING, "self", "request")
CONNECTIONS = Name("dspy.lm15:RouterConfig.transport_kwargs", "past 100 calls at once an LM's calls wait", "self")
LITELLM_ENGINE = Name("dspy.clients.execution:AsyncLiteLLMEngine", _OUTGOING)
CALL, ASYNC_CALL = (
    Name(f"dspy.clients.execution:{name}", f"in threads {_OUTGOING}", "lm", "call") for name in ("execute", "aexecute")
)
CALL_RESULT = Name("dspy.clients.execution:CallResult", "runs cannot be journaled")
# How answers are read.
JSON_FALLBACK = Name(
    "dspy:ChatAdapter._make_json_adapter_fallback",
    "second answers, in JSON, are not checked for contradictions",
    "self",
)
RESPONSE_FORMAT = Name(
    "dspy:JSONAdapter._prepare_response_format",
    "maps inside other types may come back empty, and answers without a schema are no `fallbacks` of `meta`",
    "self",
    "lm",
    "lm_kwargs",
    "signature",
)
FORMAT_VALUE = Name(
    "dspy.adapters.utils:format_field_value", "objects that quote field headers are not cleaned", "field_info", "value"
)

# What DSPy builds for each value: see `adapters/guarded_adapters`.
_ANEW = "agents and typed values are slower"
TYPE_ADAPTERS = [Name(f"dspy.adapters.{module}:TypeAdapter", _ANEW, "type") for module in ("utils", "xml_adapter")]
TOOL_ARGUMENTS = Name("dspy:Tool._validate_and_parse_args", _ANEW, "self")
RESPONSE_MODEL = Name(
    "dspy.adapters.json_adapter:_get_structured_outputs_response_format",
    _ANEW,
    "signature",
    "use_native_function_calling",
)
FORMAT_TRAJECTORY = Name("dspy:ReAct._format_trajectory", _ANEW, "self", "trajectory")

# What DSPy looks up for each LM call: see `transport/routes`.
_SLOWER = "LM calls are slower"
RESOLVE = Name("dspy.clients.capabilities:resolve", _SLOWER, "lm")
MODEL_INFO = [
    Name(f"dspy.clients.{module}:model_info", _SLOWER, "provider", "model") for module in ("capabilities", "costs")
]
OFFLINE_ENGINE = Name("dspy.clients.backend_selection:LM15Engine", _SLOWER, "config", "model_type")
SELECT_BACKEND = Name("dspy.clients.backend_selection:select_backend", "LiteLLM is imported by its first call", "lm")

# What DSPy does around an LM call, in steps of some 10 µs, each in a thread: see `runtime/event_loop`.
_EXECUTION = "dspy.clients.execution"
# Not `capabilities`: for the same model it may need LiteLLM or not, and be the first to import it.
STEPS = [
    Name(f"{_EXECUTION}:prepare", "LM calls are slower; wrong LM settings are `internal` errors", "lm", "prompt"),
    Name(f"{_EXECUTION}:_price_result", _SLOWER, "lm", "result"),
    Name("dspy.clients.engines:AsyncLM15Engine._target", _SLOWER, "self", "request"),
]
CACHE_STEPS = [Name(f"{_EXECUTION}:{step}", _SLOWER, "lm", "call") for step in ("_cached", "_store")]

# Streams.
_WHOLE = "streamed fields come in one piece"
SEND_STREAM = Name("dspy:settings.send_stream", _WHOLE)
STREAM_LISTENERS = Name("dspy:settings.stream_listeners", _WHOLE)
ADAPTER_CALLS = Name(
    "dspy.clients.call_context:_adapter_calls", "a streamed answer that cannot be read is not asked for again"
)

# Programs.
CALLER_MODULES = Name("dspy:settings.caller_modules", "offline/echo calls no tools in a ReAct")
TOOL_SCHEMAS = Name(
    "dspy.adapters.types.tool:convert_input_schema_to_tool_args", "schemas of tool arguments keep references", "schema"
)

# Optimizers and batches: see `event_loop_lm`.
EXECUTE = Name(
    "dspy.utils.parallelizer:ParallelExecutor.execute",
    "while a program is optimized, an example that takes 120 s is run twice, and bars may be logged",
    "self",
    "function",
    "data",
)

# Connections, kept open, must not keep the context in which they were opened: see `runtime/event_loop`.
for _method in ("_add_reader", "_add_writer"):
    Name(f"asyncio:SelectorEventLoop.{_method}", "memory of a call stays while connections it opened do", "self")
