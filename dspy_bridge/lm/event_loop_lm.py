"""An LM whose sync calls, made in a worker thread, run on the event loop: there they can stream and be cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.rate_limits import Gate
from dspy_bridge.lm.transport import admission, asking
from dspy_bridge.runtime import event_loop

_PARAMS = {
    "response_schema": ("response_format",),
    "function_calling": ("tools", "tool_choice", "parallel_tool_calls"),
    "reasoning": ("reasoning_effort",),
}


class LoopLM(dspy.LM):  # type: ignore[misc]  # DSPy ships no types
    """A `dspy.LM` that is called within the limits of its account."""

    # What the server can do, of `lm_options.CAPABILITIES`; None: what DSPy knows by the model's name.
    supports: frozenset[str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Set by who makes it.
        self.asking: asking.Asking | None = None
        self.gate: Gate | None = None

    def __deepcopy__(self, _memo: object) -> LoopLM:
        # A copy of a program has the same LM: another one would open connections of its own.
        return self

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        run: admission.Run | None = dspy.settings.get(admission.RUN)
        slot = None if run is None else run.slot()
        async with slot or nullcontext():
            with self._calling():
                return await super().acall(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        event_loop.refuse_sync_call()
        job = admission.job()
        if job is None:
            # In a thread that the module started. There DSPy could stream only to an event loop of its own kind.
            with dspy.context(**{dspy_internals.SEND_STREAM.attribute: None}), self._calling():
                return super().__call__(*args, **kwargs)
        return job.on_lm_loop(self.acall(*args, **kwargs))

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with asking.of(self.asking), admission.of(self.gate):
            if self.gate is None or not self.gate.account.counts_tokens or not dspy_internals.USAGE_SETTING.there:
                yield
                return
            setting = dspy_internals.USAGE_SETTING.attribute
            with dspy.context(**{setting: admission.TokenCount(self.gate, dspy.settings[setting])}):
                yield

    @property
    def supports_function_calling(self) -> bool:
        """As `dspy.LM`'s."""
        return bool(super().supports_function_calling if self.supports is None else "function_calling" in self.supports)

    @property
    def supports_reasoning(self) -> bool:
        """As `dspy.LM`'s."""
        return bool(super().supports_reasoning if self.supports is None else "reasoning" in self.supports)

    @property
    def supports_response_schema(self) -> bool:
        """As `dspy.LM`'s."""
        return bool(super().supports_response_schema if self.supports is None else "response_schema" in self.supports)

    @property
    def supported_params(self) -> set[str]:
        """As `dspy.LM`'s. A server without schemas may still have JSON mode, also a `response_format`."""
        params = set(super().supported_params)
        if self.supports is None:
            return params
        for capability, names in _PARAMS.items():
            if capability in self.supports:
                params.update(names)
            elif capability != "response_schema" or not self.supports:
                params.difference_update(names)
        return params
