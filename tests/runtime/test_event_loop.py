"""event_loop: a connection does not keep the context in which it was opened."""

from __future__ import annotations

import contextvars
import os

from dspy_bridge.runtime.event_loop import EventLoop

under_way: contextvars.ContextVar[str] = contextvars.ContextVar("under_way", default="nothing")


def test_callbacks_of_descriptors_have_an_empty_context() -> None:
    read, write = os.pipe()
    loop = EventLoop()
    found: list[str] = []

    async def register() -> None:
        under_way.set("a call and its arguments")
        loop.add_reader(read, lambda: (found.append(under_way.get()), loop.stop()))
        loop.add_writer(write, lambda: (found.append(under_way.get()), loop.remove_writer(write)))
        os.write(write, b".")

    loop.create_task(register())
    loop.run_forever()
    loop.remove_reader(read)
    loop.close()
    os.close(read)
    os.close(write)
    assert sorted(set(found)) == ["nothing"]
