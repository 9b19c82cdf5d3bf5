"""Large inputs and files of a run are read on other threads than the event loop's. With the real DSPy."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from lm_server import LMServer, chat

from dspy_bridge.commands.handlers import Commands
from dspy_bridge.lm import dspy_setup
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime import large_inputs
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings
from dspy_bridge.signatures import confined_files, media

LARGE = "x" * (large_inputs.LARGE + 1)


class Threads(BaseCallback):  # type: ignore[misc]
    """Where DSPy does its work."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.names["format"] = threading.current_thread().name

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.names["lm"] = threading.current_thread().name


class Size:
    """A `Caller`; `told`: each item of the stream, and the thread that sent it."""

    meter = None
    slot_transferred = False
    deadline = None
    ends = None
    services = SimpleNamespace(limiter=SimpleNamespace(release=lambda: None))
    request = SimpleNamespace(stream=False, meta=False)

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[tuple[Any, str]] = []

    async def stream_item(self, item: dict[str, Any]) -> None:
        self.items.append((item, threading.current_thread().name))


def call(definition: dict[str, Any], inputs: dict[str, Any], size: int, **settings: str) -> tuple[Any, dict[str, str]]:
    """The outputs, and where they were made."""
    outputs, _, threads = streamed(definition, inputs, size, stream=False, **settings)
    return outputs, threads


def streamed(
    definition: dict[str, Any], inputs: dict[str, Any], size: int, stream: bool = True, **settings: str
) -> tuple[Any, list[tuple[Any, str]], dict[str, str]]:
    """The outputs, the stream items, and the threads of each step."""
    server, watch = LMServer(lambda _request: chat(reasoning="r", answer="Paris")), Threads()

    lms, given = dspy_setup.Models(Settings(settings)), Size(size)

    async def main() -> Any:
        program = Program({"lm": {"model": "openai/m", **server.options()}, **definition}, lms, WorkerThreads())
        with dspy.context(callbacks=[watch]):
            return await program.call(inputs, None, None, cast(Any, given), stream=stream)

    try:
        return asyncio.run(main()), given.items, watch.names
    finally:
        server.stop()


PHOTO = {"signature": {"inputs": [{"name": "photo", "type": "image"}], "outputs": [{"name": "answer"}]}}
QA = {"signature": "question -> answer"}


@pytest.mark.parametrize(
    ("definition", "inputs"),
    [
        (QA, {"question": LARGE}),
        ({**QA, "program_type": "chain_of_thought"}, {"question": LARGE}),
        ({"signature": "context: list[str] -> answer"}, {"context": [LARGE[:1000]] * 1100}),
        (PHOTO, {"photo": {"base64": base64.b64encode(LARGE.encode()).decode(), "mime": "image/png"}}),
    ],
    ids=["text", "chain_of_thought", "list", "image"],
)
def test_large_inputs_are_written_and_sent_elsewhere(definition: dict[str, Any], inputs: dict[str, Any]) -> None:
    outputs, threads = call(definition, inputs, large_inputs.LARGE + 1)
    assert outputs["answer"] == "Paris"
    assert threads["format"].startswith("dspy_bridge-sync") and threads["lm"] == "dspy_bridge-large"


def test_what_they_tell_meanwhile_is_told_on_the_event_loop() -> None:
    """What it goes through, to the pipe, is of that thread alone."""
    outputs, stream, threads = streamed(QA, {"question": LARGE}, large_inputs.LARGE + 1)
    assert "".join(item["chunk"] for item, _ in stream) == outputs["answer"] == "Paris"
    assert threads["lm"] == "dspy_bridge-large" and {thread for _, thread in stream} == {"MainThread"}


def test_small_ones_are_not_though_they_come_in_a_large_frame() -> None:
    for size in (100, large_inputs.LARGE + 1):
        outputs, threads = call(QA, {"question": "x"}, size)
        assert outputs == {"answer": "Paris"} and threads == {"format": "MainThread", "lm": "MainThread"}


