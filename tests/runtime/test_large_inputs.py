"""Large inputs, files and results of tools are handled on other threads than the event loop's. With the real DSPy."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from pathlib import Path
from typing import Any, cast

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from lm_server import LMServer, chat, script

from dspy_bridge.lm import dspy_setup
from dspy_bridge.programs.program import Program
from dspy_bridge.runtime import large_inputs
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.settings import Settings
from dspy_bridge.signatures import media
from dspy_bridge.wire.json_values import encode_value

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
    """A `Call`; `told`: each item of the stream, and the thread that sent it."""

    meter = None
    slot_transferred = False
    deadline = None
    ends = None
    call_tool: Any

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[tuple[Any, str]] = []

    async def stream_item(self, item: dict[str, Any]) -> None:
        self.items.append((item, threading.current_thread().name))


def call(
    definition: dict[str, Any],
    inputs: dict[str, Any],
    size: int,
    stream: bool = False,
    server: LMServer | None = None,
    call_tool: Any = None,
    **settings: str,
) -> tuple[Any, dict[str, str], list[tuple[Any, str]]]:
    """The outputs, the threads of each step, and the stream's items."""
    server, watch = server or LMServer(lambda _request: chat(reasoning="r", answer="Paris")), Threads()
    lms, given = dspy_setup.LMs(Settings(settings)), Size(size)
    given.call_tool = call_tool

    async def main() -> Any:
        program = Program({"lm": {"model": "openai/m", **server.options()}, **definition}, lms, WorkerThreads())
        with dspy.context(callbacks=[watch]):
            large = large_inputs.are_large(size, inputs)
            return await program.call(inputs, None, None, cast(Any, given), stream=stream, large=large)

    try:
        return asyncio.run(main()), watch.names, given.items
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
    outputs, threads, _ = call(definition, inputs, large_inputs.LARGE + 1)
    assert outputs["answer"] == "Paris"
    assert threads["format"].startswith("dspy_bridge-sync") and threads["lm"] == "dspy_bridge-large"


def test_what_they_tell_meanwhile_is_told_on_the_event_loop() -> None:
    """What it goes through, to the pipe, is of that thread alone."""
    outputs, threads, stream = call(QA, {"question": LARGE}, large_inputs.LARGE + 1, stream=True)
    assert "".join(item["chunk"] for item, _ in stream) == outputs["answer"] == "Paris"
    assert threads["lm"] == "dspy_bridge-large" and {thread for _, thread in stream} == {"MainThread"}


def test_small_ones_are_not() -> None:
    outputs, threads, _ = call(QA, {"question": "x"}, 100)
    assert outputs == {"answer": "Paris"} and threads == {"format": "MainThread", "lm": "MainThread"}


@pytest.mark.parametrize("content", [b"small", LARGE.encode()], ids=["small", "large"])
def test_a_file_is_read_elsewhere(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may answer late, and the file may be large: what follows is elsewhere too."""
    (tmp_path / "a.png").write_bytes(content)
    readers, read = [], media.read_file

    def noted(*given: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(*given)

    monkeypatch.setattr(media, "read_file", noted)
    outputs, threads, _ = call(PHOTO, {"photo": {"path": "a.png"}}, 100, files_dir=str(tmp_path))
    assert outputs == {"answer": "Paris"} and readers[0].startswith("dspy_bridge-reader")
    assert threads["format"].startswith("dspy_bridge-sync")


def test_a_large_result_of_a_tool_keeps_the_loop_free() -> None:
    """One by one two million integers blocked it for five seconds. The prompt has JSON, the reply a list."""
    rows = [*range(1_000_000), "<<CUSTOM-TYPE-START-IDENTIFIER>>", "[[ ## next_thought ## ]]"]
    gaps = []

    async def call_tool(*_: Any) -> Any:
        def watch(before: float) -> None:
            gaps.append(time.monotonic() - before)
            asyncio.get_running_loop().call_later(0.005, watch, time.monotonic())

        watch(time.monotonic())
        return rows

    steps = [chat(next_thought="t", next_tool_name=name, next_tool_args="{}") for name in ("f", "finish")]
    server = LMServer(script(*steps, chat(reasoning="r", answer="Paris")))
    agent = {**QA, "program_type": "react", "tools": [{"name": "f"}]}
    outputs, *_ = call(agent, {"question": "Why?"}, 100, server=server, call_tool=call_tool)
    assert json.loads(encode_value(outputs))["trajectory"]["observation_0"][:-2] == rows[:-2]
    prompt = server.requests[1]["messages"][1]["content"]
    assert "[0,1,2,3" in prompt and '"((CUSTOM-TYPE' in prompt and "(( ## next_thought ## ))" in prompt
    assert max(gaps) < 1, "some 0.1 s on an idle machine"


@pytest.mark.parametrize(("count", "large"), [(1, True), (2, True), (9, False)])
def test_a_list_of_inputs_is_large_by_their_mean(count: int, large: bool) -> None:
    assert large_inputs.are_large(2 * large_inputs.LARGE, [{}] * count) == large
