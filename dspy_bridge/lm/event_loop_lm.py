"""An LM whose sync calls, made in a worker thread, run on the event loop: there they can stream and be cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.rate_limits import Gate
from dspy_bridge.lm.transport import admission, asking, connections
from dspy_bridge.runtime import worker_threads


class LoopLM(dspy.LM):  # type: ignore[misc]  # DSPy ships no types
    """A `dspy.LM` that also counts its calls: connections of one that has none can be closed (`connections`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use = connections.Use()
        # Set by who makes it.
        self.asking: asking.Asking | None = None
        self.gate: Gate | None = None
        connections.register(self)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        try:
            with self._calling():
                return await super().acall(*args, **kwargs)
        finally:
            if self.use.to_close():
                await connections.close(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        job = worker_threads.current.get()
        if job is None:
            # In a thread that the module started. There DSPy could stream only to an event loop of its own kind.
            with dspy.context(**{dspy_internals.SEND_STREAM.attribute: None}), self._calling():
                return super().__call__(*args, **kwargs)
        return job.on_lm_loop(self.acall(*args, **kwargs))

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self.use.call(), asking.of(self.asking), admission.of(self.gate):
            if self.gate is None or not self.gate.account.counts_tokens or not dspy_internals.USAGE_SETTING.there:
                yield
                return
            setting = dspy_internals.USAGE_SETTING.attribute
            with dspy.context(**{setting: admission.TokenCount(self.gate, dspy.settings[setting])}):
                yield