@pytest.mark.parametrize("content", [b"small", LARGE.encode()], ids=["small", "large"])
def test_a_file_is_read_elsewhere(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may answer late. With a large file, what follows is elsewhere too."""
    (tmp_path / "a.png").write_bytes(content)
    readers, read = [], confined_files.read

    def noted(*given: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(*given)

    monkeypatch.setattr(confined_files, "read", noted)
    outputs, threads = call(PHOTO, {"photo": {"path": "a.png"}}, 100, files_dir=str(tmp_path))
    assert outputs == {"answer": "Paris"} and readers[0].startswith("dspy_bridge-reader")
    assert (threads["format"] == "MainThread") == (content == b"small")


TURNS = [{"question": "x", "answer": "y"}] * 2000


@pytest.mark.parametrize(
    ("definition", "inputs"),
    [
        ({"signature": "talk: dspy.History, question -> answer"}, {"question": "x", "talk": {"messages": TURNS}}),
        ({"signature": "context: Any -> answer"}, {"context": [{"a": {"b": 1}}] * 10_000}),
        ({"signature": "context: list[int] -> answer"}, {"context": [1] * 200_000}),
    ],
    ids=["history", "nested", "list"],
)
def test_many_small_values_are_written_elsewhere_though_their_frame_is_small(
    definition: dict[str, Any], inputs: dict[str, Any]
) -> None:
    """Each costs far more than its characters."""
    size = len(json.dumps(inputs))
    assert size < large_inputs.LARGE
    outputs, threads = call(definition, inputs, size)
    assert outputs["answer"] == "Paris"
    assert threads["format"].startswith("dspy_bridge-sync") and threads["lm"] == "dspy_bridge-large"


def test_of_a_batch_less_is_large() -> None:
    """Hundreds may be in flight at once, and each of their steps delays other runs."""
    inputs = {"context": [{"a": {"b": 1}}] * 3000}
    watch = Threads()
    settings = Settings({"lm": "offline/echo"})
    commands = Commands(settings, lambda: None, dict)
    commands._loader._models = dspy_setup.Models(settings)  # by the thread that does it in the other tests, too
    call = cast(Any, Size(len(json.dumps(inputs))))

    async def main() -> None:
        await commands.create_program({"id": "p", "signature": "context: Any -> answer"}, call)
        for given in (inputs, [inputs]):
            with dspy.context(callbacks=[watch]):
                await commands.execute_program({"program_id": "p", "inputs": given}, call)
            threads.append(watch.names["format"])

    threads: list[str] = []
    asyncio.run(main())
    assert threads[0] == "MainThread" and threads[1].startswith("dspy_bridge-sync")


@pytest.mark.parametrize("value", [[[]], [{}], [1], {"messages": [{}]}], ids=["list", "object", "number", "message"])
def test_no_frame_that_is_not_looked_at_holds_what_is_large(value: Any) -> None:
    """The densest values that JSON has, as many as go into such a frame."""
    items = value["messages"] if isinstance(value, dict) else value
    size = len(json.dumps(items[0])) + 1
    items *= large_inputs.NEVER_LARGE // size
    assert not large_inputs.is_large(value, large_inputs.LARGE_IN_BATCH)
    items *= 2400
    assert large_inputs.is_large(value)


def test_what_is_large() -> None:
    for value in (
        LARGE,
        LARGE.encode(),
        [LARGE],
        {"a": {"b": [1, LARGE]}},
        [0] * len(LARGE),
        [[]] * 10_000,
        [{"a": {"b": 1}}] * 10_000,
        dict.fromkeys(map(str, range(200_000))),
        {"talk": {"messages": TURNS}},
        dspy.History(messages=TURNS),
        media._Image(url="http://" + LARGE),
    ):
        assert large_inputs.is_large(value)
    for value in (LARGE[:-100], 5, None, [1] * 1000, [{"a": 1}] * 1000, {"a": dspy.History(messages=[])}, int, {1, 2}):
        assert not large_inputs.is_large(value)
