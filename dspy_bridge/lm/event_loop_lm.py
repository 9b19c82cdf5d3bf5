"""An LM whose sync calls, made in a worker thread, run on the event loop: there they can stream and be cancelled."""

from __future__ import annotations

from typing import Any

import dspy

from dspy_bridge.lm import dspy_internals
from dspy_bridge.lm.transport import asking, connections
from dspy_bridge.runtime import worker_threads


class LoopLM(dspy.LM):  # type: ignore[misc]  # DSPy ships no types
    """A `dspy.LM` that also counts its calls: connections of one that has none can be closed (`connections`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use = connections.Use()
        # Set by who makes it.
        self.asking: asking.Asking | None = None
        connections.register(self)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        try:
            with self.use.call(), asking.of(self.asking):
                return await super().acall(*args, **kwargs)
        finally:
            if self.use.to_close():
                await connections.close(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        job = worker_threads.current.get()
        if job is None:
            # In a thread that the module started. There DSPy could stream only to an event loop of its own kind.
            without_stream = dspy.context(**{dspy_internals.SEND_STREAM.attribute: None})
            with without_stream, self.use.call(), asking.of(self.asking):
                return super().__call__(*args, **kwargs)
        return job.on_lm_loop(self.acall(*args, **kwargs))
