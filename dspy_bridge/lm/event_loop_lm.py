"""A `dspy.LM` that is called on the event loop, wherever the call came from: there it can be stopped and can stream."""

from __future__ import annotations

from typing import Any

import dspy

from dspy_bridge.lm import connections
from dspy_bridge.runtime import worker_threads


class LoopLM(dspy.LM):  # type: ignore[misc]  # DSPy ships no types
    """A `dspy.LM` whose sync calls, made in a worker thread, run on the event loop: there they can be cancelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use = connections.Use()
        connections.register(self)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        try:
            with self.use.call():
                return await super().acall(*args, **kwargs)
        finally:
            if self.use.to_close():
                await connections.close(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `dspy.LM`'s."""
        job = worker_threads.current.get()
        if job is None:
            # In a thread of the module's own. There DSPy could stream only to a loop of its kind.
            with dspy.context(send_stream=None), self.use.call():
                return super().__call__(*args, **kwargs)
        return job.on_lm_loop(self.acall(*args, **kwargs))
