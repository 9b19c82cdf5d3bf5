"""DSPy's adapters by name, and the one for programs that name none. Imports DSPy."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.settings import ADAPTERS

_KINDS: dict[str, Any] = dict(zip(ADAPTERS, (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter), strict=True))
# The settings of an adapter, and DSPy's parameters.
_FLAGS = {"native_tools": "use_native_function_calling", "parallel_tool_calls": "parallel_tool_calls"}


def make(given: object, native_tools: bool | None = None) -> dspy.Adapter:
    """A new adapter for a name or an object with `name`. `native_tools`: if it does not say; None for DSPy's default.

    Raises `InvalidArgs`.
    """
    flags = given if isinstance(given, dict) else {}
    name = flags.get("name") if isinstance(given, dict) else given
    if not isinstance(name, str) or name not in _KINDS:
        two_step = '{"name": "two_step", "extraction_model": {"model": …}}'
        raise InvalidArgs(f"adapter: expected one of {', '.join(ADAPTERS)}, an object with such a name, or {two_step}")
    refuse_unknown(flags, ("name", *_FLAGS), "adapter")
    if native_tools is not None:
        flags = {"native_tools": native_tools, **flags}
    for flag in _FLAGS:
        if not isinstance(flags.get(flag, False), bool):
            raise InvalidArgs(f"adapter.{flag}: expected true or false")
    return _KINDS[name](**{of_dspy: flags[flag] for flag, of_dspy in _FLAGS.items() if flag in flags})


def default() -> dspy.Adapter:
    """The adapter for programs that name none: your application's, else DSPy's own."""
    return dspy.settings.adapter or _of_dspy()


def name_of(adapter: dspy.Adapter) -> str:
    """Its name here, or that of a class that has none."""
    return next((name for name, kind in _KINDS.items() if type(adapter) is kind), type(adapter).__name__)


class _Watch(BaseCallback):  # type: ignore[misc]  # DSPy ships no types
    adapter: dspy.Adapter | None = None

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.adapter = instance


class _NoAnswer:
    """An engine: the adapter has formatted its prompt by now, and more is not needed."""

    def complete(self, request: Any) -> Any:
        raise ValueError


@functools.cache
def _of_dspy() -> dspy.Adapter:
    """Another one in each minor version, and nowhere named: so a predictor is asked. It takes 2 ms."""
    watch, lm = _Watch(), dspy.LM("none", engine=_NoAnswer(), cache=False, num_retries=0)
    with suppress(dspy.LMError), dspy.context(lm=lm, adapter=None, callbacks=[watch], disable_history=True):
        dspy.Predict("question -> answer")(question="")
    return watch.adapter or dspy.ChatAdapter()
